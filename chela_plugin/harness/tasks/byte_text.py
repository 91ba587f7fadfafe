"""Byte-level language modelling of the standard library of the Python that runs: real text, on every machine."""

from __future__ import annotations

import hashlib
import sysconfig
from functools import lru_cache
from pathlib import Path

import torch

from chela_plugin.harness.task_configs.builtin import BytesTask
from chela_plugin.harness.tasks import Examples, Split

# Not the library itself, or present in some installations only.
SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"})


def examples(config: BytesTask, split: Split) -> Examples:
    """Windows that touch but don't overlap: inputs `[N, context]` uint8, targets the byte that follows each.

    Raises ValueError if the library holds fewer bytes than one window.
    """
    wanted = {"train": config.train_bytes, "validation": config.validation_bytes, "test": config.test_bytes}[split]
    text = b"".join(Path(file).read_bytes() for file in split_files(sysconfig.get_paths()["stdlib"])[split])[:wanted]
    count = (len(text) - 1) // config.context
    if count < 1:
        raise ValueError(
            f"task bytes: the {split} split holds {len(text)} bytes, fewer than one context and its target"
        )
    stream = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    inputs = stream[: count * config.context].view(count, config.context)
    targets = stream[1 : count * config.context + 1].view(count, config.context)
    return Examples(inputs, targets, classes=256, metric="bits_per_byte")


@lru_cache
def split_files(library: str) -> dict[Split, list[str]]:
    """Files of the three splits (8:1:1 by file), each in an order that mixes the packages.

    Both the split and the order follow from the SHA-256 of a file's path inside the library, so a file stays in its
    split whatever other files a Python version adds. A byte-equal copy of a file that came before is left out.
    """
    root = Path(library)
    files = [f for f in root.glob("**/*.py") if not SKIPPED & set(f.relative_to(root).parts)]
    if not files:
        raise ValueError(f"task bytes: no .py file under the standard library's folder {library}")
    ranked = sorted((hashlib.sha256(f.relative_to(root).as_posix().encode()).hexdigest(), f) for f in files)
    splits: dict[Split, list[str]] = {"train": [], "validation": [], "test": []}
    contents: set[bytes] = set()
    for rank, file in ranked:
        content = hashlib.sha256(file.read_bytes()).digest()
        if content not in contents:
            contents.add(content)
            # The rank's leading digits order the files; its last ones choose the split, so the two are independent.
            lot = int(rank[-8:], 16) % 10
            split: Split = "validation" if lot == 0 else "test" if lot == 1 else "train"
            splits[split].append(str(file))
    return splits
