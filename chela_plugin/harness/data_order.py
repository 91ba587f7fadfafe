"""Which examples step t sees: a function of (seed, t) alone, so all mixers see the same and a resume needs no state."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from torch import Tensor


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator whose stream depends on `key` alone."""
    state = hashlib.sha256("/".join(str(part) for part in key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(state[:8], "big") >> 1)


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(size, generator=generator("order", seed, epoch))


def batch_rows(size: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Row numbers `[batch_size]` of batch `step` (from 0): epoch after epoch, each a new permutation of `size` rows."""
    start = step * batch_size
    rows = []
    for position in range(start, start + batch_size):
        rows.append(_permutation(size, seed, position // size)[position % size])
    return torch.stack(rows)
