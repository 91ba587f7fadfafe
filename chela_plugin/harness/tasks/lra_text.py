"""Text classification as in Long Range Arena: is a film review of IMDb positive, read by bytes, 4,096 at most.

Rules (Tay et al., arXiv:2011.04006; google-research/long-range-arena, lra_benchmarks/text_classification): bytes, the
first `max_length` of each review; 25,000 reviews to train, 25,000 to test, half of either positive. Most results in the
literature are at 4,096 (arXiv:2111.00396).

What differs: LRA validates on the test reviews. Here a tenth of the training reviews validate, chosen by the hash of
their names, and the test reviews are read once. Bytes are their own token ids and 0 is padding; a NUL byte, which text
doesn't hold, would become a space.

The files are those of the Large Movie Review Dataset 1.0 (Maas et al. 2011, ai.stanford.edu/~amaas/data/sentiment).
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from chela_plugin.harness.task_configs.base import DataError
from chela_plugin.harness.task_configs.lra import TextTask
from chela_plugin.harness.tasks import Examples, Split

PADDING = 0
WHERE = (
    "get aclImdb_v1.tar.gz from https://ai.stanford.edu/~amaas/data/sentiment/ and set the task's `path` to it, "
    "or to the folder aclImdb that it unpacks to"
)


def examples(config: TextTask, split: Split) -> Examples:
    """Inputs `[N, max_length]` uint8 bytes, zeros behind the review; targets `[N]`: 1 where it is positive."""
    path = Path(config.path).expanduser()
    half = "test" if split == "test" else "train"
    reviews: dict[tuple[str, str], bytes] = {}
    try:
        for name, content in _reviews(path, half):
            held = int(hashlib.sha256(f"{name[0]}/{name[1]}".encode()).hexdigest(), 16) % 10 == 0
            if split == "test" or held == (split == "validation"):
                reviews[name] = content[: config.max_length]
    except (OSError, EOFError, tarfile.TarError) as error:
        raise DataError(f"task lra_text: {path} can't be read ({error}); {WHERE}") from None
    order = sorted(reviews)  # an archive has an order of its own
    labels = [int(kind == "pos") for kind, _ in order]
    if len(set(labels)) != 2:
        raise DataError(f"task lra_text: {path} has no reviews of both kinds to {_PURPOSE[split]}; {WHERE}")
    inputs = padded_bytes((reviews[name] for name in order), len(order), config.max_length)
    return Examples(inputs, torch.tensor(labels), classes=2, metric="accuracy", vocabulary=256, padding=PADDING)


_PURPOSE = {"train": "train on", "validation": "validate on", "test": "test on"}


def padded_bytes(texts: Iterable[bytes], count: int, length: int) -> Tensor:
    """`count` texts as `[count, length]` uint8, cut or with zeros behind; a NUL byte becomes a space."""
    rows = np.zeros((count, length), np.uint8)
    for row, text in zip(rows, texts, strict=True):
        values = np.frombuffer(text[:length].replace(b"\0", b" "), np.uint8)
        row[: len(values)] = values
    return torch.from_numpy(rows)


def _reviews(path: Path, half: str) -> Iterator[tuple[tuple[str, str], bytes]]:
    """(kind, file name) and bytes of each review of one half, 'train' or 'test'."""
    if path.is_dir():
        for root in (path, path / "aclImdb"):
            for kind in ("pos", "neg"):
                for file in (root / half / kind).glob("*.txt"):
                    yield (kind, file.name), file.read_bytes()
    elif path.is_file():
        with tarfile.open(path) as archive:
            for member in archive:
                parts = PurePosixPath(member.name).parts
                review = len(parts) == 4 and parts[1] == half and parts[2] in ("pos", "neg") and parts[3][-4:] == ".txt"
                if review and (content := archive.extractfile(member)) is not None:
                    yield (parts[2], parts[3]), content.read()
    else:
        raise DataError(f"task lra_text: there is no {path}; {WHERE}")
