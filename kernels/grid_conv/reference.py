"""The convolution on a grid in plain PyTorch, one shifted sum a tap: the definition, and what has no Triton runs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def grid_conv(
    x: Tensor, short: Tensor | None, cross: Tensor | None, scale: Tensor | None, bias: Tensor | None, silu: bool
) -> Tensor:
    """As `grid_conv`, with arguments that it has checked."""
    h, w, dim = x.shape[1:]
    image = x.permute(0, 3, 1, 2)
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = torch.zeros((), dtype=dtype, device=x.device)
    if short is not None:
        y = y + depthwise(image, short, dtype)
    if cross is not None:
        sides = cross.to(dtype).repeat_interleave(dim // cross.shape[1], dim=1)
        if scale is not None:
            sides = sides * scale.to(dtype)[:, None]
        right, left, down, up = sides
        y = y + depthwise(image, two_sided(right[:, :w], left[:, :w])[:, None, :], dtype)
        y = y + depthwise(image, two_sided(down[:, :h], up[:, :h])[:, :, None], dtype)
    if bias is not None:
        y = y + bias.to(dtype)[:, None, None]
    y = F.silu(y) if silu else y
    return y.permute(0, 2, 3, 1).to(x.dtype)


def depthwise(image: Tensor, kernel: Tensor, dtype: torch.dtype) -> Tensor:
    """`[B, D, h, w]` convolved (`conv2d` correlates) with one kernel of odd sizes a channel, zeros outside."""
    padding = [kernel.shape[1] // 2, kernel.shape[2] // 2]
    weight = kernel.flip(1, 2).unsqueeze(1).to(dtype)
    return F.conv2d(image.to(dtype), weight, padding=padding, groups=image.shape[1])


def two_sided(ahead: Tensor, behind: Tensor) -> Tensor:
    """One-sided taps `[D, L]` each way as `[D, 2L - 1]`, lag 0 in the middle; `behind`'s first tap is unused."""
    return torch.cat([behind[:, 1:].flip(-1), ahead], dim=-1)


def normed(
    branches: list[Tensor], weights: Tensor, biases: Tensor, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Branches `[B, h, w, D]` under a batch norm each, summed; then mean and biased variance of each, `[branches, D]`.

    weights, biases: `[branches, D]`.
    """
    y = torch.stack(branches)
    y = y.to(torch.promote_types(y.dtype, torch.float32))
    var, mean = torch.var_mean(y, dim=(1, 2, 3), correction=0)
    a = weights.to(y.dtype) * torch.rsqrt(var + eps)
    shift = biases.to(y.dtype).sum(0) - (a * mean).sum(0)
    u = sum(branch * scale for branch, scale in zip(y.unbind(0), a.unbind(0), strict=True)) + shift
    return (F.silu(u) if silu else u).to(branches[0].dtype), mean, var
