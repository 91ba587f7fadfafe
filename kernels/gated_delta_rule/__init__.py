"""The gated delta rule (Gated DeltaNet, arXiv:2412.06464): plain PyTorch, or fla on a CUDA device."""

from __future__ import annotations

import torch
from torch import Tensor

from chela_plugin.kernels.gated import check_state, scale_or_default
from chela_plugin.kernels.gated_delta_rule import reference
from chela_plugin.kernels.peers import gated_backward_refused, peer
from chela_plugin.kernels.precision import at_least_fp32, without_autocast
from chela_plugin.kernels.untraced import compiling

__all__ = ["backend", "gated_delta_rule", "gated_delta_rule_step"]


WIDEST_KEY = 256  # of fla's kernels


def backend(device: torch.device | str, dtype: torch.dtype, key_dim: int) -> str:
    """What computes inputs of `dtype` on `device`: 'fla chunk_gated_delta_rule', 'fla chunk_kda' or 'reference'.

    chunk_kda has a decay for each key channel, here the head's one for all of them, and stands in where fla refuses the
    gradient of its chunk_gated_delta_rule (`gated_backward_refused`). Single steps are plain.
    """
    name = _kernel()
    return "reference" if key_dim > WIDEST_KEY or peer(name, device, dtype) is None else f"fla {name}"


def _kernel() -> str:
    return "chunk_kda" if gated_backward_refused() else "chunk_gated_delta_rule"


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
    the state's precision whatever autocast says; differentiable in every tensor. fp16 and bf16 on a CUDA device go
    through fla's kernels where it is installed: states and sums in fp32, products of 16-bit operands. Zeros in beta and
    log_decay leave the state as it was, which is how padding is left out.

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
    check_state(initial_state, k[:, 0], v[:, 0])
    if compiling():
        from . import ops

        o, state = ops.forward_op(q, k, v, beta, log_decay, initial_state, scale_or_default(scale, k))
        return o, state if output_final_state else None
    fits = k.shape[-1] <= WIDEST_KEY and q.dtype == k.dtype == v.dtype and q.is_cuda
    kernel = peer(_kernel(), q.device, q.dtype) if fits else None
    with without_autocast(q):
        if kernel is not None:
            first = None if initial_state is None else initial_state.float()
            g = log_decay.float()
            g = g[..., None].expand(k.shape) if _kernel() == "chunk_kda" else g
            return kernel(
                q, k, v, g, beta.float(), scale_or_default(scale, k), first, output_final_state=output_final_state
            )
        q_, k_, v_, b_, g_, state = at_least_fp32(q, k, v, beta, log_decay, initial_state)
        o, state = reference.chunked(q_, k_, v_, b_, g_, scale=scale_or_default(scale, k), initial_state=state)
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
    check_state(state, k, v)
    with without_autocast(q):
        q_, k_, v_, s_, b_, g_ = at_least_fp32(q, k, v, state, beta, log_decay)
        o, state = reference.step(q_, k_, v_, s_, b_, g_, scale=scale_or_default(scale, k))
    return o.to(v.dtype), state
