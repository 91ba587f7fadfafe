"""Rotary positions of queries and keys in one pass, eager, for attention behind one projection.

`reference.py` is the definition, `triton.py` the kernel, `launch.py` its launches. There is no operator of torch here:
while torch records, the plain form runs, which a compiler fuses by itself.
"""

from __future__ import annotations

from torch import Tensor

from chela_plugin.kernels.backend import backend, traced

from . import reference
from .reference import rotate

__all__ = ["rotary_qkv", "rotate"]

MAX_WIDTH = 256


def rotary_qkv(qkv: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`(q, k, v)`, each `[B, T, H, d]`: q and k of `qkv` turned by their positions (`rotate`), v as it is.

    Args:
        qkv: `[B, T, 3, H, d]`, d even; what one projection makes.
        position: `[T]` or `[B, T]`, integers.

    v is a view of qkv. The gradient of qkv is written in one pass, without the sum of three padded gradients that
    separate operations make.

    Raises ValueError for shapes that do not fit.
    """
    if qkv.dim() != 5 or qkv.shape[2] != 3 or qkv.shape[4] % 2:
        raise ValueError(f"rotary_qkv expects qkv [B, T, 3, H, d] with an even d, got {list(qkv.shape)}")
    if position.shape not in (qkv.shape[1:2], qkv.shape[:2]):
        raise ValueError(f"position must be [T] or [B, T] of qkv {list(qkv.shape)}, got {list(position.shape)}")
    fits = qkv.shape[4] <= MAX_WIDTH and qkv.stride(4) == 1 and qkv.numel() > 0
    if fits and backend(qkv.device, qkv.dtype) == "triton" and not traced(qkv):
        from . import launch

        return launch.Rotary.apply(qkv, position)
    return reference.rotary_qkv(qkv, position)
