"""Image classification as in Long Range Arena: CIFAR-10 in grey, read pixel by pixel, 1,024 steps.

Rules (Tay et al., arXiv:2011.04006; google-research/long-range-arena, lra_benchmarks/image/input_pipeline.py): grey is
0.2989 R + 0.587 G + 0.114 B, in whole steps of 256 as TensorFlow's rgb_to_grayscale cuts it; the first 90 % of the
50,000 training images train, the last 10 % validate, the 10,000 test images test. Grey levels are tokens, as in LRA, or
one channel (`inputs: signal`), as S4 and its successors read them (arXiv:2111.00396).

What differs: which images are the last 10 %. LRA takes them in TensorFlow Datasets' order, here it's the publisher's.

The files are those of the binary version (Krizhevsky 2009, cs.toronto.edu/~kriz/cifar.html): records of one label byte
and 3 x 1,024 bytes of red, green and blue. The Python version is a pickle, which could run anything when it is loaded,
and is never opened.
"""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from chela_plugin.harness.task_configs.base import DataError
from chela_plugin.harness.task_configs.lra import ImageTask
from chela_plugin.harness.tasks import Examples, Split

RECORD = 1 + 3 * 1024
TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
GREY = np.array([0.2989, 0.587, 0.114], np.float32)
WHERE = (
    "get cifar-10-binary.tar.gz (CIFAR-10 binary version) from https://www.cs.toronto.edu/~kriz/cifar.html "
    "and set the task's `path` to it, or to the folder that it unpacks to"
)


def examples(config: ImageTask, split: Split) -> Examples:
    """Inputs: the images row by row, as `config.inputs` says; targets `[N]` in 0..9."""
    names = ("test_batch.bin",) if split == "test" else TRAIN_FILES
    contents = _read(Path(config.path).expanduser())
    records = np.frombuffer(b"".join(contents[name] for name in names), np.uint8).reshape(-1, RECORD)
    held = len(records) // 10
    rows = {"train": slice(None, len(records) - held), "validation": slice(len(records) - held, None)}
    records = records[rows.get(split, slice(None))]
    colours = records[:, 1:].reshape(-1, 3, 1024).astype(np.float32) / 255
    grey = np.einsum("ncp,c->np", colours, GREY)
    images = np.minimum(grey * 255.5, 255).astype(np.uint8).reshape(-1, 32, 32)
    return pixel_sequences(
        torch.from_numpy(images), torch.from_numpy(records[:, 0].astype(np.int64)), 10, config.inputs
    )


def pixel_sequences(images: Tensor, labels: Tensor, classes: int, form: Literal["tokens", "signal"]) -> Examples:
    """Pictures `[N, H, W]` uint8 row by row: tokens `[N, H * W]` uint8, or a signal `[N, H * W, 1]` in [-1, 1]."""
    flat = images.flatten(1)
    if form == "tokens":
        return Examples(flat, labels, classes=classes, metric="accuracy", vocabulary=256)
    signal = flat[..., None].float().div_(127.5).sub_(1)  # in place: Path-X is 10 GB
    return Examples(signal, labels, classes=classes, metric="accuracy")


def _read(path: Path) -> dict[str, bytes]:
    """Contents of the six files, from their folder or from the archive. Raises DataError."""
    names = {*TRAIN_FILES, "test_batch.bin"}
    contents = {}
    try:
        if path.is_dir():
            folders = (path, path / "cifar-10-batches-bin", path / "cifar-10-batches-py")
            found = {file.name: file for folder in folders for file in folder.glob("*_batch*")}
            contents = {name: found[name].read_bytes() for name in names if name in found}
            if not contents and {"data_batch_1", "test_batch"} & found.keys():
                raise DataError(f"task lra_image: {path} holds the Python version, which is a pickle; {WHERE}")
        elif path.is_file():
            with tarfile.open(path) as archive:
                for member in archive:
                    name = Path(member.name).name
                    if name in names and (file := archive.extractfile(member)) is not None:
                        contents[name] = file.read()
        else:
            raise DataError(f"task lra_image: there is no {path}; {WHERE}")
    except (OSError, EOFError, tarfile.TarError) as error:
        raise DataError(f"task lra_image: {path} can't be read ({error}); {WHERE}") from None
    missing = sorted(names - contents.keys())
    if missing:
        raise DataError(f"task lra_image: {path} lacks {', '.join(missing)}; {WHERE}")
    sizes = {name: len(content) for name, content in sorted(contents.items())}
    if len(set(sizes.values())) != 1 or sizes["test_batch.bin"] % RECORD or not sizes["test_batch.bin"]:
        raise DataError(
            f"task lra_image: the files under {path} must be of one length, a multiple of {RECORD:,} bytes "
            f"(30,730,000 as published); found {sizes}; {WHERE}"
        )
    for name, content in contents.items():
        if max(content[::RECORD]) > 9:
            raise DataError(f"task lra_image: {name} under {path} holds labels above 9: it is damaged; {WHERE}")
    return contents
