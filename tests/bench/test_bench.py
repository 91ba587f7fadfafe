"""`chela bench` on a CPU: every suite runs, says what it skipped and why, and a run that is cut off keeps its rows."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from chela_plugin.bench import peers, timing
from chela_plugin.bench import record as files
from chela_plugin.bench.ahead import only_compile
from chela_plugin.bench.cases import Case, Unavailable, Work
from chela_plugin.bench.graphs import Captured
from chela_plugin.bench.plot import draw, panels_of
from chela_plugin.bench.runner import OutOfTime, at_most, run_suite
from chela_plugin.cli import app
from chela_plugin.harness.config import ConfigError

pytestmark = pytest.mark.usefixtures("one_thread")


def bench(*words):
    return CliRunner().invoke(app, ["bench", *map(str, words)])


@pytest.mark.parametrize(
    ("suite", "filters", "wanted"),
    [
        ("operators", ["T=64"], {"linear_attention": 5, "long_conv": 2, "gated_norm": 3}),
        (
            "layers",
            ["T=64 ", r"D=64 (chela|attention|chela\(long=multiscale\)|fla GatedLinearAttention) "],
            {"chela": 2, "attention": 2, "chela(long=multiscale)": 2},
        ),
        ("lm", ["T=64|B=1 prompt", "depth=2 (chela|attention|fla GLAForCausalLM) "], {"chela": 3, "attention": 3}),
        (
            "vision",
            ["pixels=32", "(chela|timm vit_tiny_patch16_224) "],
            {"chela_vit_tiny, chela": 2, "timm vit_tiny_patch16_224": 2},
        ),
    ],
)
def test_every_suite_runs_at_small_sizes(suite, filters, wanted, tmp_path):
    pytest.importorskip("transformers")
    out = tmp_path / "record.json"
    words = [word for one in filters for word in ("--filter", one)]
    result = bench(suite, "--device", "cpu", "--rounds", 1, "--out", out, *words)
    assert result.exit_code == 0, result.output
    record = files.read(out)
    assert all(f"{row['name']}: ready after" in result.output for row in record["results"])
    for row in record["results"]:
        assert row["ms"][1] <= row["ms"][0] <= row["ms"][2]
        assert row["path"] and row["ready_s"] >= 0
    if suite == "operators":
        counted = {op: len({r["name"] for r in record["results"] if r["op"] == op}) for op in wanted}
        assert counted == wanted
    else:
        counted = {name: sum(row["name"] == name for row in record["results"]) for name in wanted}
        assert counted == wanted
    assert all("CUDA" in row["reason"] for row in record["skipped"] if row["name"].startswith("fla"))
    kernels = {row["name"] for row in record["profile"]}
    profiled = {
        "layers": {"chela", "chela(long=multiscale)"},
        "lm": {"chela", "attention"},
        "vision": {"chela_vit_tiny, chela"},
    }
    assert kernels == profiled.get(suite, set())
    assert {"device", "versions", "revision", "source", "rounds"} <= record.keys()


def cases():
    def broken():
        raise RuntimeError("the kernel\nis broken")

    def missing():
        raise Unavailable("no package; pip install it")

    def fine():
        return Work({"forward": lambda: torch.ones(4).sum()}, "torch", parameters=4)

    def slow():
        time.sleep(30)
        return fine()

    def huge():
        raise torch.OutOfMemoryError("too much")

    contenders = {"fine": fine, "broken": broken, "missing": missing, "slow": slow}
    return [
        Case({"T": 1}, ("forward",), contenders, {"forward": (1, "tokens")}),
        Case({"T": 2}, ("forward",), {"fine": fine}),
    ]


def run(found, out=None, filters=(), **changed):
    options = {"rounds": 3, "budget_s": 0.5, "revision": "abc", "settings": {}} | changed
    console = Console(quiet=True)
    return run_suite("layers", found, torch.device("cpu"), console, out=out, filters=list(filters), **options)


def test_what_can_not_run_is_a_row_with_its_reason_and_the_rest_goes_on():
    record = run(cases())
    assert [row["name"] for row in record["results"]] == ["fine", "fine"]
    reasons = {row["name"]: row["reason"] for row in record["skipped"]}
    assert reasons["broken"] == "RuntimeError: the kernel"
    assert reasons["missing"] == "no package; pip install it"
    assert "not ready within 0.5 s" in reasons["slow"]


def test_what_can_not_be_captured_in_a_graph_is_still_timed_without_one(monkeypatch):
    def reads_from_the_device():
        raise RuntimeError("not permitted when stream is capturing")

    monkeypatch.setattr(Captured, "_capture", lambda self: self.run())
    runs = {"forward": lambda: torch.ones(4).sum(), "forward_graph": Captured(reads_from_the_device)}
    record = run([Case({"T": 1}, ("forward", "forward_graph"), {"peer": lambda: Work(dict(runs), "peer")})])
    assert [row["what"] for row in record["results"]] == ["forward"]
    assert [row["what"] for row in record["skipped"]] == ["forward_graph"]
    assert "not permitted" in record["skipped"][0]["reason"]


def test_a_record_names_mamba_ssm_s_code_after_its_import_without_the_extension(mamba_ssm_without_extension):
    assert peers.mamba_ssm_importable() is None
    assert timing.conditions("abc", "cpu")["versions"]["mamba-ssm (source)"]


def test_processes_compile_every_configuration_once_and_go_on_with_one_that_runs(monkeypatch):
    runtime = pytest.importorskip("triton.runtime")

    class Search:
        """What `only_compile` needs of Triton's; configuration n takes n shared memory, of which there is 2."""

        def __init__(self):
            self.configs = [SimpleNamespace(pre_hook=None, all_kwargs=lambda n=n: {"n": n}) for n in (9, 8, 2, 3, 1)]
            self.nargs, self.tried = {}, []
            self.fn = SimpleNamespace(run=self.launch)

        def launch(self, *, n):
            self.tried.append(n)
            if n > 2:
                raise RuntimeError("out of resource")

    monkeypatch.setattr(runtime, "Autotuner", Search)
    tried = []
    for share in range(3):
        only_compile(share, 3)
        search = Search()
        times = [search._bench(config=config)[0] for config in search.configs]
        chosen = search.configs[times.index(min(times))].all_kwargs()["n"]
        assert chosen <= 2
        tried += search.tried
    assert sorted(tried) == [1, 2, 3, 8, 9]


