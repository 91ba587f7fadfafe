"""What `cu_seqlens` must be wherever packed sequences are taken."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from chela_plugin.kernels.backend import may_read, traced

_passed: WeakIdKeyDictionary = WeakIdKeyDictionary()  # cu_seqlens on a CUDA device to `_now` when it was found right


def _now(cu_seqlens: Tensor, time: int) -> tuple[int, int]:
    return 0 if cu_seqlens.is_inference() else cu_seqlens._version, time


def unread(cu_seqlens: Tensor, time: int) -> bool:
    """Whether the values of `cu_seqlens` are to be looked at now.

    Always on a CPU and under `CHELA_CHECK=1`. On a CUDA device that waits for the stream: once for each tensor, again
    where it was written to in place, and never inside a trace or a CUDA graph: all layers of a step share one wait.
    """
    if may_read(cu_seqlens):
        return True
    if traced(cu_seqlens) or not cu_seqlens.is_cuda or torch.cuda.is_current_stream_capturing():
        return False
    return _passed.get(cu_seqlens) != _now(cu_seqlens, time)


def check_cu_seqlens(cu_seqlens: Tensor, batch: int, time: int, *, read: bool) -> None:
    """Raise ValueError unless `cu_seqlens` `[N + 1]` cuts one row of `time` tokens into sequences.

    Its values are looked at only if `read`: on a CUDA device that waits for the stream (`unread`).
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
    if cu_seqlens.is_cuda:
        _passed[cu_seqlens] = _now(cu_seqlens, time)
