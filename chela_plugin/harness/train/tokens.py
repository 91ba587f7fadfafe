"""Token streams on disk, read through memory maps: text as bytes, or tokens made elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chela_plugin.harness.config import ConfigError
from chela_plugin.harness.train.config import TextData, TokenData


@dataclass(frozen=True)
class Stream:
    """Part of the concatenation of some arrays, cut into sequences of `context` tokens; a rest is left out."""

    starts: np.ndarray  # int64 [pieces + 1]: where each piece begins in the concatenation, and where the last one ends
    read: Callable[[int, int, int], np.ndarray]  # (piece, from, to) -> tokens
    begin: int
    end: int
    context: int

    def __len__(self) -> int:
        return (self.end - self.begin) // self.context

    def rows(self, numbers: Tensor) -> Tensor:
        """Sequences `[N, context]` int64, by their numbers `[N]`."""
        return torch.stack([self._row(int(number)) for number in numbers])

    def _row(self, number: int) -> Tensor:
        at, parts = self.begin + number * self.context, []
        stop = at + self.context
        piece = int(np.searchsorted(self.starts, at, side="right")) - 1
        while at < stop:
            to = min(stop, int(self.starts[piece + 1]))
            parts.append(self.read(piece, at - int(self.starts[piece]), to - int(self.starts[piece])))
            at, piece = to, piece + 1
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def streams(data: TextData | TokenData, context: int) -> tuple[Stream, Stream, int]:
    """Training and validation stream, and the size of the vocabulary. Raises ConfigError."""
    if isinstance(data, TextData):
        train, validation, vocabulary = *_text(data, context), 256
    else:
        train, validation, vocabulary = *_tokens(data, context), data.vocab_size
    for name, stream in (("training", train), ("validation", validation)):
        if len(stream) < 1:
            raise ConfigError(
                f"data.path {data.path}: its {name} part holds {stream.end - stream.begin} tokens, fewer than the "
                f"context of {context}; give more text, a smaller context, or another validation_share"
            )
    return train, validation, vocabulary


def _split(starts: np.ndarray, read: Callable[..., np.ndarray], share: float, context: int) -> tuple[Stream, Stream]:
    total = int(starts[-1])
    kept = total - max(context, round(total * share))
    return Stream(starts, read, 0, max(0, kept), context), Stream(starts, read, max(0, kept), total, context)


def _text(data: TextData, context: int) -> tuple[Stream, Stream]:
    if data.path.is_file():
        files = [data.path]
    elif data.path.is_dir():
        files = sorted(f for f in data.path.glob(data.pattern) if f.is_file() and f.stat().st_size)
    else:
        raise ConfigError(f"data.path {data.path} is no file and no folder; name the text to train on")
    if not files:
        raise ConfigError(f"data.path {data.path} holds no file that matches data.pattern {data.pattern!r}")
    if data.split == "range":
        return _split(*_bytes_of(files), data.validation_share, context)
    # A file's place follows from its path inside the folder: more files don't move the ones that are there.
    drawn = [_lot(f.relative_to(data.path).as_posix()) < data.validation_share for f in files] if len(files) > 1 else []
    parts = [[f for f, held in zip(files, drawn, strict=False) if held is side] for side in (False, True)]
    if not all(parts):
        raise ConfigError(
            f"data.split file: {len(files)} file(s) under {data.path} leave a part empty; use data.split: range, "
            "or another data.validation_share"
        )
    train, validation = (_bytes_of(part) for part in parts)
    return Stream(*train, 0, int(train[0][-1]), context), Stream(*validation, 0, int(validation[0][-1]), context)


def _lot(name: str) -> float:
    """A number from 0 to 1 that depends on a file's name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32


def _bytes_of(files: list[Path]) -> tuple[np.ndarray, Callable[[int, int, int], np.ndarray]]:
    """Where each file starts, a zero byte behind each, and how to read from one."""
    starts = np.concatenate([[0], np.cumsum([f.stat().st_size + 1 for f in files])]).astype(np.int64)

    @lru_cache(maxsize=256)
    def opened(piece: int) -> np.ndarray:
        return np.memmap(files[piece], dtype=np.uint8, mode="r")

    def read(piece: int, begin: int, end: int) -> np.ndarray:
        tokens = opened(piece)[begin:end]
        missing = end - begin - len(tokens)  # 1 where the zero byte is part of it
        return np.concatenate([tokens, np.zeros(missing, np.uint8)]) if missing else tokens

    return starts, read


def _tokens(data: TokenData, context: int) -> tuple[Stream, Stream]:
    def one(path: Path) -> tuple[np.ndarray, Callable[[int, int, int], np.ndarray]]:
        tokens, length = _token_file(path, data)

        def read(piece: int, begin: int, end: int) -> np.ndarray:
            part = tokens[begin:end]
            part = part.numpy() if isinstance(part, Tensor) else part
            if int(part.max()) >= data.vocab_size or int(part.min()) < 0:
                raise ConfigError(
                    f"{path}: a token {int(part.max())} does not fit data.vocab_size {data.vocab_size}; mend "
                    "vocab_size, or data.dtype if the numbers are nonsense"
                )
            return part

        return np.array([0, length], np.int64), read

    if data.validation_path is None:
        return _split(*one(data.path), data.validation_share, context)
    train, validation = one(data.path), one(data.validation_path)
    return Stream(*train, 0, int(train[0][-1]), context), Stream(*validation, 0, int(validation[0][-1]), context)


def _token_file(path: Path, data: TokenData) -> tuple[Any, int]:
    """Something to slice, and its length."""
    if not path.is_file():
        raise ConfigError(f"data path {path} is no file; it takes a .bin or .safetensors file of tokens")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            file = safe_open(path, framework="pt")
            part = file.get_slice(data.tensor)
        except SafetensorError as error:
            raise ConfigError(f"{path}: {error}; data.tensor names the tensor that holds the tokens") from None
        shape = part.get_shape()
        if len(shape) != 1:
            raise ConfigError(f"{path}: tensor {data.tensor!r} has shape {shape}; tokens are one-dimensional")
        return part, shape[0]
    size = np.dtype(data.dtype).itemsize
    if path.stat().st_size % size:
        raise ConfigError(f"{path} is not whole {data.dtype} numbers: {path.stat().st_size} bytes; see data.dtype")
    tokens = np.memmap(path, dtype=np.dtype(data.dtype).newbyteorder("<"), mode="r")
    return tokens, len(tokens)
