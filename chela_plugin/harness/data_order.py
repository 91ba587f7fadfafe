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
    start, end = step * batch_size, (step + 1) * batch_size
    rows = []
    while start < end:
        epoch, place = divmod(start, size)
        rows.append(_permutation(size, seed, epoch)[place : place + end - start])
        start += len(rows[-1])
    return torch.cat(rows)


@lru_cache(maxsize=4)
def _bucket_batches(buckets: bytes, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """The batches of one epoch, each from one bucket, in random order; what doesn't fill a batch is left out."""
    of = torch.frombuffer(bytearray(buckets), dtype=torch.int16)
    batches: list[Tensor] = []
    for bucket in of.unique().tolist():
        rows = (of == bucket).nonzero().squeeze(1)
        rows = rows[torch.randperm(len(rows), generator=generator("order", seed, epoch, bucket))]
        batches += [part for part in rows.split(batch_size) if len(part) == batch_size]
    order = torch.randperm(len(batches), generator=generator("batches", seed, epoch))
    return [batches[i] for i in order.tolist()]


def bucket_rows(buckets: Tensor, batch_size: int, seed: int, step: int) -> Tensor:
    """As `batch_rows`, each batch drawn from one bucket of `buckets` `[N]`; another permutation every epoch.

    Raises ValueError if no bucket holds a whole batch.
    """
    key = buckets.to(torch.int16).numpy().tobytes()
    count = len(_bucket_batches(key, batch_size, seed, 0))
    if not count:
        raise ValueError(f"no bucket of the training data holds batch_size = {batch_size} examples; make it smaller")
    return _bucket_batches(key, batch_size, seed, step // count)[step % count]
