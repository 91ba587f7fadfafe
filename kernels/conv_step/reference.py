"""One token of a short-long convolution whose long kernel is a list of taps: the definition, in plain PyTorch.

At place p of its row, counted from 0, with blocks of `block` places and for a channel d of group g:

    y = bias + sum_{lag < K} short[d, lag] x[p - lag] + scale far
    far = ahead[p] + sum_{lag <= p mod block} long[g, lag] x[p - lag]

where `ahead[p]` is what the long kernel makes of all blocks before p's own (`layers/streaming.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor


def step(
    x: Tensor,
    inputs: Tensor,
    ahead: Tensor,
    position: Tensor,
    short: Tensor,
    long: Tensor,
    scale: Tensor,
    bias: Tensor,
    block: int,
) -> Tensor:
    """Output `[B, D]`; x is written to its place in inputs. Arguments as in `conv_step`."""
    inner = torch.promote_types(x.dtype, torch.float32)
    at = position[:1]
    inputs.index_copy_(1, at, x[:, None])
    window = max(block, short.shape[1])
    lag = torch.arange(window, device=x.device)
    seen = inputs.index_select(1, (at - lag).clamp(min=0)).to(inner)  # [B, window, D]
    near = torch.nn.functional.pad(short.to(inner), (0, window - short.shape[1])) * (lag <= at)
    width = min(block, long.shape[1])
    far = long[:, :width].to(inner).repeat_interleave(x.shape[1] // len(long), dim=0)
    far = torch.nn.functional.pad(far, (0, window - width)) * (lag <= at % block)
    before = ahead.index_select(1, at)[:, 0].to(inner)
    scale = scale.to(inner)
    y = torch.einsum("bwd,dw->bd", seen, near + scale[:, None] * far) + scale * before + bias.to(inner)
    return y.to(x.dtype)
