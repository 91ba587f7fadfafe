"""Images of idx files as a task, and the test split read at sizes for which the model was not trained."""

import io

import numpy as np
import pytest
import torch
from rich.console import Console

from chela_plugin.harness.ablation import run_ablations
from chela_plugin.harness.config import load_ablation
from chela_plugin.harness.results import open_for_reading
from chela_plugin.harness.table import tables
from chela_plugin.harness.task_configs.sequences import ImagesTask
from chela_plugin.harness.tasks import images


def idx(array: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, array.ndim)) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    for name, count in (("train", 30), ("t10k", 12)):
        (tmp_path / f"{name}-images-idx3-ubyte").write_bytes(idx(random.integers(0, 256, (count, 12, 12))))
        (tmp_path / f"{name}-labels-idx1-ubyte").write_bytes(idx(np.arange(count) % 10))
    return tmp_path


def test_images_are_resized_and_splits_are_apart(folder):
    config = ImagesTask(task="images", path=str(folder), size=16, other_sizes=(8, 32), validation_images=10)
    train, validation, test = (images.examples(config, split) for split in ("train", "validation", "test"))
    assert [tuple(part.inputs.shape) for part in (train, validation, test)] == [(n, 1, 16, 16) for n in (20, 10, 12)]
    assert [tuple(other.shape) for other in test.other_sizes] == [(12, 1, 8, 8), (12, 1, 32, 32)]
    assert not train.other_sizes and not validation.other_sizes
    assert -1 <= train.inputs.min() < train.inputs.max() <= 1
    seen = {image.numpy().tobytes() for image in train.inputs}
    assert not any(image.numpy().tobytes() in seen for image in validation.inputs)


def test_half_of_the_training_images_are_flipped_and_the_generator_alone_decides(folder):
    config = ImagesTask(task="images", path=str(folder), size=12, max_shift=0, validation_images=10)
    inputs = images.examples(config, "train").inputs
    one, again = (images.augment(config, inputs, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one, again)
    same = (one == inputs).flatten(1).all(1)
    assert torch.equal(one[~same], inputs[~same].flip(-1))
    assert 0 < same.sum() < len(inputs)


def test_a_model_is_read_at_other_sizes_with_its_weights_carried_over(tiny, folder, tmp_path):
    task = {"task": "images", "path": str(folder), "size": 16, "other_sizes": [8], "validation_images": 10}
    backbone = {"kind": "vision", "dim": 16, "depth": 1, "patch_size": 4, "mlp_hidden": 32}
    path = tiny(tasks=[task], mixers=["chela", "attention"], backbone=backbone, parameter_tolerance=0.5)
    name, ablation = load_ablation(path)
    run_ablations({name: ablation}, tmp_path / "out", Console(file=io.StringIO()), 1)
    manifest, records = open_for_reading(tmp_path / "out")
    tests = [r for r in records if r["record"] == "test"]
    assert len(tests) == 2
    for record in tests:
        assert list(record["slices"]) == ["16 px", "8 px"]
        assert record["slices"]["16 px"] == record["test"]
    assert tables(manifest, records)[1].header == ["mixer", "16 px", "8 px"]
