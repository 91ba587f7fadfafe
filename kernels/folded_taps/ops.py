"""The Triton kernels as torch operators.

    chela::folded_taps            taps
    chela::folded_taps_backward   gradients of source, ratio_logit, scales (`[0]` for what is not given), then of the
                                  short kernels

Arguments are what `folded_taps` has checked. Outside traces a call goes through `Eager`, whose host time is a fraction
of the operators'.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from chela_plugin.kernels.backend import ready_for, traced

from . import launch

_NAME = "chela::folded_taps"
_ARGUMENTS = "Tensor? source, Tensor? ratio_logit, Tensor? scales, Tensor[] kernels, SymInt length, bool causal"


def forward(source, ratio_logit, scales, kernels, length, causal):
    with ready_for(next(t for t in (source, scales, *kernels) if t is not None)):
        return launch.forward(source, ratio_logit, kernels, scales, length, causal)


def backward(dtaps, source, ratio_logit, scales, kernels, length, causal):
    with ready_for(dtaps):
        dsource, dratio, dkernels, dscales = launch.backward(
            dtaps, source, ratio_logit, kernels, scales, length, causal
        )
    return dsource, dratio, dscales, dkernels


def _backward(dtaps, source, ratio_logit, scales, kernels, length, causal):
    *rest, dkernels = backward(dtaps, source, ratio_logit, scales, kernels, length, causal)
    # An operator's outputs may not be views of one another.
    return *(dtaps.new_empty(0) if t is None else t for t in rest), [t.clone() for t in dkernels]


forward_op = torch.library.custom_op(_NAME, forward, mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor")
backward_op = torch.library.custom_op(
    f"{_NAME}_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor dtaps, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor[])",
)


@forward_op.register_fake
def _forward_fake(source, ratio_logit, scales, kernels, length, causal):
    first = next(t for t in (source, scales, *kernels) if t is not None)
    channels = launch.channels_of(source, kernels, scales, causal)
    return first.new_empty(channels, length if causal else 2 * length - 1, dtype=torch.float32)


@backward_op.register_fake
def _backward_fake(dtaps, source, ratio_logit, scales, kernels, length, causal):
    rest = (dtaps.new_empty(0) if t is None else torch.empty_like(t) for t in (source, ratio_logit, scales))
    return *rest, [torch.empty_like(t) for t in kernels]


def _setup(ctx, inputs, output) -> None:
    source, ratio_logit, scales, kernels, ctx.length, ctx.causal = inputs
    ctx.save_for_backward(source, ratio_logit, scales, *kernels)


def _gradient(ctx, dtaps):
    source, ratio_logit, scales, *kernels = ctx.saved_tensors
    *rest, dkernels = backward_op(dtaps, source, ratio_logit, scales, kernels, ctx.length, ctx.causal)
    given = zip(rest, (source, ratio_logit, scales), strict=True)
    return *(None if t is None else gradient for gradient, t in given), dkernels, None, None


forward_op.register_autograd(_gradient, setup_context=_setup)


class Eager(torch.autograd.Function):
    """The same for a call that nothing records: arguments (length, causal, source, ratio_logit, scales, *kernels)."""

    @staticmethod
    def forward(ctx, length, causal, source, ratio_logit, scales, *kernels):
        ctx.save_for_backward(source, ratio_logit, scales, *kernels)
        ctx.length, ctx.causal = length, causal
        return forward(source, ratio_logit, scales, kernels, length, causal)

    @staticmethod
    @once_differentiable
    def backward(ctx, dtaps: Tensor):
        source, ratio_logit, scales, *kernels = ctx.saved_tensors
        run = _recorded if traced(dtaps) else backward
        *rest, dkernels = run(dtaps, source, ratio_logit, scales, kernels, ctx.length, ctx.causal)
        return None, None, *rest, *dkernels


def _recorded(dtaps, source, ratio_logit, scales, kernels, length, causal):
    *rest, dkernels = backward_op(dtaps, source, ratio_logit, scales, kernels, length, causal)
    given = zip(rest, (source, ratio_logit, scales), strict=True)
    return *(None if t is None else gradient for gradient, t in given), dkernels
