"""Images as sequences of grey pixels: scikit-learn's digits (64 steps), or idx files such as Fashion-MNIST's (784).

idx is the format of MNIST (LeCun et al.; https://yann.lecun.com/exdb/mnist) and Fashion-MNIST (Xiao et al.,
arXiv:1708.07747): two zero bytes, 8 for unsigned bytes, the number of dims, each dim as a big-endian uint32, the data.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from chela_plugin.harness.task_configs.base import DataError
from chela_plugin.harness.task_configs.builtin import DigitsTask
from chela_plugin.harness.task_configs.sequences import ImagesTask, PixelsTask
from chela_plugin.harness.tasks import Examples, Split, digits

FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def examples(config: PixelsTask, split: Split) -> Examples:
    """Inputs `[N, H * W, 1]` float32 in [-1, 1], row after row; targets `[N]` in 0..9.

    The digits are split as the task digits does it; of idx files, `validation_images` of the training images, chosen by
    `split_seed`, are the validation split. Raises DataError for files that are missing or damaged.
    """
    if config.path is None:
        data = digits.examples(DigitsTask(task="digits", max_shift=0, split_seed=config.split_seed), split)
        return Examples(data.inputs.flatten(1)[..., None], data.targets, classes=10, metric="accuracy")
    images, labels = idx_split("pixels", config, split)
    return Examples(images.flatten(1)[..., None].float() / 127.5 - 1, labels, classes=10, metric="accuracy")


def idx_split(task: str, config: PixelsTask | ImagesTask, split: Split) -> tuple[Tensor, Tensor]:
    """Images `[N, H, W]` uint8 and labels `[N]` int64 in 0..9 of the idx files under `config.path`."""
    folder = Path(str(config.path))
    images, labels = (read_idx(folder, name, task) for name in FILES["test" if split == "test" else "train"])
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise DataError(f"task {task}: {folder} holds images {list(images.shape)}, labels {list(labels.shape)}")
    if labels.max() > 9:
        raise DataError(f"task {task}: {folder} holds the label {int(labels.max())}; there are ten classes, 0 to 9")
    if split != "test":
        if config.validation_images >= len(images):
            raise DataError(
                f"task {task}: validation_images {config.validation_images} leaves none of {len(images)} to train on"
            )
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(config.split_seed))
        held = config.validation_images
        rows = order[:held] if split == "validation" else order[held:]
        images, labels = images[rows.sort().values], labels[rows.sort().values]
    return images, labels.long()


def read_idx(folder: Path, name: str, task: str) -> Tensor:
    """An idx file of unsigned bytes, `name` or `name.gz` in `folder`. Raises DataError."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise DataError(
            f"task {task}: {folder} holds no {name} or {name}.gz; Fashion-MNIST's four files are in data/fashion of "
            "https://github.com/zalandoresearch/fashion-mnist, put them into that folder"
        )
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"task {task}: {path} can't be read: {error}; fetch it again") from None
    dims = content[3] if len(content) >= 4 and content[:3] == b"\0\0\x08" else 0
    start = 4 + 4 * dims
    shape = np.frombuffer(content[4:start], dtype=">u4").astype(int).tolist() if len(content) >= start else []
    if not shape or len(content) - start != int(np.prod(shape)):
        raise DataError(f"task {task}: {path} is no idx file of unsigned bytes, or is cut short; fetch it again")
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).view(shape)
