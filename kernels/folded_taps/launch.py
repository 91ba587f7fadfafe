"""Launches of the kernels that make taps. Nothing here looks at a value, so every call can go into a CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chela_plugin.kernels.backend import ceil_div, next_power_of_2
from chela_plugin.kernels.launching import Launcher

from . import triton as kernels

BLOCK = 1024  # columns a program
SHORT_GROUP = 16  # channels a program where no filter is shared

launch_fold, launch_fold_gradient = Launcher(kernels.fold), Launcher(kernels.fold_gradient)
launch_sub_kernel_gradient = Launcher(kernels.sub_kernel_gradient)
launch_short_gradient = Launcher(kernels.short_gradient)


class Shape(NamedTuple):
    """channels in all; shared: channels with one long filter, groups of them; rows of the long filter's generator."""

    channels: int
    shared: int
    groups: int
    columns: int
    centre: int


def channels_of(source: Tensor | None, kernels: Sequence[Tensor], scales: Tensor | None, causal: bool) -> int:
    if scales is not None:
        return scales.shape[1]
    if kernels or source is None:
        return kernels[0].shape[0]
    return source.shape[0] // (1 if causal else 2)


def shape_of(
    source: Tensor | None, kernels: Sequence[Tensor], scales: Tensor | None, length: int, causal: bool
) -> Shape:
    sides = 1 if causal else 2
    channels = channels_of(source, kernels, scales, causal)
    groups = ceil_div(channels, SHORT_GROUP) if source is None else source.shape[0] // sides
    shared = SHORT_GROUP if source is None else channels // groups
    return Shape(channels, shared, groups, length if causal else 2 * length - 1, 0 if causal else length - 1)


def _options(
    source: Tensor | None, ratio_logit: Tensor | None, short: Sequence[Tensor], scales: Tensor | None, causal: bool
) -> dict[str, Any]:
    widths = tuple(kernel.shape[1] for kernel in short)
    multiscale = source is not None and ratio_logit is not None
    return {
        "S": source.shape[1] if multiscale and source is not None else 1,
        "SUB": source.shape[2] if multiscale and source is not None else 0,
        "LONG_SCALE": -1 if source is None or scales is None else scales.shape[0] - 1,
        "TWO_SIDED": not causal,
        "WIDTHS": widths or (1,),
        "KERNELS": len(widths),
        "SHORT_SCALED": scales_short(source, short, scales),
        "LONG": source is not None,
    }


def scales_short(source: Tensor | None, short: Sequence[Tensor], scales: Tensor | None) -> bool:
    """Whether `scales` has rows for the short kernels; one row alone is the long taps'."""
    return scales is not None and len(short) > 0 and (source is None or scales.shape[0] > 1)


def _flat(short: Sequence[Tensor]) -> Tensor | None:
    if not short:
        return None
    return short[0].contiguous().view(-1) if len(short) == 1 else torch.cat([kernel.flatten() for kernel in short])


def _some(*tensors: Tensor | None) -> list[Tensor]:
    """A pointer for each; what is None is never read."""
    filler = next(t for t in tensors if t is not None)
    return [filler if t is None else t.contiguous() for t in tensors]


def forward(
    source: Tensor | None,
    ratio_logit: Tensor | None,
    short: Sequence[Tensor],
    scales: Tensor | None,
    length: int,
    causal: bool,
) -> Tensor:
    """`[D, length]` or `[D, 2 length - 1]`, fp32."""
    shape = shape_of(source, short, scales, length, causal)
    inputs = _some(source, ratio_logit, _flat(short), scales)
    taps = torch.empty(shape.channels, shape.columns, dtype=torch.float32, device=inputs[0].device)
    block = min(BLOCK, next_power_of_2(shape.columns))
    launch_fold(
        (shape.groups, ceil_div(shape.columns, block)), (*inputs, taps),
        (shape.channels, shape.shared, shape.groups, shape.centre, length, shape.columns), BLOCK=block,
        **_options(source, ratio_logit, short, scales, causal), num_warps=4 if block > 64 else 1,
    )  # fmt: skip
    return taps


def backward(
    dtaps: Tensor,
    source: Tensor | None,
    ratio_logit: Tensor | None,
    short: Sequence[Tensor],
    scales: Tensor | None,
    length: int,
    causal: bool,
    shares: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, list[Tensor], Tensor | None]:
    """Gradients of source, ratio_logit, the short kernels (views of one tensor) and scales, in their dtypes.

    shares: without `source`, `[D, n]` whose sums are the gradient of the last row of scales."""
    shape = shape_of(source, short, scales, length, causal)
    options = _options(source, ratio_logit, short, scales, causal)
    dtaps, device = dtaps.contiguous(), dtaps.device
    channels, shared, groups, columns, centre = shape
    block = min(BLOCK, next_power_of_2(columns))
    blocks = ceil_div(columns, block)
    inputs = _some(source, ratio_logit, scales, dtaps)[:3]
    dsource = dratio = None
    if source is not None:
        shares = torch.empty(channels, blocks, dtype=torch.float32, device=device) if scales is not None else None
        dlong = torch.empty(
            source.shape[0], length, dtype=torch.float32 if options["SUB"] else source.dtype, device=device
        )
        launch_fold_gradient(
            (groups, blocks), (*inputs, dtaps, dlong, dtaps if shares is None else shares),
            (channels, shared, groups, centre, length, columns, blocks), BLOCK=block, num_warps=4 if block > 64 else 1,
            **{name: options[name] for name in ("S", "SUB", "LONG_SCALE", "TWO_SIDED")},
        )  # fmt: skip
        dsource = dlong
        if ratio_logit is not None:
            dsource, dratio = torch.empty_like(source), torch.empty_like(ratio_logit)
            sub = options["SUB"]
            launch_sub_kernel_gradient(
                (source.shape[0],), (*inputs[:2], dlong, dsource, dratio),
                (length, ((length - 1) // sub + 1).bit_length()),
                S=options["S"], SUB=sub, NODES=next_power_of_2(sub), BLOCK=256, num_warps=4,
            )  # fmt: skip
    dscales = None if scales is None else torch.empty_like(scales)
    dshort: list[Tensor] = []
    if short or scales is not None:
        flat = _flat(short)
        flat_gradient = dtaps if flat is None else torch.empty_like(flat)
        widest = max(options["WIDTHS"])
        if source is None and shares is not None:
            options["LONG"], blocks = True, shares.shape[1]
        launch_short_gradient(
            (ceil_div(channels, 8),),
            (dtaps if flat is None else flat, inputs[2], dtaps, dtaps if shares is None else shares, flat_gradient,
             dtaps if dscales is None else dscales),
            (channels, centre, columns, blocks),
            ROWS=0 if scales is None else scales.shape[0], NODES=next_power_of_2(widest),
            BLOCK=min(next_power_of_2(blocks), 64), CHANNELS=8, num_warps=1,
            **{name: options[name] for name in ("WIDTHS", "KERNELS", "SHORT_SCALED", "LONG", "TWO_SIDED")},
        )  # fmt: skip
        if flat is not None:
            sizes = [kernel.numel() for kernel in short]
            dshort = [part.view_as(kernel) for part, kernel in zip(flat_gradient.split(sizes), short, strict=True)]
    return dsource, dratio, dshort, dscales
