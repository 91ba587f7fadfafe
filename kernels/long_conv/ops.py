"""The Triton kernels as torch operators: `torch.compile` and `torch.export` see one node, autograd its gradient.

    chela::long_conv            y
    chela::long_conv_backward   gradients of x, taps and bias (`[0]` for what is not wanted)

Arguments are what `long_conv` has checked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chela_plugin.kernels.backend import multiplied_as, ready_for

from . import launch

_NAME = "chela::long_conv"


def forward(x: Tensor, taps: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, causal: bool) -> Tensor:
    if (dtype := multiplied_as(x)) != x.dtype:
        return forward(x.to(dtype), taps.to(x.dtype).to(dtype), bias, cu_seqlens, causal).to(x.dtype)
    with ready_for(x):
        return launch.forward(x, taps, bias, cu_seqlens, causal)


def backward(
    dy: Tensor,
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool,
    want_x: bool,
    want_taps: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if (dtype := multiplied_as(x)) != x.dtype:
        wide_taps = taps.to(x.dtype).to(dtype)
        dx, dtaps, dbias = backward(dy.to(dtype), x.to(dtype), wide_taps, bias, cu_seqlens, causal, want_x, want_taps)
        return dx.to(x.dtype), dtaps.to(taps.dtype), dbias
    with ready_for(x):
        dx, dtaps = launch.backward(dy, x, taps, cu_seqlens, causal, want_x, want_taps)
        dbias = dy.new_empty(0) if bias is None else dy.sum((0, 1), dtype=torch.float32).to(bias.dtype)
    return dx, dtaps, dbias


forward_op = torch.library.custom_op(
    _NAME,
    forward,
    mutates_args=(),
    schema="(Tensor x, Tensor taps, Tensor? bias, Tensor? cu_seqlens, bool causal) -> Tensor",
)
backward_op = torch.library.custom_op(
    f"{_NAME}_backward",
    backward,
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor taps, Tensor? bias, Tensor? cu_seqlens, bool causal, bool want_x, "
    "bool want_taps) -> (Tensor, Tensor, Tensor)",
)


@forward_op.register_fake
def _forward_fake(x, taps, bias, cu_seqlens, causal):
    return launch.empty_like(x)


@backward_op.register_fake
def _backward_fake(dy, x, taps, bias, cu_seqlens, causal, want_x, want_taps):
    dx = launch.empty_like(x) if want_x else taps.new_empty(0)
    dtaps = taps.new_empty(taps.shape) if want_taps else taps.new_empty(0)
    return dx, dtaps, dy.new_empty(0) if bias is None else bias.new_empty(bias.shape)


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.causal = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx, dy):
    x, taps, bias, cu_seqlens = ctx.saved_tensors
    want_x, want_taps, want_bias, *_ = ctx.needs_input_grad
    bias = bias if want_bias else None
    dx, dtaps, dbias = backward_op(dy, x, taps, bias, cu_seqlens, ctx.causal, want_x, want_taps)
    return dx if want_x else None, dtaps if want_taps else None, dbias if want_bias else None, None, None


forward_op.register_autograd(_gradient, setup_context=_setup)
