"""Launches of the two kernels, and the node of autograd around them. Nothing here looks at a value."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from chela_plugin.kernels.backend import ready_for
from chela_plugin.kernels.launching import Launcher

from . import triton as kernels

norm, norm_gradient = Launcher(kernels.forward), Launcher(kernels.backward)

ELEMENTS = 2048  # of a block: 16 a thread of four warps
PROGRAMS = 528  # backward: four on each of an H100's processors; each leaves one partial sum


def blocks_of(dim: int) -> tuple[int, int]:
    """Rows and columns of a block."""
    columns = triton.next_power_of_2(dim)
    return max(1, ELEMENTS // columns), columns


def forward(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum, its norm (RMS without a bias), and if `save` `[2 or 1, rows]`: 1 / deviation and, but for RMS, mean of
    each row. x and branch are dense."""
    dim = x.shape[-1]
    rows = x.numel() // dim
    total = x
    if branch is not None:
        total = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, branch.dtype), device=x.device)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    rms = bias is None
    statistics = torch.empty((1 if rms else 2) if save else 0, rows, dtype=torch.float32, device=x.device)
    block, columns = blocks_of(dim)
    with ready_for(x):
        norm(
            (triton.cdiv(rows, block),),
            (x, x if branch is None else branch, weight, weight if bias is None else bias, total, y,
             statistics if save else y),
            (rows, dim, eps), BRANCH=branch is not None, RMS=rms, SAVE=save, BR=block, BD=columns, num_warps=4,
        )  # fmt: skip
    return total, y, statistics


class AddNorm(torch.autograd.Function):
    """Arguments (x, branch, weight, bias or None, eps, dtype); returns the sum (x itself without a branch) and its
    norm."""

    @staticmethod
    def forward(ctx, x, branch, weight, bias, eps, dtype):
        total, y, statistics = forward(x, branch, weight, bias, eps, dtype, True)
        ctx.save_for_backward(total, statistics, weight, bias)
        ctx.dtypes = x.dtype, None if branch is None else branch.dtype
        ctx.set_materialize_grads(False)
        return (x.view_as(x) if branch is None else total), y

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal, dy):
        total, statistics, weight, bias = ctx.saved_tensors
        x_dtype, branch_dtype = ctx.dtypes
        if dy is None:
            dx = None if dtotal is None else dtotal.to(x_dtype)
            dbranch = None if dtotal is None or branch_dtype is None else dtotal.to(branch_dtype)
            return dx, dbranch, None, None, None, None
        dim = total.shape[-1]
        rows = total.numel() // dim
        dx = torch.empty(total.shape, dtype=x_dtype, device=total.device)
        both = branch_dtype is not None and branch_dtype != x_dtype
        dbranch = torch.empty(total.shape, dtype=branch_dtype, device=total.device) if both else dx
        block, columns = blocks_of(dim)
        programs = min(PROGRAMS, triton.cdiv(rows, block))
        rms = bias is None
        sums = torch.empty(programs, 1 if rms else 2, dim, dtype=torch.float32, device=total.device)
        dy = dy.contiguous()
        with ready_for(total):
            norm_gradient(
                (programs,),
                (total, statistics, weight, dy if dtotal is None else dtotal.contiguous(), dy, dx, dbranch, sums),
                (rows, dim), TOTAL=dtotal is not None, BRANCH=both, RMS=rms, BR=block, BD=columns, num_warps=4,
            )  # fmt: skip
        dweight, *dbias = sums.sum(0)
        dweights = dweight.to(weight.dtype), None if bias is None else dbias[0].to(bias.dtype)
        return dx, None if branch_dtype is None else dbranch, *dweights, None, None
