"""benchmarks/training.py makes all tables of training in slices, on one machine or the next."""

import importlib.util
import sys
from pathlib import Path

import pytest

from chela_plugin.harness.config import load_ablation
from chela_plugin.harness.results import open_for_reading, read_records
from chela_plugin.harness.table import check, tables

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "training.py"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("training_tables", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setenv("PYTHONPATH", "")
    return module


def test_every_table_is_an_ablation_that_loads(script):
    assert len({table.name for table in script.TABLES}) == len(script.TABLES)
    for table in script.TABLES:
        _, ablation = load_ablation(table.ablation, table.overrides)
        assert {"chela", "attention"} <= {*ablation.mixers} or table.name == "chela_design"


def test_slices_add_up_and_another_machine_goes_on_from_what_was_published(script, tiny, tmp_path, monkeypatch):
    path = tiny(seeds=[0, 1])
    missing = {"task": "images", "path": str(tmp_path / "nowhere")}
    other = tiny("other", tasks=[missing])
    monkeypatch.setattr(script, "TABLES", (script.Table("lost", str(other)), script.Table("digits", str(path))))
    results = tmp_path / "results"

    def slice_of(seconds, work):
        words = ["--seconds", seconds, "--workers", 1, "--work", tmp_path / work, "--results", results]
        return script.main([str(word) for word in words])

    # A slice makes at least a step of a run; this one ends with it.
    assert slice_of(1e-3, "here") == script.OUT_OF_TIME
    assert slice_of(1e9, "here") == script.OUT_OF_TIME  # 'lost' has no data, 'digits' is finished
    published = results / "digits_h100"
    whole = {*script.PUBLISHED} - {"slices.png"}  # digits has no parts
    assert {f.name for f in published.iterdir()} == whole
    manifest, records = open_for_reading(published)
    assert [r["record"] for r in records] == ["run"] * 4 + ["test"] * 4
    assert check((published / "report.md").read_text(), tables(manifest, records)) == (1, [])
    assert not any((tmp_path / "here" / "digits" / "cells").iterdir())

    lines = (published / "results.jsonl").read_text().splitlines(keepends=True)
    unread = records[-1]["cell"]  # finished there, and its weights are gone
    (published / "results.jsonl").write_text("".join(lines[:-1]))
    assert slice_of(1e9, "there") == script.OUT_OF_TIME
    again, _ = read_records(tmp_path / "there" / "digits" / "results.jsonl")
    assert [r["cell"] for r in again if r["record"] == "run"][-1] == unread  # the only one that was made again
    assert [r["time"] for r in again if r["record"] == "run"][:3] == [
        r["time"] for r in records if r["record"] == "run" and r["cell"] != unread
    ]
    assert len([r for r in again if r["record"] == "test"]) == 4


@pytest.mark.parametrize(("asked", "cap", "used"), [(8, 4, 4), (2, 4, 2), (8, None, 8)])
def test_a_table_that_fills_the_card_has_fewer_runs_side_by_side(script, tmp_path, monkeypatch, asked, cap, used):
    from chela_plugin.harness import ablation

    seen = []
    monkeypatch.setattr(ablation, "run_ablations", lambda grid, work, console, workers, **_: seen.append(workers))
    monkeypatch.setattr(script, "TABLES", (script.Table("mqar", "mqar", workers=cap),))
    words = ["--workers", str(asked), "--work", str(tmp_path / "work"), "--results", str(tmp_path)]
    assert script.main(words) == 0
    assert seen == [used]
