"""Rotary position embedding (RoFormer, arXiv:2104.09864, equation 34), halves paired as in GPT-NeoX."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, position: Tensor) -> Tensor:
    """Turn each pair of channels `(i, i + d/2)` of `x` by the angle `position * 10000^(-2i/d)`.

    Args:
        x: `[B, T, H, d]`, d even.
        position: `[T]` or `[B, T]`, integers.

    Returns `x` turned, in its own dtype. The angles are computed anew at each call: they cost little beside the
    attention, and a table kept in a buffer would be lost when a model is built on the meta device.
    """
    half = x.shape[-1] // 2
    # At least fp32: bf16 can't tell position 257 from 256.
    dtype = torch.promote_types(x.dtype, torch.float32)
    frequency = 10000.0 ** -(torch.arange(half, device=x.device, dtype=dtype) / half)
    angle = (position.to(dtype)[..., None] * frequency).unsqueeze(-2)
    a, b = x.to(dtype).chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
