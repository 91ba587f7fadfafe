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
from chela_plugin.kernels.folded_taps import launch as folding
from chela_plugin.kernels.folded_taps.ops import backward_op as folding_op

from . import launch_modal as launch

_NAME = "chela::modal_conv"
_FILTER = "Tensor log_time, Tensor frequency, Tensor residue, Tensor? short, Tensor? scale, Tensor? bias"


def forward(x, log_time, frequency, residue, short, scale, bias, cu_seqlens, silu, causal, save):
    f = launch.Filter(log_time, frequency, residue, short, scale, bias)
    with ready_for(x):
        y, u, states, _ = launch.forward(x.to(multiplied_as(x)), f, cu_seqlens, silu, causal, save)
    return y.to(x.dtype), u, states


def backward(dy, x, u, states, log_time, frequency, residue, short, scale, bias, cu_seqlens, silu, causal, sides=None):
    f, computed = launch.Filter(log_time, frequency, residue, short, scale, bias), multiplied_as(x)
    with ready_for(x):
        dx, *rest = launch.backward(dy.to(computed), x.to(computed), u, states, f, cu_seqlens, silu, causal, sides)
    if rest[4] is not None:
        rest[4] = rest[4].sum(1).to(scale.dtype)
    return dx.to(x.dtype), *(x.new_empty(0) if t is None else t for t in rest)


forward_op = torch.library.custom_op(
    _NAME,
    forward,
    mutates_args=(),
    schema=f"(Tensor x, {_FILTER}, Tensor? cu_seqlens, bool silu, bool causal, bool save) -> (Tensor, Tensor, Tensor)",
)


def _apart(*arguments):
    """The same for an operator, whose outputs may not be views of one tensor."""
    *rest, dshort, dscale, dbias = backward(*arguments)
    return *rest, dshort.clone(), dscale, dbias.clone()


backward_op = torch.library.custom_op(
    f"{_NAME}_backward",
    _apart,
    mutates_args=(),
    schema=f"(Tensor dy, Tensor x, Tensor u, Tensor states, {_FILTER}, Tensor? cu_seqlens, bool silu, bool causal) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@forward_op.register_fake
def _forward_fake(x, log_time, frequency, residue, short, scale, bias, cu_seqlens, silu, causal, save):
    computed = x.new_empty(x.shape, dtype=multiplied_as(x))
    u = computed if save and silu else computed.new_empty(0)
    states = launch.saved_states(computed, log_time, cu_seqlens, causal) if save else computed.new_empty(0)
    return x.new_empty(x.shape), u, states


@backward_op.register_fake
def _backward_fake(dy, x, u, states, log_time, frequency, residue, short, scale, bias, cu_seqlens, silu, causal):
    rest = (log_time, frequency, residue, short, scale, bias)
    return x.new_empty(x.shape), *(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in rest)


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.silu, ctx.causal, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else zeros of u's size are written for it each time


def _gradient(ctx, dy, _du, _dstates, run=backward_op, **more):
    if dy is None:
        return (None,) * 10
    *tensors, u, states = ctx.saved_tensors
    x, *rest = tensors
    found = run(dy, x, u, states, *rest, ctx.silu, ctx.causal, **more)
    wanted = zip(found, ctx.needs_input_grad, strict=False)
    return *(gradient if want else None for gradient, want in wanted), None, None, None, None


forward_op.register_autograd(_gradient, setup_context=_setup)


class Eager(torch.autograd.Function):
    """The same for a call that nothing records; the filter's matrices are made once for both passes."""

    @staticmethod
    def forward(ctx, *arguments):
        x, *filter_, cu_seqlens, ctx.silu, ctx.causal = arguments
        with ready_for(x):
            y, u, states, ctx.sides = launch.forward(
                x.to(multiplied_as(x)), launch.Filter(*filter_), cu_seqlens, ctx.silu, ctx.causal, True
            )
        ctx.save_for_backward(x, *filter_, cu_seqlens, u, states)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        if traced(dy):
            return _gradient(ctx, dy, None, None)[:10]
        return _gradient(ctx, dy, None, None, backward, sides=ctx.sides)[:10]


class Branches(torch.autograd.Function):
    """`short_modal_conv` for a call that nothing records: the short kernels are folded here, so that a layer is one
    node of autograd and no gradient is summed twice."""

    @staticmethod
    def forward(ctx, x, log_time, frequency, residue, scales, bias, silu, causal, *kernels):
        with ready_for(x):
            widest = max(kernel.shape[1] for kernel in kernels)
            ctx.length = widest if causal else (widest + 1) // 2
            short = folding.forward(None, None, kernels, scales, ctx.length, causal)
            f = launch.Filter(log_time, frequency, residue, short, scales[-1], bias)
            y, u, states, ctx.sides = launch.forward(x.to(multiplied_as(x)), f, None, silu, causal, True)
        ctx.silu, ctx.causal = silu, causal
        ctx.save_for_backward(x, u, states, log_time, frequency, residue, short, scales, bias, *kernels)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, u, states, log_time, frequency, residue, short, scales, bias, *kernels = ctx.saved_tensors
        scale = scales[-1]
        if traced(dy):
            dx, *poles, dshort, dscale, dbias = backward_op(
                dy, x, u, states, log_time, frequency, residue, short, scale, bias, None, ctx.silu, ctx.causal
            )
            *_, dscales, dkernels = folding_op(dshort, None, None, scales, kernels, ctx.length, ctx.causal)
            dscales = torch.cat([dscales[:-1], dscale[None]])
            return dx, *poles, dscales, None if bias is None else dbias, None, None, *dkernels
        f, computed = launch.Filter(log_time, frequency, residue, short, scale, bias), multiplied_as(x)
        with ready_for(x):
            dx, *poles, dshort, shares, dbias = launch.backward(
                dy.to(computed), x.to(computed), u, states, f, None, ctx.silu, ctx.causal, ctx.sides
            )
            *_, dkernels, dscales = folding.backward(
                dshort, None, None, kernels, scales, ctx.length, ctx.causal, shares
            )
        return dx.to(x.dtype), *poles, dscales, dbias, None, None, *dkernels
