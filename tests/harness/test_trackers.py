"""Curves go to TensorBoard, and to Weights & Biases or trackio through their packages when asked for."""

import importlib.util
import json
import sys

import pytest

from chela_plugin.harness import ablation
from chela_plugin.harness.config import ConfigError, load_ablation
from chela_plugin.harness.extras import MissingPackage
from chela_plugin.harness.results import read_records

FAKE = """
import json

class Run:
    def __init__(self, options):
        self.options = options
        self.lines = []
    def log(self, values, step=None):
        {log}
        self.lines.append([step, sorted(values)])
    def finish(self):
        with open({path!r}, "a") as file:
            file.write(json.dumps([self.options, self.lines]) + "\\n")

def init(**options):
    {init}
    return Run(options)
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """`package('wandb')` makes a package of that name that writes what it is told to a file; returns a reader of it."""

    def make(name, init="pass", log="pass"):
        (tmp_path / "site").mkdir(exist_ok=True)
        told = tmp_path / "told"
        (tmp_path / "site" / f"{name}.py").write_text(FAKE.format(path=str(told), init=init, log=log))
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        monkeypatch.delitem(sys.modules, name, raising=False)
        return lambda: [json.loads(line) for line in told.read_text().splitlines()]

    yield make
    for name in ("wandb", "trackio"):
        sys.modules.pop(name, None)


@pytest.fixture
def track(tiny, tmp_path, quiet):
    def run(*trackers):
        name, config = load_ablation(tiny(mixers=["identity"], baseline="identity"))
        assert ablation.run_ablations({name: config}, tmp_path / "out", quiet, trackers=trackers) is None
        return read_records(tmp_path / "out" / "results.jsonl")[0]

    return run


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_the_curves_and_tensorboard_too(package, track, tmp_path, name):
    told = package(name)
    (run, _) = track(name)
    ((options, lines),) = told()
    names = ["learning_rate", "seconds", "train_loss", "validation", "validation_loss"]
    assert lines == [[3, names], [6, names]]
    assert (options["project"], options["resume"]) == ("chela", "allow")  # a run that goes on is one curve
    assert run["cell"] in (options["id"] if name == "wandb" else options["name"])
    assert options["config"]["mixer"] == "identity" and options["config"]["ablation_config"]["training"]["steps"] == 6
    assert list((tmp_path / "out" / "tensorboard").rglob("events.out.tfevents.*"))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused_with_the_pip_line(track, tmp_path, monkeypatch, name):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *rest: None if n == name else find(n, *rest))
    with pytest.raises(MissingPackage, match=f"{name} is not installed; run: pip install {name}"):
        track(name)
    assert not (tmp_path / "out").exists()


def test_an_unknown_tracker_is_refused(track):
    with pytest.raises(ConfigError, match="'mlflow' is not known; choose from wandb, trackio"):
        track("mlflow")


def test_a_tracker_that_can_not_start_ends_it_with_one_message(package, track):
    package("wandb", init="raise RuntimeError('not logged in')")
    with pytest.raises(
        ConfigError, match=r"wandb could not start \(RuntimeError: not logged in\); .*leave out --track"
    ):
        track("wandb")


def test_a_tracker_that_fails_later_costs_no_run(package, track):
    package("wandb", log="raise OSError('no network')")
    with pytest.warns(UserWarning, match="wandb fails .*goes on without"):
        records = track("wandb")
    assert [r["record"] for r in records] == ["run", "test"]
