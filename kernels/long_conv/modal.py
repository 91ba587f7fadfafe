"""Short taps and a modal filter in one pass, at a cost a token that does not grow with the length."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from chela_plugin.kernels.backend import backend, traced
from chela_plugin.kernels.folded_taps import folded_taps
from chela_plugin.kernels.packing import check_cu_seqlens, unread

from .reference import modal_conv_reference

MAX_SHORT = 8


def modal_conv(
    x: Tensor,
    log_time: Tensor,
    frequency: Tensor,
    residue: Tensor,
    *,
    short: Tensor | None = None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    silu: bool = False,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """u = bias + short * x + scale (modal * x), and SiLU(u) if `silu`. Differentiable in all tensors.

    The modal filter of group g is tap_j = Re sum_m c_m (1 - |p_m|) p_m^j, p = exp(-exp(-log_time) + i frequency), c the
    residue; D / G neighbouring channels share one. The result is `long_conv`'s with these taps, causal bit for bit, but
    no tap beyond one chunk of 64 is ever formed: a chunk's own tokens meet a triangular matrix, all before it a state
    of the modes (formulas in `reference.py`). In bf16 and fp16 the chunk's matrices are rounded to x's dtype; states
    stay in fp32.

    Args:
        x: `[B, T, D]`, floating point; read fastest where the channels are contiguous.
        log_time: `[G, M]`, log of each mode's time constant in tokens. D is a multiple of G. Two-sided (`causal=False`)
            `[2 G, M]`, as are frequency and residue: the filters of lags from 0 on, then those of lags below 0.
        frequency: `[G, M]`, radians a token.
        residue: `[G, M, 2]`, real and imaginary parts.
        short: `[D, K]`, K at most 8, tap 0 at lag 0, or two-sided with an odd K and lag 0 in the middle; or None.
        scale, bias: `[D]` or None.
        cu_seqlens: `[N + 1]`, as in `long_conv`.

    Returns:
        `[B, T, D]` in x's dtype, contiguous.

    Raises:
        ValueError: shapes that don't fit one another, or cu_seqlens that don't cut x.
    """
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"modal_conv expects a floating-point x of shape [B, T, D], got {x.dtype} {list(x.shape)}")
    channels = x.shape[2]
    sides = 1 if causal else 2
    if log_time.dim() != 2 or log_time.numel() == 0 or sides * channels % log_time.shape[0]:
        raise ValueError(
            f"log_time must be [{'' if causal else '2 '}G, M] with D = {channels} a multiple of G and M at least 1, "
            f"got {list(log_time.shape)}"
        )
    if frequency.shape != log_time.shape or residue.shape != (*log_time.shape, 2):
        raise ValueError(
            f"frequency must be [G, M] and residue [G, M, 2] with [G, M] = {list(log_time.shape)} as in log_time, "
            f"got {list(frequency.shape)} and {list(residue.shape)}"
        )
    if short is not None and (short.dim() != 2 or short.shape[0] != channels or not 1 <= short.shape[1] <= MAX_SHORT):
        raise ValueError(f"short must be [D, K] with D = {channels}, K from 1 to {MAX_SHORT}, got {list(short.shape)}")
    if not causal and (log_time.shape[0] % 2 or (short is not None and short.shape[1] % 2 == 0)):
        raise ValueError("a two-sided filter has two rows of modes for each group, and an odd number of short taps")
    for name, value in (("scale", scale), ("bias", bias)):
        if value is not None and value.shape != (channels,):
            raise ValueError(f"{name} must be of shape [{channels}], got {list(value.shape)}")
    if cu_seqlens is not None:
        if cu_seqlens.device != x.device:
            raise ValueError(f"cu_seqlens must be on {x.device} like x, got {cu_seqlens.device}")
        check_cu_seqlens(cu_seqlens, x.shape[0], x.shape[1], read=unread(cu_seqlens, x.shape[1]))
    inputs = (log_time, frequency, residue, short, scale, bias)
    if backend(x.device, x.dtype) == "reference":
        if cu_seqlens is None:
            return modal_conv_reference(x, *inputs, silu, causal)
        pairs = [(a, b) for a, b in itertools.pairwise(cu_seqlens.tolist()) if b > a]
        return torch.cat([modal_conv_reference(x[:, a:b], *inputs, silu, causal) for a, b in pairs], dim=1)
    from . import ops_modal as ops

    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *inputs))
    if traced(x):
        return ops.forward_op(x, *inputs, cu_seqlens, silu, causal, learns)[0]
    if learns:
        return ops.Eager.apply(x, *inputs, cu_seqlens, silu, causal)
    return ops.forward(x, *inputs, cu_seqlens, silu, causal, False)[0]


def short_modal_conv(
    x: Tensor,
    log_time: Tensor,
    frequency: Tensor,
    residue: Tensor,
    *,
    kernels: Sequence[Tensor],
    scales: Tensor,
    bias: Tensor | None = None,
    silu: bool = False,
    causal: bool = True,
) -> Tensor:
    """`modal_conv` of branches that are not folded yet: short kernels `[D, k]` under the first rows of scales
    `[len(kernels) + 1, D]`, the modal filter under the last. Otherwise as `modal_conv`."""
    inputs = (x, log_time, frequency, residue, scales, bias, *kernels)
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    if learns and kernels and not traced(x) and backend(x.device, x.dtype) == "triton":
        from . import ops_modal as ops

        return ops.Branches.apply(x, log_time, frequency, residue, scales, bias, silu, causal, *kernels)
    widest = max([1, *(kernel.shape[1] for kernel in kernels)])
    length = widest if causal else (widest + 1) // 2
    short = folded_taps(None, length=length, scales=scales, kernels=kernels, causal=causal) if kernels else None
    modes = log_time, frequency, residue
    return modal_conv(x, *modes, short=short, scale=scales[-1], bias=bias, silu=silu, causal=causal)
