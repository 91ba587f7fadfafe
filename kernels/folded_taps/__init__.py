"""Taps of a short-long convolution: generated, scaled, summed with the short kernels and expanded, in one launch.

`reference.py` is the definition, `triton.py` the kernels, `ops.py` what torch sees of them. Spelled out in torch this
is some 80 launches forward and 150 backward for a few MiB of taps: a layer waited for the host (12 ms a layer where the
device works 5, H100, 4,096 tokens).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chela_plugin.kernels.backend import backend, traced

from . import reference

__all__ = ["folded_taps"]


def folded_taps(
    source: Tensor | None,
    ratio_logit: Tensor | None = None,
    *,
    length: int,
    scales: Tensor | None = None,
    kernels: Sequence[Tensor] = (),
    causal: bool = True,
) -> Tensor:
    """All branches of a depthwise convolution as one filter. Differentiable in every tensor.

    taps[d, lag] = long_scale[d] long[group of d, lag] + sum_b scale_b[d] kernel_b[d, lag]

    Args:
        source: the long filters, one for each group of D / groups neighbouring channels: taps `[groups, length]`, or
            with `ratio_logit` the sub-kernels `[groups, scales, d]` of the multiscale generator
            (`reference.multiscale_taps`). Two-sided: twice as many rows, those for lags from 0 on, then those for lags
            below 0, whose first tap is unused. None: short kernels alone.
        ratio_logit: `[rows of source]`, or None.
        length: taps from lag 0 on, at least as many as any short kernel has there.
        scales: `[n, D]`: a row for each short kernel, then one for the long filter (unused without `source`); or one
            row, for the long filter alone; or None, where every factor is 1 and D the number of groups.
        kernels: short kernels `[D, k]`, tap 0 at lag 0; or, two-sided, with an odd k and lag 0 in the middle.
        causal: one-sided taps or two-sided ones.

    Returns:
        `[D, length]`, or two-sided `[D, 2 length - 1]` with lag 0 in the middle; fp32, or fp64 for fp64 parameters.

    Raises:
        ValueError: shapes that don't fit one another, or a length below a short kernel's.
    """
    given = [t for t in (source, ratio_logit, scales, *kernels) if t is not None]
    sides = 1 if causal else 2
    if source is None and not kernels:
        raise ValueError("folded_taps needs a long filter or short kernels")
    if source is not None:
        if source.dim() != (2 if ratio_logit is None else 3) or source.shape[0] % sides:
            raise ValueError(
                "source is [rows, length], or [rows, scales, d] with ratio_logit [rows], rows even where taps are "
                f"two-sided; got {list(source.shape)}"
            )
        if ratio_logit is None and source.shape[1] != length:
            raise ValueError(f"source has {source.shape[1]} taps, length asks for {length}")
        if ratio_logit is not None and ratio_logit.shape != source.shape[:1]:
            raise ValueError(f"ratio_logit must be [{source.shape[0]}] as source, got {list(ratio_logit.shape)}")
    widths = {kernel.shape[0] for kernel in kernels} | ({scales.shape[1]} if scales is not None else set())
    if len(widths) > 1 or (source is not None and any(width % (source.shape[0] // sides) for width in widths)):
        raise ValueError(
            f"kernels and scales must have one number of channels, a multiple of the long filters'; got {widths}"
        )
    if scales is not None and scales.shape[0] not in (len(kernels), len(kernels) + 1, 1):
        raise ValueError(f"scales has a row for each branch, or one for the long filter; got {list(scales.shape)}")
    reach = max([1, *(kernel.shape[1] if causal else (kernel.shape[1] + 1) // 2 for kernel in kernels)])
    if length < reach:
        raise ValueError(f"length is at least the short kernels' {reach}, got {length}")
    if backend(given[0].device, given[0].dtype) == "reference":
        return reference.folded_taps(source, ratio_logit, kernels, scales, length, causal)
    from . import ops

    if traced(given[0]):
        return ops.forward_op(source, ratio_logit, scales, list(kernels), length, causal)
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return ops.Eager.apply(length, causal, source, ratio_logit, scales, *kernels)
    return ops.forward(source, ratio_logit, scales, kernels, length, causal)
