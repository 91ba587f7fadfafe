"""Cells over a Ray cluster: the same results as here, up to the clock."""

import operator
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from chela_plugin.harness import ablation
from chela_plugin.harness.config import ConfigError, load_ablation
from chela_plugin.harness.results import read_records

ray = pytest.importorskip("ray", reason="the ray extra is not installed")


@pytest.fixture(scope="module")
def cluster():
    """Two workers of one slot each on this machine."""
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address="local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
    patch.undo()


def test_two_workers_give_the_same_records_and_weights_as_one_process(
    cluster, tiny, tmp_path, quiet, comparable, assert_same_weights
):
    name, config = load_ablation(tiny())
    assert ablation.run_ablations({name: config}, tmp_path / "here", quiet) is None
    assert ablation.run_ablations({name: config}, tmp_path / "ray", quiet, ray="auto") is None
    by_cell = operator.itemgetter("record", "cell")
    here, there = (
        [comparable(r) for r in sorted(read_records(tmp_path / f / "results.jsonl")[0], key=by_cell)]
        for f in ("here", "ray")
    )
    assert len(here) == 4
    assert here == there
    assert_same_weights(tmp_path / "here", tmp_path / "ray")


def test_time_that_is_up_stops_cells_on_the_cluster_and_they_go_on(cluster, tiny, tmp_path, quiet):
    name, config = load_ablation(tiny(training__steps=400, training__evaluate_every=400, mixers=["attention"]))
    stops = 0
    while (code := ablation.run_ablations({name: config}, tmp_path / "r", quiet, ray="auto", max_seconds=1)) == 75:
        stops += 1
        assert stops < 60
    assert code is None and stops >= 1
    assert [r["record"] for r in read_records(tmp_path / "r" / "results.jsonl")[0]] == ["run", "test"]


@pytest.mark.skipif(sys.platform != "linux", reason="finds the process under /proc")
def test_a_lost_process_is_replaced_and_its_cell_goes_on_from_the_checkpoint(
    cluster, tiny, tmp_path, quiet, monkeypatch, comparable
):
    changes = {"training__steps": 300, "training__evaluate_every": 300, "mixers": ["attention"]}
    name, config = load_ablation(tiny(**changes, checkpoint_seconds=0))
    assert ablation.run_ablations({name: config}, tmp_path / "here", quiet) is None
    killed = []

    def kill_once(self, cell, step, loss):
        if not killed:
            for process in Path("/proc").glob("[0-9]*/cmdline"):
                with suppress(OSError):
                    if process.read_bytes().startswith(b"ray::") and str(cell).encode() in process.read_bytes():
                        killed.append((int(process.parent.name), step))
                        os.kill(killed[0][0], signal.SIGKILL)

    monkeypatch.setattr(ablation._Events, "step", kill_once)
    assert ablation.run_ablations({name: config}, tmp_path / "ray", quiet, ray="auto") is None
    assert killed and killed[0][1] < 300
    here, there = (read_records(tmp_path / f / "results.jsonl")[0] for f in ("here", "ray"))
    assert [comparable(r) for r in here] == [comparable(r) for r in there]


def test_more_threads_than_any_node_has_is_refused(cluster, tiny, tmp_path, quiet):
    name, config = load_ablation(tiny(training__threads=64))
    with pytest.raises(ConfigError, match=r"training\.threads is 64; the largest node of the Ray cluster has 2"):
        ablation.run_ablations({name: config}, tmp_path / "r", quiet, ray="auto")
