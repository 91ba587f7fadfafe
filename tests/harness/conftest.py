"""A tiny ablation of real digits that runs in seconds, and the numbers of a record that don't depend on the clock."""

import copy
import io
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

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
def comparable():
    """A record without what may differ between two runs of one cell: clock readings, a commit made meanwhile."""

    def strip(record: dict) -> dict:
        free = ("time", "seconds", "tokens_per_second", "revision", "history")
        kept = {k: v for k, v in record.items() if k not in free}
        if "history" in record:
            kept["history"] = {k: v for k, v in record["history"].items() if k != "seconds"}
        return kept

    return strip