def test_a_run_that_is_cut_off_keeps_the_cases_before(tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    out = tmp_path / "record.json"
    found = [*cases()[1:], Case({"T": 3}, ("forward",), {"interrupted": interrupted})]
    with pytest.raises(KeyboardInterrupt):
        run(found, out)
    assert [row["T"] for row in json.loads(out.read_text())["results"]] == [2]
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_a_filter_chooses_contenders_shapes_and_what_is_timed():
    assert [row["T"] for row in run(cases(), filters=["T=2", "fine"])["results"]] == [2]
    assert run(cases(), filters=["fine backward"])["results"] == []


def test_runs_are_interleaved_and_every_quantile_is_of_all_rounds():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    times = timing.interleaved(runs, 3, "cpu")
    assert order == ["a", "b"] + ["a", "b"] * 3
    assert {name: len(ms) for name, ms in times.items()} == {"a": 3, "b": 3}
    assert timing.quantiles([5.0, 1.0, 2.0, 3.0, 4.0]) == [3.0, 1.0, 4.0]


def test_a_budget_ends_what_takes_longer_and_leaves_no_alarm():
    with pytest.raises(OutOfTime), at_most(0.05):
        time.sleep(5)
    with at_most(0.05):
        pass
    time.sleep(0.1)  # an alarm left behind would ring here


def test_plot_draws_a_record(tmp_path):
    out = tmp_path / "record.json"
    run(cases(), out)
    assert bench("plot", out).exit_code == 0
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_long_results_give_one_panel_for_each_thing_timed():
    rows = [{"T": T, "D": 4, "name": n, "what": w, "ms": [1, 1, 1]} for T in (1, 2) for n in "ab" for w in ("f", "g")]
    assert [(title, axis, len(r)) for title, axis, r in panels_of(rows)] == [("f, D=4", "T", 4), ("g, D=4", "T", 4)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["speed"], "no suite 'speed'"),
        (["layers", "--device", "tpu"], "cuda or cpu"),
        (["layers", "--device", "cpu", "--filter", "("], "no regular expression"),
        (["layers", "--device", "cpu", "--filter", "chelae"], "nothing matches"),
        (["layers", "--device", "cpu", "--out", "nowhere/x.json"], "does not exist"),
        (["layers", "x.json"], "takes no file"),
        (["plot"], "takes the JSON file"),
        (["plot", "nowhere.json"], "does not exist"),
    ],
)
def test_a_mistake_is_one_error_that_says_what_to_do(words, said):
    result = bench(*words)
    assert isinstance(result.exception, ConfigError) and said in str(result.exception)


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"results": []}')
    with pytest.raises(ConfigError, match="not written by"):
        draw(path)
