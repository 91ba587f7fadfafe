"""The Triton kernels as torch operators: `torch.compile` and `torch.export` see one node, autograd its gradient.

    chela::linear_attention            o, final state, states kept for the backward pass
    chela::linear_attention_backward   gradients of q, k, v, log_decay and initial_state
    chela::linear_attention_step       o, new state; without a gradient

An operator returns an empty tensor for what there is none of; the functions under it return None. Outside traces a
call goes round the dispatcher, to these functions or through `Eager`: it costs more host time than the launches.
Arguments are what `check_inputs` has passed, with widths that fill whole 16-byte rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from chela_plugin.kernels.backend import multiplied_as, ready_for, traced

from . import launch

_NAME = "chela::linear_attention"
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? initial_state, Tensor? cu_seqlens, Tensor? mask"


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    want_state: bool,
    save: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    dtype = q.dtype
    computed = multiplied_as(q)
    if computed != dtype:  # `to` costs half a microsecond a tensor where it does nothing
        q, k, v = q.to(computed), k.to(computed), v.to(computed)
    want_state = want_state or (save and log_decay is None)
    with ready_for(q):
        if causal:
            o, state, saved = launch.causal_forward(
                q, k, v, log_decay, initial_state, cu_seqlens, scale, want_state, save
            )
        else:
            o, state = launch.bidirectional_forward(q, k, v, initial_state, cu_seqlens, mask, scale, want_state)
            saved = None
    return o if computed == dtype else o.to(dtype), state, saved


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    state: Tensor | None,
    saved: Tensor | None,
    do: Tensor,
    dstate: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    dtype = q.dtype
    computed = multiplied_as(q)
    if computed != dtype:
        q, k, v, do = q.to(computed), k.to(computed), v.to(computed), do.to(computed)
    with ready_for(q):
        if causal:
            dq, dk, dv, ddecay, dinitial = launch.causal_backward(
                q, k, v, log_decay, initial_state, cu_seqlens, state, saved, do, dstate, scale
            )
        else:
            assert state is not None
            dq, dk, dv, dinitial = launch.bidirectional_backward(
                q, k, v, initial_state, cu_seqlens, mask, state, do, dstate, scale
            )
            ddecay = None
    if computed != dtype:
        dq, dk, dv = dq.to(dtype), dk.to(dtype), dv.to(dtype)
    return dq, dk, dv, ddecay, dinitial


def step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor | None, scale: float, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    dtype = q.dtype
    computed = multiplied_as(q)
    if computed != dtype:
        q, k, v = q.to(computed), k.to(computed), v.to(computed)
    with ready_for(q):
        o, state = launch.step(q, k, v, state, log_decay, scale, in_place)
    return o if computed == dtype else o.to(dtype), state


def _filled(outputs: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """With an empty tensor for None: an operator's outputs are tensors."""
    first = outputs[0]
    assert first is not None
    return tuple(first.new_empty(0, dtype=torch.float32) if x is None else x for x in outputs)


forward_op = torch.library.custom_op(
    _NAME,
    lambda *args: _filled(forward(*args)),
    mutates_args=(),
    schema=f"({_INPUTS}, float scale, bool causal, bool want_state, bool save) -> (Tensor, Tensor, Tensor)",
)
backward_op = torch.library.custom_op(
    f"{_NAME}_backward",
    lambda *args: _filled(backward(*args)),
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor? state, Tensor? saved, Tensor do, Tensor? dstate, float scale, bool causal)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
step_op = torch.library.custom_op(
    f"{_NAME}_step",
    step,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor state, Tensor? log_decay, float scale) -> (Tensor, Tensor)",
)


@forward_op.register_fake
def _forward_fake(q, k, v, log_decay, initial_state, cu_seqlens, mask, scale, causal, want_state, save):
    batch, time, heads, K = q.shape
    V = v.shape[3]
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = saved = None
    if want_state or (save and log_decay is None):
        state = q.new_empty(rows, heads, K, V, dtype=torch.float32)
    if causal and save:
        size = launch.causal_segment_size(q, v, cu_seqlens, launch.kind_of(log_decay))
        segments = launch.count_segments(q, cu_seqlens, size)
        if segments != rows:
            saved = q.new_empty(segments, heads, K, V, dtype=torch.float32)
    return _filled((q.new_empty(batch, time, heads, V), state, saved))


@backward_op.register_fake
def _backward_fake(q, k, v, log_decay, initial_state, cu_seqlens, mask, state, saved, do, dstate, scale, causal):
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    ddecay = None if log_decay is None else log_decay.new_empty(log_decay.shape)
    return _filled(
        (dq, dk, dv, ddecay, None if initial_state is None else initial_state.new_empty(initial_state.shape))
    )


@step_op.register_fake
def _step_fake(q, k, v, state, log_decay, scale):
    return q.new_empty(v.shape), state.new_empty(state.shape)


def _setup(ctx, inputs, output) -> None:
    *tensors, scale, causal, _want_state, _save = inputs
    _o, state, saved = (x if x.numel() else None for x in output)
    _keep(ctx, tensors, scale, causal, state, saved)


def _keep(ctx, tensors, scale, causal, state, saved) -> None:
    ctx.save_for_backward(*tensors, state, saved)
    ctx.scale, ctx.causal = scale, causal
    ctx.set_materialize_grads(False)


def _gradient(ctx, do, dstate, _dsaved=None, run=backward_op):
    q, k, v, log_decay, initial_state, *rest = ctx.saved_tensors
    if do is None and dstate is None:
        return (None,) * 11
    if do is None:
        do = v.new_zeros(v.shape)
    dq, dk, dv, ddecay, dinitial = run(q, k, v, log_decay, initial_state, *rest, do, dstate, ctx.scale, ctx.causal)
    ddecay = None if log_decay is None else ddecay
    dinitial = None if initial_state is None else dinitial
    return dq, dk, dv, ddecay, dinitial, None, None, None, None, None, None


forward_op.register_autograd(_gradient, setup_context=_setup)


class Eager(torch.autograd.Function):
    """`(o, final state or None)` with gradients, for a call that nothing records."""

    @staticmethod
    def forward(ctx, *arguments):
        *tensors, scale, causal, want_state = arguments
        o, state, saved = forward(*arguments, True)
        _keep(ctx, tensors, scale, causal, state, saved)
        return o, state if want_state else None

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dstate):
        return _gradient(ctx, do, dstate, run=backward_op if traced(do if dstate is None else dstate) else backward)[
            :10
        ]
