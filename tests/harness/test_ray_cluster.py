"""Cells over a Ray cluster: the same results as here, up to the clock."""

import operator

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


def test_more_threads_than_any_node_has_is_refused(cluster, tiny, tmp_path, quiet):
    name, config = load_ablation(tiny(training__threads=64))
    with pytest.raises(ConfigError, match=r"training\.threads is 64; the largest node of the Ray cluster has 2"):
        ablation.run_ablations({name: config}, tmp_path / "r", quiet, ray="auto")
