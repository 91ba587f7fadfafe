"""Causal linear attention with a decay for every key channel (GLA, arXiv:2312.06635): plain PyTorch, or fla.

For one decay a head, or none, `kernels.linear_attention` is the faster op.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chela_plugin.kernels.gated import check_state, scale_or_default
from chela_plugin.kernels.gated_linear_attention import reference
from chela_plugin.kernels.peers import peer
from chela_plugin.kernels.precision import at_least_fp32, without_autocast
from chela_plugin.kernels.untraced import compiling

__all__ = ["backend", "gated_linear_attention", "gated_linear_attention_step"]


def backend(device: torch.device | str, dtype: torch.dtype) -> str:
    """What computes inputs of `dtype` on `device`: 'fla' (its chunk_gla) or 'reference'. Single steps are plain."""
    return "reference" if peer("chunk_gla", device, dtype) is None else "fla"


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`S_t = Diag(exp(log_decay_t)) S_(t-1) + k_t v_t^T`, `o_t = scale * S_t^T q_t`.

    Args:
        q, k: `[B, T, H, K]`, T at least 1.
        v: `[B, T, H, V]`.
        log_decay: `[B, T, H, K]`, at most 0 (not checked: that would wait for the device), natural logarithm.
        scale: of the queries; `K^-0.5` when None.
        initial_state: `[B, H, K, V]`; zeros when None.
        output_final_state: return the state behind the last token.

    Returns `(o [B, T, H, V] in v's dtype, state [B, H, K, V] in fp32, or fp64 if an input is, or None)`. Computed in
    the state's precision whatever autocast says; differentiable in every tensor. fp16 and bf16 on a CUDA device go
    through fla's chunk_gla where it is installed: states and sums in fp32, products of 16-bit operands. An input of
    zeros in k and log_decay leaves the state as it was, which is how padding is left out.

    Raises ValueError for shapes that don't fit.
    """
    if q.dim() != 4 or q.shape[1] == 0 or q.shape != k.shape or log_decay.shape != k.shape:
        raise ValueError(
            "q, k and log_decay must have one shape [B, T, H, K] with T >= 1, got "
            f"{list(q.shape)}, {list(k.shape)} and {list(log_decay.shape)}"
        )
    if v.dim() != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v must be [B, T, H, V] = {[*k.shape[:3], 'V']}, got {list(v.shape)}")
    check_state(initial_state, k[:, 0], v[:, 0])
    if compiling():
        from . import ops

        o, state = ops.forward_op(q, k, v, log_decay, initial_state, scale_or_default(scale, k))
        return o, state if output_final_state else None
    chunk_gla = peer("chunk_gla", q.device, q.dtype) if q.dtype == k.dtype == v.dtype else None
    with without_autocast(q):
        if chunk_gla is not None:
            first = None if initial_state is None else initial_state.float()
            return chunk_gla(q, k, v, log_decay.float(), scale_or_default(scale, k), first, output_final_state)
        q_, k_, v_, g_, state = at_least_fp32(q, k, v, log_decay, initial_state)
        o, state = reference.chunked(q_, k_, v_, g_, scale=scale_or_default(scale, k), initial_state=state)
    return o.to(v.dtype), state if output_final_state else None


def gated_linear_attention_step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One token: q, k, log_decay `[B, H, K]`, v `[B, H, V]`, state `[B, H, K, V]`. Returns `(o [B, H, V], state)`."""
    if q.dim() != 3 or q.shape != k.shape or log_decay.shape != k.shape or v.shape[:2] != k.shape[:2]:
        raise ValueError(
            "a step takes q, k and log_decay [B, H, K] and v [B, H, V], got "
            f"{list(q.shape)}, {list(k.shape)}, {list(log_decay.shape)} and {list(v.shape)}"
        )
    check_state(state, k, v)
    with without_autocast(q):
        q_, k_, v_, s_, g_ = at_least_fp32(q, k, v, state, log_decay)
        o, state = reference.step(q_, k_, v_, s_, g_, scale=scale_or_default(scale, k))
    return o.to(v.dtype), state
