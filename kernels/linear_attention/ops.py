"""The Triton kernels as torch operators: `torch.compile` and `torch.export` see one node, autograd its gradient.

    chela::linear_attention            o, final state, states kept for the backward pass (`[0]` where there are none)
    chela::linear_attention_backward   gradients of q, k, v, log_decay and initial_state (`[0]` where not given)
    chela::linear_attention_step       o, new state; without a gradient

Arguments are what `check_inputs` has passed, with widths that fill whole 16-byte rows.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

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
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = q.dtype
    q, k, v = _interpretable(q), _interpretable(k), _interpretable(v)
    want_state = want_state or (save and log_decay is None)
    with _on(q):
        if causal:
            o, state, saved = launch.causal_forward(
                q, k, v, log_decay, initial_state, cu_seqlens, scale, want_state, save
            )
        else:
            o, state = launch.bidirectional_forward(q, k, v, initial_state, cu_seqlens, mask, scale, want_state)
            saved = state.new_empty(0)
    return o.to(dtype), state, saved


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    state: Tensor,
    saved: Tensor,
    do: Tensor,
    dstate: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = q.dtype
    decay_dtype = dtype if log_decay is None else log_decay.dtype
    q, k, v, do = _interpretable(q), _interpretable(k), _interpretable(v), _interpretable(do)
    with _on(q):
        if causal:
            dq, dk, dv, ddecay, dinitial = launch.causal_backward(
                q, k, v, log_decay, initial_state, cu_seqlens, state, saved, do, dstate, scale
            )
        else:
            dq, dk, dv, dinitial = launch.bidirectional_backward(
                q, k, v, initial_state, cu_seqlens, mask, state, do, dstate, scale
            )
            ddecay = dinitial.new_empty(0)
    if log_decay is not None:
        ddecay = ddecay.to(decay_dtype)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype), ddecay, dinitial


def step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    dtype = q.dtype
    q, k, v = _interpretable(q), _interpretable(k), _interpretable(v)
    with _on(q):
        o, state = launch.step(q, k, v, state, log_decay, scale)
    return o.to(dtype), state


forward_op = torch.library.custom_op(
    _NAME,
    forward,
    mutates_args=(),
    schema=f"({_INPUTS}, float scale, bool causal, bool want_state, bool save) -> (Tensor, Tensor, Tensor)",
)
backward_op = torch.library.custom_op(
    f"{_NAME}_backward",
    backward,
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor state, Tensor saved, Tensor do, Tensor? dstate, float scale, bool causal)"
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
    state = (rows, heads, K, V) if want_state or (save and log_decay is None) else (0,)
    saved = (0,)
    if causal and save:
        size = launch.causal_segment_size(q, v, cu_seqlens, log_decay is not None)
        segments = launch.count_segments(q, cu_seqlens, size)
        saved = (segments, heads, K, V) if segments != rows else (0,)
    kept = q.new_empty(saved, dtype=torch.float32)
    return q.new_empty(batch, time, heads, V), q.new_empty(state, dtype=torch.float32), kept


@backward_op.register_fake
def _backward_fake(q, k, v, log_decay, initial_state, cu_seqlens, mask, state, saved, do, dstate, scale, causal):
    ddecay = q.new_empty(0) if log_decay is None else torch.empty_like(log_decay, memory_format=torch.contiguous_format)
    dinitial = q.new_empty(0 if initial_state is None else initial_state.shape, dtype=torch.float32)
    if log_decay is None:
        ddecay = ddecay.to(torch.float32)
    return *(x.new_empty(x.shape) for x in (q, k, v)), ddecay, dinitial


@step_op.register_fake
def _step_fake(q, k, v, state, log_decay, scale):
    return q.new_empty(v.shape), state.new_empty(state.shape)


def _setup(ctx, inputs, output) -> None:
    q, k, v, log_decay, initial_state, cu_seqlens, mask, scale, causal, _want_state, _save = inputs
    _o, state, saved = output
    ctx.save_for_backward(q, k, v, log_decay, initial_state, cu_seqlens, mask, state, saved)
    ctx.scale, ctx.causal = scale, causal
    ctx.set_materialize_grads(False)


def _gradient(ctx, do, dstate, _dsaved):
    q, k, v, log_decay, initial_state, *rest = ctx.saved_tensors
    if do is None and dstate is None:
        return (None,) * 11
    if do is None:
        do = v.new_zeros(v.shape)
    dq, dk, dv, ddecay, dinitial = backward_op(
        q, k, v, log_decay, initial_state, *rest, do, dstate, ctx.scale, ctx.causal
    )
    ddecay = None if log_decay is None else ddecay
    dinitial = None if initial_state is None else dinitial
    return dq, dk, dv, ddecay, dinitial, None, None, None, None, None, None


forward_op.register_autograd(_gradient, setup_context=_setup)


def _interpretable(x: Tensor) -> Tensor:
    """bf16 as fp32 on a CPU: Triton's interpreter runs on numpy, which has no bf16, and would multiply bit patterns."""
    return x if x.is_cuda or x.dtype != torch.bfloat16 else x.float()


def _on(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
