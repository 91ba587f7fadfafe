"""Norm and gate of an attention's output, in plain PyTorch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def gated_norm(
    o: Tensor, v: Tensor | None, skip: Tensor | None, weight: Tensor, gate: Tensor | None, eps: float
) -> Tensor:
    """`RMSNorm_head(o + skip v) weight SiLU(gate)`; shapes as the public function's. fp32 at least inside."""
    wide = o if o.dtype == torch.float64 else o.float()
    if skip is not None and v is not None:
        wide = wide + skip.to(wide.dtype)[:, None] * v.to(wide.dtype)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)
    y = y.flatten(-2)
    if gate is not None:
        z = gate.to(wide.dtype)
        y = y * (z * torch.sigmoid(z))
    return y.to(o.dtype)
