"""The short-long convolution of images (`ShortLongConv` with dims=2): k x k kernels, a row and a column kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from chela_plugin.kernels.folded_taps import folded_taps
from chela_plugin.kernels.grid_conv import grid_conv, grid_conv_norm

if TYPE_CHECKING:
    from .short_long_conv import ShortLongConv


def convolved(conv: ShortLongConv, x: Tensor, mask: Tensor | None, grid: tuple[int, int] | None, silu: bool) -> Tensor:
    """All branches on `x` `[B, h w, D]`, the places of a `grid` row by row; see `ShortLongConv.forward`."""
    if grid is None:
        raise ValueError("this short-long convolution is two-dimensional and needs grid=(height, width)")
    image, cross = x.unflatten(1, grid), cross_taps(conv, max(grid))
    if conv.folds():
        scale = None
        if cross is not None:
            scale = conv.long_scale if conv.folded else conv.branch_scales()[-1]
        short = conv.short_taps if conv.folded else conv.folded_short()
        return grid_conv(image, short, cross, scale=scale, bias=conv.branch_bias(), silu=silu).flatten(1, 2)
    norms, shorts = conv.branch_norms(), list(conv.short_kernels)
    if mask is not None:  # the statistics leave out padding
        branches = [branch(conv, i, x, grid) for i in range(len(norms))]
        y = torch.stack([norm(y, mask) for norm, y in zip(norms, branches, strict=True)]).sum(0)
        return F.silu(y) if silu else y
    running, batches = [], []
    for norm in norms:
        assert norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None
        running.append((norm.running_mean, norm.running_var))
        batches.append(norm.num_batches_tracked)
    torch._foreach_add_(batches, 1)  # one launch for all
    y = grid_conv_norm(
        image,
        shorts,
        cross,
        [norm.weight for norm in norms],
        [norm.bias for norm in norms],
        running=running,
        momentum=norms[0].momentum or 0.0,
        eps=norms[0].eps,
        silu=silu,
    )
    return y.flatten(1, 2)


def branch(conv: ShortLongConv, i: int, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Branch i before its norm; `[B, h w, D]` both ways."""
    short, cross = (conv.short_kernels[i], None) if i < len(conv.short) else (None, cross_taps(conv, max(grid)))
    return grid_conv(x.unflatten(1, grid), short, cross).flatten(1, 2)


def cross_taps(conv: ShortLongConv, length: int) -> Tensor | None:
    """Row and column taps before their norm, `[4, groups, length]`: right, left, down, up."""
    if conv.long_kernel is None:
        return None
    conv.check_length(length)
    return folded_taps(*conv.long_kernel.source(length), length=length).view(4, -1, length)
