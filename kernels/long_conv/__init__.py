"""Depthwise convolution with filters as long as the sequence: any taps (`long_conv`), or modal ones (`modal_conv`)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from chela_plugin.kernels.backend import backend, traced
from chela_plugin.kernels.packing import check_cu_seqlens, unread

from .modal import MAX_SHORT, modal_conv, short_modal_conv
from .reference import long_conv_reference

__all__ = ["MAX_SHORT", "long_conv", "modal_conv", "short_modal_conv"]


def long_conv(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None = None,
    *,
    causal: bool = True,
    silu: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Depthwise convolution along the tokens (formulas in `reference.py`). Differentiable in x, taps and bias.

    Exact at any length. On CUDA it is a Toeplitz product on tensor cores, causal bit for bit, or, where many taps meet
    every token (`configs.py`), an FFT, causal to its rounding; in bf16 and fp16 the Toeplitz product also rounds the
    taps to x's dtype.

    Memory order: the kernels work on time-first copies. x contiguous as `[B, T, D]` pays one copy on the way in and one
    on the way out, 0.05 ms each for 64 MiB on an H100. x that is a view of `[D, B, T]` (what a product leaves that
    wrote its output transposed) gets y in the same order, which saves the copy out: 0.18 ms instead of 0.23 at T =
    1,024. The FFT transposes on its way and has no preference.

    Args:
        x: `[B, T, D]`, floating point.
        taps: `[D, L]`, tap 0 at lag 0; or two-sided (`causal=False`) `[D, 2L - 1]`, lag 0 in the middle. Any L. May be
            of higher precision than x.
        bias: `[D]` or None.
        causal: whether an output sees only its own token and those before it.
        silu: SiLU of the result; it, and its gradient, ride along with passes that are made anyway.
        cu_seqlens: `[N + 1]` integers from 0 to T, as in FlashAttention: B is 1 and each sequence is convolved alone.
            On CUDA the values are checked once for each tensor, since reading them waits for the stream (`packing.py`).

    Returns:
        `[B, T, D]` in x's dtype, summed in fp32 (fp64 for fp64).

    Raises:
        ValueError: widths that differ, an even number of two-sided taps, or cu_seqlens that don't cut x.
    """
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"long_conv expects a floating-point x of shape [B, T, D], got {x.dtype} {list(x.shape)}")
    if taps.dim() != 2 or taps.shape[0] != x.shape[2] or taps.shape[1] == 0:
        raise ValueError(f"taps must be [D, L] with D = {x.shape[2]} as in x and L at least 1, got {list(taps.shape)}")
    if bias is not None and bias.shape != x.shape[2:]:
        raise ValueError(f"bias must be of shape [{x.shape[2]}], got {list(bias.shape)}")
    if not causal and taps.shape[1] % 2 == 0:
        raise ValueError(f"two-sided taps come as [D, 2L - 1] with lag 0 in the middle, got an even {taps.shape[1]}")
    if cu_seqlens is not None:
        if cu_seqlens.device != x.device:
            raise ValueError(f"cu_seqlens must be on {x.device} like x, got {cu_seqlens.device}")
        check_cu_seqlens(cu_seqlens, x.shape[0], x.shape[1], read=unread(cu_seqlens, x.shape[1]))
    if backend(x.device, x.dtype) == "reference":
        if cu_seqlens is None:
            return long_conv_reference(x, taps, bias, causal=causal, silu=silu)
        pairs = [(a, b) for a, b in itertools.pairwise(cu_seqlens.tolist()) if b > a]
        return torch.cat(
            [long_conv_reference(x[:, a:b], taps, bias, causal=causal, silu=silu) for a, b in pairs], dim=1
        )
    from . import ops

    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, taps, bias))
    if traced(x):
        return ops.forward_op(x, taps, bias, cu_seqlens, causal, silu, learns)[0]
    if learns:
        return ops.Eager.apply(x, taps, bias, cu_seqlens, causal, silu)
    return ops.forward(x, taps, bias, cu_seqlens, causal, silu)[0]
