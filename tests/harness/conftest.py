"""A tiny ablation of real digits that runs in seconds, and the numbers of a record that don't depend on the clock."""

import copy
import io
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

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
def one_thread():
    """Models this small only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
