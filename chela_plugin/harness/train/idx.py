"""Images in MNIST's idx format, as Zalando's Fashion-MNIST and Debian's dataset-fashion-mnist ship them."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from chela_plugin.harness.config import ConfigError

REMEDY = (
    "for Fashion-MNIST: apt install dataset-fashion-mnist puts them into /usr/share/datasets/fashion-mnist, or take "
    "the four files from https://github.com/zalandoresearch/fashion-mnist"
)


class IdxImages(Dataset):
    """Images and labels of one split; `transform` is set by timm's `create_loader`.

    Args:
        folder: holds `train-images-idx3-ubyte` and `train-labels-idx1-ubyte`, `t10k-...` likewise, each with or without
            `.gz`.
        mode: PIL's, 'L' or 'RGB'.

    Raises ConfigError for a missing or damaged file.
    """

    def __init__(self, folder: Path, split: Literal["train", "t10k"], mode: str):
        self.images = read_idx(folder, f"{split}-images-idx3-ubyte", 3)
        self.labels = read_idx(folder, f"{split}-labels-idx1-ubyte", 1)
        if len(self.images) != len(self.labels):
            raise ConfigError(f"{folder}: {len(self.images)} {split} images, but {len(self.labels)} labels")
        self.classes = int(self.labels.max()) + 1
        self.mode = mode
        self.transform: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> tuple[Any, int]:
        image = Image.fromarray(self.images[number]).convert(self.mode)
        return self.transform(image) if self.transform else image, int(self.labels[number])


def read_idx(folder: Path, name: str, dims: int) -> np.ndarray:
    """One idx file of unsigned bytes with `dims` dimensions: a big-endian header, then the data."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise ConfigError(f"data.path {folder} holds no {name}[.gz]; {REMEDY}")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zero, kind, count, *shape = struct.unpack_from(f">HBB{dims}I", content)
        data = np.frombuffer(content, np.uint8, offset=4 + 4 * dims)
        if (zero, kind, count) != (0, 8, dims) or data.size != np.prod(shape):
            raise ValueError("header and size don't agree")
    except (OSError, EOFError, ValueError, struct.error) as error:
        raise ConfigError(f"{path} is no whole idx file of bytes ({error}); {REMEDY}") from None
    return data.reshape(shape)
