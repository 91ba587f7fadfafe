"""The gated delta rule (Gated DeltaNet, arXiv:2412.06464), in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from chela_plugin.kernels.gated_delta_rule import reference
from chela_plugin.kernels.precision import at_least_fp32, without_autocast

__all__ = ["gated_delta_rule", "gated_delta_rule_step"]


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`S_t = exp(log_decay_t) (I - beta_t k_t k_t^T) S_(t-1) + beta_t k_t v_t^T`, `o_t = scale * S_t^T q_t`.

    Args:
        q, k: `[B, T, H, K]`, T at least 1; k of unit length (or shorter), or the state may grow without bound.
        v: `[B, T, H, V]`.
        beta: `[B, T, H]`, write strength, 0 to 1 (to 2 where negative eigenvalues are wanted).
        log_decay: `[B, T, H]`, at most 0 (not checked: that would wait for the device), natural logarithm.
        scale: of the queries; `K^-0.5` when None.
        initial_state: `[B, H, K, V]`; zeros when None.
        output_final_state: return the state behind the last token.

    Returns `(o [B, T, H, V] in v's dtype, state [B, H, K, V] in fp32, or fp64 if an input is, or None)`. Computed in
    the state's precision whatever autocast says; differentiable in every tensor. Zeros in beta and log_decay leave
    the state as it was, which is how padding is left out.

    Raises ValueError for shapes that don't fit.
    """
    if q.dim() != 4 or q.shape[1] == 0 or q.shape != k.shape:
        raise ValueError(
            f"q and k must have one shape [B, T, H, K] with T >= 1, got {list(q.shape)} and {list(k.shape)}"
        )
    if v.dim() != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v must be [B, T, H, V] = {[*k.shape[:3], 'V']}, got {list(v.shape)}")
    if beta.shape != k.shape[:3] or log_decay.shape != k.shape[:3]:
        raise ValueError(
            f"beta and log_decay must be [B, T, H] = {list(k.shape[:3])}, got {list(beta.shape)} and "
            f"{list(log_decay.shape)}"
        )
    _check_state(initial_state, k[:, 0], v[:, 0])
    with without_autocast(q):
        q_, k_, v_, b_, g_, state = at_least_fp32(q, k, v, beta, log_decay, initial_state)
        o, state = reference.chunked(q_, k_, v_, b_, g_, scale=_scale(scale, k), initial_state=state)
    return o.to(v.dtype), state if output_final_state else None


def gated_delta_rule_step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, beta: Tensor, log_decay: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One token: q, k `[B, H, K]`, v `[B, H, V]`, beta, log_decay `[B, H]`, state `[B, H, K, V]`; `(o, state)`."""
    if (
        q.dim() != 3
        or q.shape != k.shape
        or v.shape[:2] != k.shape[:2]
        or not beta.shape == log_decay.shape == k.shape[:2]
    ):
        raise ValueError(
            "a step takes q and k [B, H, K], v [B, H, V], beta and log_decay [B, H], got "
            f"{list(q.shape)}, {list(k.shape)}, {list(v.shape)}, {list(beta.shape)} and {list(log_decay.shape)}"
        )
    _check_state(state, k, v)
    with without_autocast(q):
        q_, k_, v_, s_, b_, g_ = at_least_fp32(q, k, v, state, beta, log_decay)
        o, state = reference.step(q_, k_, v_, s_, b_, g_, scale=_scale(scale, k))
    return o.to(v.dtype), state


def _scale(scale: float | None, k: Tensor) -> float:
    return k.shape[-1] ** -0.5 if scale is None else scale


def _check_state(state: Tensor | None, k: Tensor, v: Tensor) -> None:
    expected = (*k.shape, v.shape[-1])
    if state is not None and state.shape != expected:
        raise ValueError(f"the state must be [B, H, K, V] = {list(expected)}, got {list(state.shape)}")
