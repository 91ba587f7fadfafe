"""The Triton kernels as torch operators, and as nodes of autograd for calls that nothing records.

    chela::grid_conv            y, and u before its SiLU where the backward pass wants it
    chela::grid_conv_backward   gradients of x, short, cross, scale and bias

An operator returns an empty tensor for what there is none of. Arguments are what `grid_conv` has checked.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from chela_plugin.kernels.backend import ready_for, traced

from . import launch

_NAME = "chela::grid_conv"
_TAPS = "Tensor? short, Tensor? cross, Tensor? scale, Tensor? bias"


def forward(x, short, cross, scale, bias, silu, save):
    x = x.contiguous()
    u = torch.empty_like(x) if silu and save else x.new_empty(0)
    with ready_for(x):
        return launch.forward(x, short, cross, scale, bias, silu, u if silu and save else None), u


def backward(dy, x, u, short, cross, scale, bias, silu, want_x, want_taps):
    """Gradients in the order of the arguments; None for what was not asked for or is not there."""
    x, dy = x.contiguous(), dy.contiguous()
    if silu:
        dy = torch.ops.aten.silu_backward(dy, u)
    with ready_for(x):
        shorts = [] if short is None else [short]
        dx, dshorts, *gradients = launch.backward(dy[None], x, shorts, cross, scale, want_x, want_taps)
    dbias = dy.sum((0, 1, 2), dtype=torch.float32).to(bias.dtype) if bias is not None and want_taps else None
    return dx, dshorts[0] if dshorts else None, *gradients, dbias


def _backward(dy, *rest):
    return tuple(dy.new_empty(0) if t is None else t for t in backward(dy, *rest))


forward_op = torch.library.custom_op(
    _NAME, forward, mutates_args=(), schema=f"(Tensor x, {_TAPS}, bool silu, bool save) -> (Tensor, Tensor)"
)
backward_op = torch.library.custom_op(
    f"{_NAME}_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor dy, Tensor x, Tensor u, {_TAPS}, bool silu, bool want_x, bool want_taps) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def _dense(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@forward_op.register_fake
def _forward_fake(x, short, cross, scale, bias, silu, save):
    return _dense(x), _dense(x) if silu and save else x.new_empty(0)


@backward_op.register_fake
def _backward_fake(dy, x, u, short, cross, scale, bias, silu, want_x, want_taps):
    taps = (_dense(t) if t is not None and want_taps else dy.new_empty(0) for t in (short, cross, scale, bias))
    return _dense(x) if want_x else dy.new_empty(0), *taps


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.silu, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx, dy, _du=None, run=backward_op):
    *tensors, u = ctx.saved_tensors
    want_x, *want_taps = ctx.needs_input_grad[:5]
    gradients = run(dy, tensors[0], u, *tensors[1:], ctx.silu, want_x, any(want_taps))
    return *(g if wanted else None for g, wanted in zip(gradients, ctx.needs_input_grad, strict=False)), None, None


forward_op.register_autograd(_gradient, setup_context=_setup)


class Eager(torch.autograd.Function):
    """The same for a call that nothing records, at a fraction of the operators' host time."""

    @staticmethod
    def forward(ctx, x, short, cross, scale, bias, silu):
        y, u = forward(x, short, cross, scale, bias, silu, True)
        ctx.silu = silu
        ctx.save_for_backward(x, short, cross, scale, bias, u)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _gradient(ctx, dy, run=backward_op if traced(dy) else backward)[:6]


class Normed(torch.autograd.Function):
    """`grid_conv_norm`, eager: arguments (x, cross, shorts, running, momentum, eps, silu, *shorts, *weights, *biases).

    Tensors in lists would get no gradient, so they come last, one by one.
    """

    @staticmethod
    def forward(ctx, x, cross, shorts: int, running, momentum, eps, silu, *tensors):
        x = x.contiguous()
        branches = (len(tensors) - shorts) // 2
        kernels, weights, biases = tensors[:shorts], tensors[shorts : shorts + branches], tensors[shorts + branches :]
        with ready_for(x):
            z, y, state, taps = launch.forward_norm(x, kernels, cross, weights, biases, running, momentum, eps, silu)
        ctx.silu, ctx.shorts, ctx.dtypes = silu, shorts, [t.dtype for t in (*weights, *biases)]
        ctx.save_for_backward(x, y, state, taps, cross, *kernels)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx, dz):
        x, y, state, taps, cross, *kernels = ctx.saved_tensors
        with ready_for(x):
            dx, dshorts, dcross, sums = launch.backward_norm(
                dz.contiguous(), x, y, state, taps, kernels, cross, ctx.silu
            )
        norms = [g.to(dtype) for g, dtype in zip(sums.unbind(0), ctx.dtypes, strict=True)]
        return dx, dcross, None, None, None, None, None, *dshorts, *norms
