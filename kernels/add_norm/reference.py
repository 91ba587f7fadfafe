"""A residual sum and the layer or RMS norm behind it in plain PyTorch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def add_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As `add_norm`, or without a bias as `add_rms_norm`, with arguments that they have checked."""
    total = x if branch is None else x + branch
    inner = torch.promote_types(total.dtype, torch.float32)
    if bias is None:
        y = F.rms_norm(total.to(inner), weight.shape, weight.to(inner), eps)
    else:
        y = F.layer_norm(total.to(inner), weight.shape, weight.to(inner), bias.to(inner), eps)
    return total, y.to(dtype)
