"""The gradient of GELU in plain PyTorch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def gradient(h: Tensor, da: Tensor) -> tuple[Tensor, Tensor]:
    """h, da `[N, M]` to the gradient of h, and the gradient's sum over N, `[M]` in fp32 at least."""
    wide = torch.promote_types(h.dtype, torch.float32)
    dh = torch.ops.aten.gelu_backward(da.to(wide), h.to(wide))
    return dh.to(h.dtype), dh.sum(0)
