"""What `cu_seqlens` must be wherever packed sequences are taken."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def check_cu_seqlens(cu_seqlens: Tensor, batch: int, time: int, *, read: bool) -> None:
    """Raise ValueError unless `cu_seqlens` `[N + 1]` cuts one row of `time` tokens into sequences.

    Its values are looked at only if `read`: on a CUDA device that stalls the stream.
    """
    if batch != 1:
        raise ValueError(f"cu_seqlens needs a batch of 1 with the sequences behind one another, got a batch of {batch}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            "cu_seqlens must be a 1-D int32 or int64 tensor with at least two entries, "
            f"got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    if not read:
        return
    cuts = cu_seqlens.tolist()
    if cuts[0] != 0 or cuts[-1] != time:
        raise ValueError(f"cu_seqlens must run from 0 to T = {time}, got {cuts[0]} to {cuts[-1]}")
    if any(end < start for start, end in pairwise(cuts)):
        raise ValueError(f"cu_seqlens must not decrease, got {cuts}")
