"""Tasks are pure functions, their splits are apart, and every mixer sees the same batches."""

import sysconfig
from pathlib import Path

import torch

from chela_plugin.harness.data_order import batch_rows, generator
from chela_plugin.harness.task_configs.builtin import BytesTask, DigitsTask
from chela_plugin.harness.tasks import SPLITS, augment, examples
from chela_plugin.harness.tasks.byte_text import split_files

SMALL_BYTES = BytesTask(task="bytes", context=32, train_bytes=4000, validation_bytes=2000, test_bytes=2000)


def test_equal_arguments_give_equal_tensors():
    for config in (DigitsTask(task="digits"), SMALL_BYTES):
        for split in SPLITS:
            assert examples(config, split).sha256() == examples(config, split).sha256()


def test_digits_are_stratified_and_split_apart():
    splits = {split: examples(DigitsTask(task="digits"), split) for split in SPLITS}
    assert sum(map(len, splits.values())) == 1797
    for data in splits.values():
        counts = torch.bincount(data.targets, minlength=10) / len(data)
        assert counts.min() > 0.09  # the rarest class is 174 of 1,797 images
        assert data.inputs.shape[1:] == (1, 8, 8)
        assert -1 <= data.inputs.min() < data.inputs.max() <= 1


def test_shifts_move_digits_by_whole_pixels_and_depend_on_the_generator_alone():
    config = DigitsTask(task="digits", max_shift=1)
    images = examples(config, "train").inputs[:64]
    moved = augment(config, images, generator("a", 0))
    assert torch.equal(moved, augment(config, images, generator("a", 0)))
    assert not torch.equal(moved, augment(config, images, generator("a", 1)))
    padded = torch.nn.functional.pad(images, [1] * 4, mode="replicate")
    views = [padded[..., r : r + 8, c : c + 8] for r in range(3) for c in range(3)]
    assert all(any(torch.equal(moved[i], view[i]) for view in views) for i in range(64))


def test_bytes_targets_are_the_next_byte_and_no_file_is_in_two_splits():
    data = examples(SMALL_BYTES, "train")
    assert torch.equal(data.inputs[:, 1:], data.targets[:, :-1])
    assert torch.equal(data.inputs[1:, 0], data.targets[:-1, -1])
    files = split_files(sysconfig.get_paths()["stdlib"])
    assert all(len(files[split]) > 10 for split in SPLITS)
    contents = {split: {Path(f).read_bytes() for f in files[split]} for split in SPLITS}
    assert not contents["train"] & contents["test"]
    assert not contents["train"] & contents["validation"]
    assert not contents["validation"] & contents["test"]


def test_data_order_is_a_function_of_seed_and_step_and_covers_every_row_once_an_epoch():
    batches = [batch_rows(10, 4, seed=3, step=step) for step in range(5)]  # two epochs of ten rows
    assert sorted(torch.cat(batches)[:10].tolist()) == list(range(10))
    assert sorted(torch.cat(batches)[10:].tolist()) == list(range(10))
    assert torch.equal(batch_rows(10, 4, seed=3, step=3), batches[3])
    assert not torch.equal(torch.cat(batches), torch.cat([batch_rows(10, 4, seed=4, step=step) for step in range(5)]))
