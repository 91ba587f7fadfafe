"""Rotary position embedding in plain PyTorch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

BASE = 10000.0


def frequencies(half: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`[half]`: radians a position, BASE^(-i / half)."""
    return BASE ** -(torch.arange(half, device=device, dtype=dtype) / half)


def rotate(x: Tensor, position: Tensor) -> Tensor:
    """Turn each pair of channels `(i, i + d/2)` of `x` by the angle `position * 10000^(-2i/d)`.

    RoFormer (arXiv:2104.09864, equation 34), halves paired as in GPT-NeoX.

    Args:
        x: `[B, T, H, d]`, d even.
        position: `[T]` or `[B, T]`, integers.

    Returns `x` turned, in its own dtype. The angles are computed anew at each call: they cost little beside the
    attention, and a table kept in a buffer would be lost when a model is built on the meta device.
    """
    # At least fp32: bf16 can't tell position 257 from 256.
    dtype = torch.promote_types(x.dtype, torch.float32)
    frequency = frequencies(x.shape[-1] // 2, x.device, dtype)
    angle = (position.to(dtype)[..., None] * frequency).unsqueeze(-2)
    a, b = x.to(dtype).chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def rotary_qkv(qkv: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `rotary_qkv` of the package, with arguments that it has checked."""
    q, k, v = qkv.unbind(2)
    return rotate(q, position), rotate(k, position), v
