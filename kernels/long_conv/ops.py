"""The Triton kernels as torch operators: `torch.compile` and `torch.export` see one node, autograd its gradient.

    chela::long_conv            y, and u before its SiLU where the backward pass wants it
    chela::long_conv_backward   gradients of x, taps and bias

An operator returns an empty tensor for what there is none of. Arguments are what `long_conv` has checked. Outside
traces a call goes through `Eager`, whose host time is a fraction of the operators'.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from chela_plugin.kernels.backend import multiplied_as, ready_for, traced

from . import launch

_NAME = "chela::long_conv"


def forward(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool,
    silu: bool = False,
    save: bool = False,
) -> tuple[Tensor, Tensor]:
    if (dtype := multiplied_as(x)) != x.dtype:
        y, u = forward(x.to(dtype), taps.to(x.dtype).to(dtype), bias, cu_seqlens, causal, silu, save)
        return y.to(x.dtype), u.to(x.dtype)
    u = launch.empty_like(x) if silu and save else x.new_empty(0)
    with ready_for(x):
        y = launch.forward(x, taps, bias, cu_seqlens, causal, silu=silu, u=u if silu and save else None)
    return y, u


def backward(
    dy: Tensor,
    x: Tensor,
    u: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool,
    silu: bool,
    want_x: bool,
    want_taps: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if (dtype := multiplied_as(x)) != x.dtype:
        wide = taps.to(x.dtype).to(dtype)
        dy, u = dy.to(dtype), u.to(dtype)
        dx, dtaps, dbias = backward(dy, x.to(dtype), u, wide, bias, cu_seqlens, causal, silu, want_x, want_taps)
        return dx.to(x.dtype), dtaps.to(taps.dtype), dbias
    before = u if silu else None
    with ready_for(x):
        dx, dtaps, dbias = launch.backward(
            dy, x, taps, cu_seqlens, causal, want_x, want_taps, want_bias=bias is not None, u=before
        )
    return dx, dtaps, dbias if bias is None else dbias.to(bias.dtype)


forward_op = torch.library.custom_op(
    _NAME,
    forward,
    mutates_args=(),
    schema="(Tensor x, Tensor taps, Tensor? bias, Tensor? cu_seqlens, bool causal, bool silu, bool save) -> "
    "(Tensor, Tensor)",
)
backward_op = torch.library.custom_op(
    f"{_NAME}_backward",
    backward,
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor u, Tensor taps, Tensor? bias, Tensor? cu_seqlens, bool causal, bool silu, "
    "bool want_x, bool want_taps) -> (Tensor, Tensor, Tensor)",
)


@forward_op.register_fake
def _forward_fake(x, taps, bias, cu_seqlens, causal, silu, save):
    return launch.empty_like(x), launch.empty_like(x) if silu and save else x.new_empty(0)


@backward_op.register_fake
def _backward_fake(dy, x, u, taps, bias, cu_seqlens, causal, silu, want_x, want_taps):
    dx = launch.empty_like(x) if want_x else taps.new_empty(0)
    dtaps = taps.new_empty(taps.shape) if want_taps else taps.new_empty(0)
    return dx, dtaps, dy.new_empty(0) if bias is None else bias.new_empty(bias.shape)


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.causal, ctx.silu, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx, dy, _du, run=backward_op):
    x, taps, bias, cu_seqlens, u = ctx.saved_tensors
    want_x, want_taps, want_bias, *_ = ctx.needs_input_grad
    bias = bias if want_bias else None
    dx, dtaps, dbias = run(dy, x, u, taps, bias, cu_seqlens, ctx.causal, ctx.silu, want_x, want_taps)
    gradients = dx if want_x else None, dtaps if want_taps else None, dbias if want_bias else None
    return *gradients, None, None, None, None


forward_op.register_autograd(_gradient, setup_context=_setup)


class Eager(torch.autograd.Function):
    """The same for a call that nothing records."""

    @staticmethod
    def forward(ctx, x, taps, bias, cu_seqlens, causal, silu):
        y, u = forward(x, taps, bias, cu_seqlens, causal, silu, True)
        ctx.causal, ctx.silu = causal, silu
        ctx.save_for_backward(x, taps, bias, cu_seqlens, u)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _gradient(ctx, dy, None, backward_op if traced(dy) else backward)[:6]
