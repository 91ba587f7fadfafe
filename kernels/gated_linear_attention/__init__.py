"""Causal linear attention with a decay for every key channel (GLA, arXiv:2312.06635), in plain PyTorch.

For one decay a head, or none, `kernels.linear_attention` is the faster op.
"""

from __future__ import annotations

from torch import Tensor

from chela_plugin.kernels.gated_linear_attention import reference
from chela_plugin.kernels.precision import at_least_fp32, without_autocast

__all__ = ["gated_linear_attention", "gated_linear_attention_step"]


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
    the state's precision whatever autocast says; differentiable in every tensor. An input of zeros in k and
    log_decay leaves the state as it was, which is how padding is left out.

    Raises ValueError for shapes that don't fit.
    """
    if q.dim() != 4 or q.shape[1] == 0 or q.shape != k.shape or log_decay.shape != k.shape:
        raise ValueError(
            "q, k and log_decay must have one shape [B, T, H, K] with T >= 1, got "
            f"{list(q.shape)}, {list(k.shape)} and {list(log_decay.shape)}"
        )
    if v.dim() != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v must be [B, T, H, V] = {[*k.shape[:3], 'V']}, got {list(v.shape)}")
    _check_state(initial_state, k[:, 0], v[:, 0])
    with without_autocast(q):
        q_, k_, v_, g_, state = at_least_fp32(q, k, v, log_decay, initial_state)
        o, state = reference.chunked(q_, k_, v_, g_, scale=_scale(scale, k), initial_state=state)
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
    _check_state(state, k, v)
    with without_autocast(q):
        q_, k_, v_, s_, g_ = at_least_fp32(q, k, v, state, log_decay)
        o, state = reference.step(q_, k_, v_, s_, g_, scale=_scale(scale, k))
    return o.to(v.dtype), state


def _scale(scale: float | None, k: Tensor) -> float:
    return k.shape[-1] ** -0.5 if scale is None else scale


def _check_state(state: Tensor | None, k: Tensor, v: Tensor) -> None:
    expected = (*k.shape, v.shape[-1])
    if state is not None and state.shape != expected:
        raise ValueError(f"the state must be [B, H, K, V] = {list(expected)}, got {list(state.shape)}")
