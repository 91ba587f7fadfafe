"""One token of a short-long convolution with a modal long kernel: the definition, in plain PyTorch.

For a channel d of group r, with modes p_m = exp(-exp(-log_time) + i frequency) and residues c_m:

    state_m <- p_m state_m + x
    y = bias + sum_lag short[lag] x[lag] + long_scale Re sum_m c_m (1 - |p_m|) state_m
"""

from __future__ import annotations

import torch
from torch import Tensor


def step(
    x: Tensor,
    history: Tensor,
    state: Tensor,
    short: Tensor,
    long_scale: Tensor,
    bias: Tensor,
    modes: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[B, D]`, history and state after one more token, as new tensors; arguments as in `modal_step`."""
    inner = torch.promote_types(x.dtype, torch.float32)
    window = torch.cat([history, x[:, None]], dim=1)  # [B, K, D], the newest last
    y = torch.einsum("bkd,dk->bd", window.to(inner), short.to(inner).flip(-1)) + bias.to(inner)
    log_time, frequency, residue = (p.to(inner) for p in modes)
    log_radius = -torch.exp(-log_time)
    pole = torch.polar(torch.exp(log_radius), frequency)
    weight = torch.view_as_complex(residue.contiguous()) * -torch.expm1(log_radius)
    group = x.shape[1] // len(log_time)
    state = state * pole.repeat_interleave(group, dim=0) + x.to(inner)[..., None]
    far = (state * weight.repeat_interleave(group, dim=0)).sum(-1).real
    return (y + far * long_scale.to(inner)).to(x.dtype), window[:, 1:], state
