"""Taps of a short-long convolution in plain PyTorch: the definition of `folded_taps`; the multiscale generator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def multiscale_taps(u: Tensor, ratio_logit: Tensor, length: int) -> Tensor:
    """`[rows, length]` from sub-kernels u `[rows, scales, d]`: SGConv's (arXiv:2210.09298) without a length limit.

    Scale i covers the d 2^i lags from d (2^i - 1) on. There the tap is sub-kernel i, the last one beyond it, stretched
    linearly by 2^i, times (ratio / 2)^i with ratio = sigmoid(ratio_logit) `[rows]`.
    """
    ratio = torch.sigmoid(ratio_logit)
    scales, d = u.shape[1:]
    parts, done, i = [], 0, 0
    while done < length:
        factor = 1 << i  # 2**i is a float in TorchScript
        stretched = u[:, min(i, scales - 1)] @ stretch_matrix(d, factor, u)
        parts.append(stretched * (ratio / 2).pow(i)[:, None])
        done, i = done + d * factor, i + 1
    return torch.cat(parts, dim=1)[:, :length]


def stretch_matrix(taps: int, factor: int, like: Tensor) -> Tensor:
    """`[taps, taps * factor]`: linear interpolation with edges held, as one product (its gradient is deterministic)."""
    place = (torch.arange(taps * factor, device=like.device, dtype=like.dtype) + 0.5) / factor - 0.5
    nodes = torch.arange(taps, device=like.device, dtype=like.dtype)[:, None]
    return (1 - (place.clamp(0, taps - 1) - nodes).abs()).clamp(min=0)


def folded_taps(
    source: Tensor | None,
    ratio_logit: Tensor | None,
    kernels: Sequence[Tensor],
    scales: Tensor | None,
    length: int,
    causal: bool,
) -> Tensor:
    """As `folded_taps` of this package, in fp32 (fp64 for fp64 parameters)."""
    first = next(t for t in (source, scales, *kernels) if t is not None)
    inner = torch.float64 if first.dtype == torch.float64 else torch.float32
    short_scaled = scales is not None and (source is None or scales.shape[0] > 1)
    total: Tensor | None = None
    if source is not None:
        long = source.to(inner)
        if ratio_logit is not None:
            long = multiscale_taps(long, ratio_logit.to(inner), length)
        total = long if causal else two_sided(*long.chunk(2))
        if scales is not None:
            total = total.repeat_interleave(scales.shape[1] // total.shape[0], dim=0) * scales[-1].to(inner)[:, None]
        elif kernels:
            total = total.repeat_interleave(kernels[0].shape[0] // total.shape[0], dim=0)
    for b, kernel in enumerate(kernels):
        taps = kernel.to(inner)
        if scales is not None and short_scaled:
            taps = taps * scales[b].to(inner)[:, None]
        missing = (length if causal else 2 * length - 1) - taps.shape[1]
        taps = torch.nn.functional.pad(taps, (0, missing) if causal else (missing // 2, missing // 2))
        total = taps if total is None else total + taps
    assert total is not None
    return total


def two_sided(ahead: Tensor, behind: Tensor) -> Tensor:
    """One-sided taps `[D, L]` each way to `[D, 2L - 1]`; lag 0 is `ahead`'s, so `behind`'s first tap is unused."""
    return torch.cat([behind[:, 1:].flip(-1), ahead], dim=-1)
