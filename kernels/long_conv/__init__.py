"""Exact depthwise convolution with filters as long as the sequence, or shorter, or longer."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from chela_plugin.kernels.backend import backend, traced

from .reference import long_conv_reference

__all__ = ["long_conv"]


def long_conv(
    x: Tensor, taps: Tensor, bias: Tensor | None = None, *, causal: bool = True, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Depthwise convolution along the tokens (formulas in `reference.py`).

    Args:
        x: `[B, T, D]`, floating point.
        taps: `[D, L]`, tap 0 at lag 0; or two-sided (`causal=False`) `[D, 2L - 1]`, lag 0 in the middle. Any L. May be
            of higher precision than x.
        bias: `[D]` or None.
        causal: whether an output sees only its own token and those before it.
        cu_seqlens: `[N + 1]` integers, as in FlashAttention: B is 1 and each sequence is convolved alone.

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
    if cu_seqlens is None:
        return _whole(x, taps, bias, causal)
    cuts = cu_seqlens.tolist()
    if x.shape[0] != 1 or cuts[0] != 0 or cuts[-1] != x.shape[1] or sorted(cuts) != cuts:
        raise ValueError(
            f"cu_seqlens needs B = 1 and must rise from 0 to T = {x.shape[1]}, got B = {x.shape[0]} and {cuts}"
        )
    parts = [_whole(x[:, a:b], taps, bias, causal) for a, b in itertools.pairwise(cuts) if b > a]
    return torch.cat(parts, dim=1)


def _whole(x: Tensor, taps: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
    if backend(x.device, x.dtype) == "reference":
        return long_conv_reference(x, taps, bias, causal=causal)
    from . import ops

    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, taps, bias))
    # Without a gradient an eager call goes round the dispatcher, which costs more host time than the launches.
    return (ops.forward_op if learns or traced(x) else ops.forward)(x, taps, bias, causal)
