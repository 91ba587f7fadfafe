"""The modal filters' kernels as torch operators.

    chela::modal_conv            y, and what the backward pass wants: u before its SiLU, the states at chunks' starts
    chela::modal_conv_backward   gradients of x, log_time, frequency, residue, short, scale and bias

An operator returns an empty tensor for what there is none of. Arguments are what `modal_conv` has checked; the schemas
below say their types. Outside traces a call goes through `Eager`, whose host time is a fraction of the operators'.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from chela_plugin.kernels.backend import multiplied_as, ready_for, traced

from . import launch_modal as launch

_NAME = "chela::modal_conv"
_FILTER = "Tensor log_time, Tensor frequency, Tensor residue, Tensor? short, Tensor? scale, Tensor? bias"


def forward(x, log_time, frequency, residue, short, scale, bias, cu_seqlens, silu, save):
    f = launch.Filter(log_time, frequency, residue, short, scale, bias)
    with ready_for(x):
        y, u, states = launch.forward(x.to(multiplied_as(x)), f, cu_seqlens, silu, save)
    return y.to(x.dtype), u, states


def backward(dy, x, u, states, log_time, frequency, residue, short, scale, bias, cu_seqlens, silu):
    f, computed = launch.Filter(log_time, frequency, residue, short, scale, bias), multiplied_as(x)
    with ready_for(x):
        dx, *rest = launch.backward(dy.to(computed), x.to(computed), u, states, f, cu_seqlens, silu)
    return dx.to(x.dtype), *(x.new_empty(0) if t is None else t for t in rest)


forward_op = torch.library.custom_op(
    _NAME,
    forward,
    mutates_args=(),
    schema=f"(Tensor x, {_FILTER}, Tensor? cu_seqlens, bool silu, bool save) -> (Tensor, Tensor, Tensor)",
)
backward_op = torch.library.custom_op(
    f"{_NAME}_backward",
    backward,
    mutates_args=(),
    schema=f"(Tensor dy, Tensor x, Tensor u, Tensor states, {_FILTER}, Tensor? cu_seqlens, bool silu) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@forward_op.register_fake
def _forward_fake(x, log_time, frequency, residue, short, scale, bias, cu_seqlens, silu, save):
    computed = x.new_empty(x.shape, dtype=multiplied_as(x))
    u = computed if save and silu else computed.new_empty(0)
    states = launch.saved_states(computed, log_time, cu_seqlens) if save else computed.new_empty(0)
    return x.new_empty(x.shape), u, states


@backward_op.register_fake
def _backward_fake(dy, x, u, states, log_time, frequency, residue, short, scale, bias, cu_seqlens, silu):
    rest = (log_time, frequency, residue, short, scale, bias)
    return x.new_empty(x.shape), *(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in rest)


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.silu, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else zeros of u's size are written for it each time


def _gradient(ctx, dy, _du, _dstates, run=backward_op):
    if dy is None:
        return (None,) * 10
    *tensors, u, states = ctx.saved_tensors
    x, *rest = tensors
    found = run(dy, x, u, states, *rest, ctx.silu)
    wanted = zip(found, ctx.needs_input_grad, strict=False)
    return *(gradient if want else None for gradient, want in wanted), None, None, None


forward_op.register_autograd(_gradient, setup_context=_setup)


class Eager(torch.autograd.Function):
    """The same for a call that nothing records."""

    @staticmethod
    def forward(ctx, *arguments):
        *tensors, ctx.silu = arguments
        y, u, states = forward(*arguments, True)
        ctx.save_for_backward(*tensors, u, states)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _gradient(ctx, dy, None, None, backward_op if traced(dy) else backward)[:9]
