"""Mamba's selective scan (arXiv:2312.00752), in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from chela_plugin.kernels.precision import at_least_fp32, without_autocast
from chela_plugin.kernels.selective_scan import reference
from chela_plugin.kernels.untraced import compiling

__all__ = ["selective_scan", "selective_scan_step"]


def selective_scan(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`h_t = exp(delta_t A) h_(t-1) + delta_t u_t B_t`, `y_t = sum_n h_tn C_tn`, each channel alone.

    Args:
        u: `[B, T, D]`, T at least 1.
        delta: `[B, T, D]`, step sizes, at least 0.
        a: `[D, N]`, below 0.
        b, c: `[B, T, N]`.
        initial_state: `[B, D, N]`; zeros when None.
        output_final_state: return the state behind the last token.

    Returns `(y [B, T, D] in u's dtype, state [B, D, N] in fp32, or fp64 if an input is, or None)`. Computed in the
    state's precision whatever autocast says; differentiable once, in every tensor. Zeros in delta leave the state as
    it was, which is how padding is left out. Signs are not checked: that would wait for the device.

    Raises ValueError for shapes that don't fit.
    """
    if u.dim() != 3 or u.shape[1] == 0 or u.shape != delta.shape:
        raise ValueError(
            f"u and delta must have one shape [B, T, D] with T >= 1, got {list(u.shape)} and {list(delta.shape)}"
        )
    _check_parameters(u, a, b, c, (*u.shape[:2], a.shape[-1]))
    _check_state(initial_state, u.shape[0], a)
    if compiling():
        from . import ops

        y, state = ops.forward_op(u, delta, a, b, c, initial_state, 1.0)
        return y, state if output_final_state else None
    with without_autocast(u):
        u_, delta_, a_, b_, c_, state = at_least_fp32(u, delta, a, b, c, initial_state)
        y, state = reference.chunked(u_, delta_, a_, b_, c_, initial_state=state)
    return y.to(u.dtype), state if output_final_state else None


def selective_scan_step(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: u, delta `[B, D]`, a `[D, N]`, b, c `[B, N]`, state `[B, D, N]`. Returns `(y [B, D], state)`."""
    if u.dim() != 2 or u.shape != delta.shape:
        raise ValueError(f"a step takes u and delta [B, D], got {list(u.shape)} and {list(delta.shape)}")
    _check_parameters(u, a, b, c, (u.shape[0], a.shape[-1]))
    _check_state(state, u.shape[0], a)
    with without_autocast(u):
        u_, delta_, a_, b_, c_, state_ = at_least_fp32(u, delta, a, b, c, state)
        y, state = reference.step(u_, delta_, a_, b_, c_, state_)
    return y.to(u.dtype), state


def _check_parameters(u: Tensor, a: Tensor, b: Tensor, c: Tensor, expected: tuple[int, ...]) -> None:
    if a.dim() != 2 or a.shape[0] != u.shape[-1]:
        raise ValueError(f"a must be [D, N] with D = {u.shape[-1]}, got {list(a.shape)}")
    if b.shape != expected or c.shape != expected:
        raise ValueError(f"b and c must be {list(expected)}, got {list(b.shape)} and {list(c.shape)}")


def _check_state(state: Tensor | None, batch: int, a: Tensor) -> None:
    if state is not None and state.shape != (batch, *a.shape):
        raise ValueError(f"the state must be [B, D, N] = {[batch, *a.shape]}, got {list(state.shape)}")
