"""Launches of the kernel, and the node of autograd around them. Nothing here looks at a value."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from chela_plugin.kernels.backend import ceil_div, next_power_of_2, ready_for
from chela_plugin.kernels.launching import Launcher

from . import triton as kernels
from .reference import frequencies

turn = Launcher(kernels.turn)

ELEMENTS = 1024  # of a block: eight pairs a thread of four warps


def run(
    parts: tuple[Tensor, Tensor, Tensor],
    outs: tuple[Tensor, Tensor, Tensor],
    position: Tensor,
    frequency: Tensor,
    back: bool,
) -> None:
    """Fills outs, alike in their strides, from parts `[B, T, H, d]`; the third only with `back`."""
    batch, time, heads, width = parts[0].shape
    half = width // 2
    columns = next_power_of_2(half)
    block = max(1, min(ELEMENTS // columns, next_power_of_2(time)))
    parts = tuple(t if t.stride(3) == 1 else t.contiguous() for t in parts)  # type: ignore[assignment]
    places = position.stride() if position.dim() == 2 else (0, position.stride(0))
    with ready_for(parts[0]):
        turn(
            (batch * ceil_div(time, block),),
            (*parts, *outs, position, frequency),
            (time, heads, half, *[n for t in parts for n in t.stride()[:3]], *outs[0].stride()[:3], *places),
            BACK=back, BT=block, BW=columns, num_warps=4,
        )  # fmt: skip


class Rotary(torch.autograd.Function):
    """Arguments (qkv, position); returns q, k and v, the last a view of qkv."""

    @staticmethod
    def forward(ctx, qkv, position):
        batch, time, _, heads, width = qkv.shape
        q, k, v = qkv.unbind(2)
        turned = torch.empty(2, batch, time, heads, width, dtype=qkv.dtype, device=qkv.device)
        # Made here and kept for the backward pass: four small launches, more of the host's time than the kernel.
        frequency = frequencies(width // 2, position.device, torch.float32)
        turned_q, turned_k = turned.unbind(0)
        run((q, k, q), (turned_q, turned_k, turned_q), position, frequency, False)
        ctx.save_for_backward(position, frequency)
        return turned_q, turned_k, v

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk, dv):
        position, frequency = ctx.saved_tensors
        batch, time, heads, width = dq.shape
        dqkv = torch.empty(batch, time, 3, heads, width, dtype=dq.dtype, device=dq.device)
        run((dq, dk, dv), dqkv.unbind(2), position, frequency, True)
        return dqkv, None
