"""Tiny language and image runs that take a second, and what two runs may be compared by."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from chela_plugin.harness.train.config import load_run

LANGUAGE = {
    "task": "language",
    "context": 16,
    "data": {"kind": "text", "validation_share": 0.1},
    "model": {"config": {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32, "mixer": "attention"}},
    "training": {
        "steps": 8,
        "batch_size": 4,
        "learning_rate": 0.01,
        "warmup_steps": 2,
        "evaluate_every": 4,
        "validation_sequences": 7,
    },
    "log_every": 2,
    "machine": {"accelerator": "cpu"},
}

IMAGES = {
    "task": "images",
    "data": {"kind": "idx", "workers": 0},
    "model": {
        "name": "chela_vit_tiny",
        "arguments": {
            "img_size": 8,
            "patch_size": 4,
            "in_chans": 1,
            "embed_dim": 16,
            "depth": 1,
            "mixer": "bidirectional(linear_attention)",
        },
    },
    "augmentation": {"mixup": 0.2, "cutmix": 0.5},
    "training": {
        "epochs": 2,
        "batch_size": 8,
        "learning_rate": 0.01,
        "warmup_epochs": 1,
        "ema_decay": 0.9,
        "eval_sizes": [4, 16],
    },
    "log_every": 1,
    "machine": {"accelerator": "cpu"},
}


@pytest.fixture(autouse=True)
def as_before():
    """The switch for deterministic algorithms."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(np.random.default_rng(0).integers(97, 103, 2000, dtype=np.uint8).tobytes())
    return path


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """28 training images of 8 x 8 in 3 classes, 11 test images."""
    folder = tmp_path / "idx"
    folder.mkdir()
    random = np.random.default_rng(0)
    for split, count in (("train", 28), ("t10k", 11)):
        labels = (np.arange(count) % 3).astype(np.uint8)
        images = random.integers(0, 80, (count, 8, 8), dtype=np.uint8) + 60 * labels[:, None, None]
        header = struct.pack(">HBB3I", 0, 8, 3, count, 8, 8)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">HBBI", 0, 8, 1, count) + labels.tobytes())
    return folder


@pytest.fixture
def config_file(tmp_path: Path, text: Path, idx_folder: Path):
    """`config_file('language')` writes the tiny run and returns its path."""

    def write(task: str) -> Path:
        data, folder = (LANGUAGE, text) if task == "language" else (IMAGES, idx_folder)
        path = tmp_path / f"{task}.yaml"
        path.write_text(yaml.safe_dump({**data, "data": {**data["data"], "path": str(folder)}}))
        return path

    return write


@pytest.fixture
def tiny(config_file):
    """`tiny('language', 'training.steps=4')` is the config of a tiny run."""
    return lambda task, *overrides: load_run(config_file(task), overrides)[1]


def metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith("_per_second") and k != "mfu"} for line in lines]
