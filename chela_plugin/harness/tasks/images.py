"""Grey images of idx files, such as Fashion-MNIST, resized to whole patches; shifted and flipped to train."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from chela_plugin.harness.task_configs.sequences import ImagesTask
from chela_plugin.harness.tasks import Examples, Split
from chela_plugin.harness.tasks.digits import shift
from chela_plugin.harness.tasks.pixels import idx_split


def examples(config: ImagesTask, split: Split) -> Examples:
    """Inputs `[N, 1, size, size]` float32, pixels in [-1, 1] where they were seen; targets `[N]` in 0..9.

    The files' test images are the test split, `validation_images` of the training images the validation split. Raises
    DataError for files that are missing or damaged.
    """
    images, labels = idx_split("images", config, split)
    others = tuple(resized(images, size) for size in config.other_sizes) if split == "test" else ()
    return Examples(resized(images, config.size), labels, classes=10, metric="accuracy", other_sizes=others)


def resized(images: Tensor, size: int) -> Tensor:
    """`[N, H, W]` uint8 to `[N, 1, size, size]`, bilinear; smoothed before where it gets smaller."""
    images = images[:, None].float() / 127.5 - 1
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=size < images.shape[-1])


def augment(config: ImagesTask, inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Moved by up to `config.max_shift` pixels; half of them flipped."""
    inputs = shift(inputs, config.max_shift, generator)
    if not config.flip:
        return inputs
    flipped = torch.rand(len(inputs), 1, 1, 1, generator=generator) < 0.5
    return torch.where(flipped, inputs.flip(-1), inputs)
