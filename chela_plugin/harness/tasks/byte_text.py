"""Byte-level language modelling: of any text, or of the running Python's standard library, which every machine has.

A folder's files are split 8:1:1 by a hash of their path; a single file is cut into its first 80 %, the next 10 % and
the last 10 %, since neighbouring parts of one text are alike.
"""

from __future__ import annotations

import hashlib
import sysconfig
from functools import lru_cache
from pathlib import Path

import torch

from chela_plugin.harness.task_configs.base import DataError
from chela_plugin.harness.task_configs.builtin import BytesTask
from chela_plugin.harness.tasks import Examples, Split

# Not the library itself, or present in some installations only.
SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"})


def examples(config: BytesTask, split: Split) -> Examples:
    """Windows that touch but don't overlap: inputs `[N, context]` uint8, targets the byte that follows each.

    Raises DataError if there is no text, or fewer bytes than one window.
    """
    wanted = {"train": config.train_bytes, "validation": config.validation_bytes, "test": config.test_bytes}[split]
    text = _text(config.path, split, wanted)
    count = (len(text) - 1) // config.context
    if count < 1:
        raise DataError(f"task bytes: the {split} split holds {len(text)} bytes, fewer than one context and its target")
    stream = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    inputs = stream[: count * config.context].view(count, config.context)
    targets = stream[1 : count * config.context + 1].view(count, config.context)
    return Examples(inputs, targets, classes=256, metric="bits_per_byte")


def _text(path: str | None, split: Split, wanted: int) -> bytes:
    """The split's first `wanted` bytes."""
    try:
        if path is not None and Path(path).is_file():
            size = Path(path).stat().st_size
            start = {"train": 0, "validation": size * 8 // 10, "test": size * 9 // 10}[split]
            end = {"train": size * 8 // 10, "validation": size * 9 // 10, "test": size}[split]
            with open(path, "rb") as file:
                file.seek(start)
                return file.read(min(wanted, end - start))
        files = split_files(sysconfig.get_paths()["stdlib"]) if path is None else split_files(path, pattern="**/*")
        parts: list[bytes] = []
        missing = wanted
        for name in files[split]:
            if missing <= 0:
                break
            parts.append(Path(name).read_bytes()[:missing])
            missing -= len(parts[-1])
        return b"".join(parts)
    except OSError as error:
        raise DataError(f"task bytes: {error.filename} can't be read: {error.strerror}") from None


@lru_cache
def split_files(folder: str, pattern: str = "**/*.py") -> dict[Split, list[str]]:
    """Files of the three splits (8:1:1 by file), each in an order that mixes the folders.

    Both the split and the order follow from the SHA-256 of a file's path inside the folder, so a file stays in its
    split whatever other files a Python version adds. A byte-equal copy of a file that came before is left out, and so
    are hidden files, and those of the library that are present in some installations only.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"task bytes: path {folder} is neither a file nor a folder; name the text that is to be read")

    def is_text(parts: tuple[str, ...]) -> bool:
        hidden = any(part.startswith(".") for part in parts)
        return not hidden and (pattern != "**/*.py" or not SKIPPED & set(parts))

    files = [f for f in root.glob(pattern) if is_text(f.relative_to(root).parts) and f.is_file()]
    if not files:
        raise DataError(
            f"task bytes: {folder} holds no file {'' if pattern == '**/*' else 'that ends in .py'}".rstrip()
        )
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
