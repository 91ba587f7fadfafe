"""A tiny ablation of real digits that runs in seconds, the `chela` command, a record's numbers but for the clock's."""

import copy
import io
import sys
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from chela_plugin import cli
from chela_plugin.harness.results import load_tensors

TINY = {
    "tasks": ["digits"],
    "mixers": ["identity", "attention"],
    "baseline": "attention",
    "backbone": {"kind": "vision", "dim": 16, "depth": 1, "patch_size": 2, "mlp_hidden": 32},
    "training": {"steps": 6, "batch_size": 8, "warmup_steps": 2, "evaluate_every": 3, "accelerator": "cpu"},
    "learning_rates": [0.01],
    "seeds": [0],
}


@pytest.fixture(autouse=True)
def threads(one_thread):
    """Every test of this folder runs on one."""


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generated data is kept in the test's own folder."""
    monkeypatch.setenv("CHELA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def chela(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """`chela('report', 'x')` returns exit code, stdout, stderr."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["chela", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setattr(cli, "console", cli.Console(highlight=False, width=120))
        with pytest.raises(SystemExit) as exit:
            cli.main()
        captured = capsys.readouterr()
        return exit.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture
def tiny(tmp_path: Path):
    """`tiny(training__steps=9, seeds=[1])` writes a changed copy of TINY and returns its path."""

    def write(name: str = "tiny", **changes) -> Path:
        data = copy.deepcopy(TINY)
        for key, value in changes.items():
            *parents, last = key.split("__")
            place = data
            for parent in parents:
                place = place[parent]
            place[last] = value
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(data))
        return path

    return write


@pytest.fixture
def quiet() -> Console:
    return Console(file=io.StringIO())


@pytest.fixture
def assert_same_weights():
    """Of two results folders, every cell's best weights and step are equal bit for bit."""

    def compare(one: Path, other: Path) -> None:
        files = sorted(p.relative_to(one) for p in one.glob("cells/*/best.safetensors"))
        assert files and files == sorted(p.relative_to(other) for p in other.glob("cells/*/best.safetensors"))
        for file in files:
            (tensors, state), (others, other_state) = load_tensors(one / file), load_tensors(other / file)
            assert state == other_state and tensors.keys() == others.keys()
            for name, tensor in tensors.items():
                assert torch.equal(tensor, others[name]), (file, name)

    return compare


@pytest.fixture
def comparable():
    """A record without what may differ between two runs of one cell: clock readings, a commit made meanwhile."""

    def strip(record: dict) -> dict:
        free = ("time", "seconds", "tokens_per_second", "revision", "history")
        kept = {k: v for k, v in record.items() if k not in free}
        if "history" in record:
            kept["history"] = {k: v for k, v in record["history"].items() if k != "seconds"}
        return kept

    return strip
