"""Launches of the kernels; nothing here looks at a value, so every launch can go into a CUDA graph.

x and its like are dense `[B, h, w, D]`. Sums over programs are combined in a fixed order: results are deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chela_plugin.kernels.backend import ceil_div, next_power_of_2
from chela_plugin.kernels.launching import Launcher

from . import triton as kernels
from . import triton_norm as norms
from . import triton_planes as products

CHANNELS = 64  # of a program: one warp, two a lane, so that bf16 comes in whole lines of 128 bytes
ROWS = 2  # of outputs a program makes; with 8 columns, 32 sums a thread
COLUMNS = (8, 7, 4)  # of outputs; what wastes least of the grid is taken, the widest of equals
GRADIENT_COLUMNS = (16, 14, 8, 7, 4)  # that a gradient of taps reads at once, chosen likewise
PAD = 15  # zeros around the taps of a row and of a column: what a tile of outputs may ask for beyond them
PROGRAMS = 2112  # of a gradient of taps: 16 warps on each of an H100's 132 processors
PLANES_FROM, PLANES_TO = 32, 128  # grids whose row and column kernels run as products of matrices, in 16 bits
SLICES = 32  # of partial sums that a program reads at once
Pair = tuple[int, int]

lay_out, tiled_convolve = Launcher(kernels.lay_out), Launcher(kernels.convolve)
launch_short_gradients, launch_line_gradients = Launcher(kernels.short_gradients), Launcher(kernels.line_gradients)
launch_tap_gradients, launch_scale_gradient = Launcher(kernels.tap_gradients), Launcher(kernels.scale_gradient)
launch_sum, launch_statistics = Launcher(kernels.sum_slices), Launcher(norms.statistics)
launch_apply, launch_gradient = Launcher(norms.apply), Launcher(norms.gradient)
launch_gradient_sums = Launcher(norms.gradient_sums)
launch_to_planes, launch_from_planes = Launcher(products.to_planes), Launcher(products.from_planes)
launch_cross, launch_cross_gradients = Launcher(products.cross_planes), Launcher(products.cross_gradients)


def columns_of(choices: Sequence[int], *lengths: int) -> int:
    """What wastes least of lines this long, the first of equals."""
    return min(choices, key=lambda n: sum(ceil_div(length, n) * n for length in lengths))


def tiles_of(x: Tensor) -> tuple[int, int, int]:
    """Columns of a tile, and tiles down and across the grid."""
    columns = columns_of(COLUMNS, x.shape[2])
    return columns, ceil_div(x.shape[1], ROWS), ceil_div(x.shape[2], columns)


def widths_of(shorts: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(short.shape[-1] for short in shorts)


def flat(shorts: Sequence[Tensor]) -> Tensor:
    """The short kernels behind one another."""
    return shorts[0].contiguous() if len(shorts) == 1 else torch.cat([short.flatten() for short in shorts])


def laid_out(shorts: Sequence[Tensor], cross: Tensor | None, scale: Tensor | None, grid: Pair, dim: int) -> Tensor:
    """Taps as the kernels read them, `[taps, D]` in fp32: k x k of each short kernel, the row, the column, padded."""
    h, w = grid
    short = flat(shorts) if shorts else cross
    assert short is not None
    widths = widths_of(shorts)
    count = sum(k * k for k in widths) + (0 if cross is None else 2 * (w + h) - 2 + 4 * PAD)
    taps = torch.empty(count, dim, dtype=torch.float32, device=short.device)
    pointers = (short, short if cross is None else cross.contiguous(), short if scale is None else scale, taps)
    length, groups = (1, 1) if cross is None else (cross.shape[2], cross.shape[1])
    lay_out(
        (count, ceil_div(dim, 128)), pointers, (dim, length, groups, dim // groups, h, w), WIDTHS=widths,
        CROSS=cross is not None, SCALED=scale is not None, PAD=PAD, BLOCK=128, num_warps=1,
    )  # fmt: skip
    return taps


def convolve(
    x: Tensor,
    taps: Tensor,
    widths: tuple[int, ...],
    cross: bool,
    y: Tensor,
    *,
    bias: Tensor | None = None,
    silu: bool = False,
    u: Tensor | None = None,
    sums: Tensor | None = None,
    transposed: bool = False,
    branch_stride: int = 0,
) -> None:
    """Writes y `[B, h, w, D]`; see the kernel for the rest."""
    batch, h, w, dim = y.shape
    columns, down, across = tiles_of(y)
    pointers = (x, taps, taps if bias is None else bias, y, y if u is None else u, taps if sums is None else sums)
    tiled_convolve(
        (batch * down * across, ceil_div(dim, CHANNELS)), pointers, (h, w, down, across, branch_stride),
        D=dim, WIDTHS=widths, CROSS=cross, TRANSPOSED=transposed, BIAS=bias is not None, SILU=silu, SAVE=u is not None,
        STATISTICS=sums is not None, PAD=PAD, R=ROWS, W=columns, C=CHANNELS, num_warps=1,
    )  # fmt: skip


def uses_planes(x: Tensor) -> bool:
    """Whether the cross runs as products of matrices (`triton_planes.py`)."""
    return PLANES_FROM <= max(x.shape[1:3]) <= PLANES_TO and x.element_size() == 2


def to_planes(x: Tensor) -> Tensor:
    """`[D, B h w]`."""
    dim = x.shape[3]
    rows = x.numel() // dim
    planes = torch.empty(dim, rows, dtype=x.dtype, device=x.device)
    launch_to_planes((ceil_div(rows, 64), ceil_div(dim, 64)), (x, planes), (rows, dim), BT=64, BD=64, num_warps=4)
    return planes


def sides_of(grid: Pair) -> Pair:
    """Of a block that holds an image."""
    return max(16, next_power_of_2(grid[0])), max(16, next_power_of_2(grid[1]))


def crossed(
    planes: Tensor,
    cross: Tensor,
    scale: Tensor | None,
    batch: int,
    grid: Pair,
    *,
    transposed: bool = False,
    sums: Tensor | None = None,
) -> Tensor:
    """The row and the column kernel of planes `[D, B h w]`, likewise."""
    dim, out = planes.shape[0], torch.empty_like(planes)
    high, wide = sides_of(grid)
    launch_cross(
        (batch, dim),
        (planes, cross.contiguous(), cross if scale is None else scale, out, planes if sums is None else sums),
        (*grid, dim, batch, cross.shape[1], dim // cross.shape[1], cross.shape[2]), SCALED=scale is not None,
        TRANSPOSED=transposed, STATISTICS=sums is not None, BH=high, BW=wide, num_warps=8 if high * wide >= 4096 else 4,
    )  # fmt: skip
    return out


def from_planes(
    planes: Tensor,
    y: Tensor,
    partial: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    silu: bool = False,
    u: Tensor | None = None,
) -> None:
    """Writes y `[B, h, w, D]`."""
    dim, rows = planes.shape
    launch_from_planes(
        (ceil_div(rows, 64), ceil_div(dim, 64)),
        (planes, y if partial is None else partial, planes if bias is None else bias, y, y if u is None else u),
        (rows, dim), PARTIAL=partial is not None, BIAS=bias is not None, SILU=silu, SAVE=u is not None, BT=64, BD=64,
        num_warps=4,
    )  # fmt: skip


def forward(
    x: Tensor,
    short: Tensor | None,
    cross: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    silu: bool,
    u: Tensor | None = None,
) -> Tensor:
    y = torch.empty_like(x)
    batch, h, w, dim = x.shape
    shorts = [] if short is None else [short]
    if cross is None or not uses_planes(x):
        taps = laid_out(shorts, cross, scale, (h, w), dim)
        convolve(x, taps, widths_of(shorts), cross is not None, y, bias=bias, silu=silu, u=u)
        return y
    partial = None if short is None else torch.empty_like(x)
    if partial is not None:
        convolve(x, laid_out(shorts, None, None, (h, w), dim), widths_of(shorts), False, partial)
    from_planes(crossed(to_planes(x), cross, scale, batch, (h, w)), y, partial, bias=bias, silu=silu, u=u)
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    shorts: Sequence[Tensor],
    cross: Tensor | None,
    scale: Tensor | None,
    want_x: bool,
    want_taps: bool,
    taps: Tensor | None = None,
) -> tuple[Tensor | None, list[Tensor], Tensor | None, Tensor | None]:
    """Gradients of x, the short kernels, cross and scale.

    Args:
        dy: `[branches, B, h, w, D]`, of the short kernels and then of the cross, before SiLU; or `[1, ...]` where all
            have the same.
        taps: `laid_out` with these kernels, without the cross where `uses_planes`, from who has them yet.
    """
    dx = dcross = dscale = planes = None
    dshorts: list[Tensor] = []
    batch, h, w, dim = x.shape
    by_planes = cross is not None and uses_planes(x)
    if by_planes:
        planes = to_planes(dy[-1])
    if want_x:
        dx = torch.empty_like(x)
        partial = torch.empty_like(x) if by_planes and shorts else dx
        if shorts or not by_planes:
            if taps is None:
                taps = laid_out(shorts, None if by_planes else cross, scale, (h, w), dim)
            stride = x.numel() if len(dy) > 1 else 0
            with_cross = cross is not None and not by_planes
            convolve(dy, taps, widths_of(shorts), with_cross, partial, transposed=True, branch_stride=stride)
        if planes is not None and cross is not None:
            out = crossed(planes, cross, scale, batch, (h, w), transposed=True)
            from_planes(out, dx, partial if shorts else None)
    if want_taps:
        dshorts, dcross, dscale = tap_gradients(dy, planes, x, shorts, cross, scale)
    return dx, dshorts, dcross, dscale


def sliced(lines: int, others: int) -> Pair:
    """Slices of the lines, and lines in each, so that about PROGRAMS programs run."""
    each = ceil_div(lines, max(1, min(lines, PROGRAMS // others)))
    return ceil_div(lines, each), each


def tap_gradients(
    dy: Tensor,
    planes: Tensor | None,
    x: Tensor,
    shorts: Sequence[Tensor],
    cross: Tensor | None,
    scale: Tensor | None,
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """Of the short kernels (views of one tensor), cross and scale, in their dtypes; planes: of dy[-1], or None."""
    batch, h, w, dim = x.shape
    widths, channel_blocks = widths_of(shorts), ceil_div(dim, CHANNELS)
    places = sum(k * k for k in widths)
    short_partial = line_partial = x
    short_slices = line_slices = row_blocks = column_blocks = columns = 0
    if shorts:
        short_slices, each = sliced(batch * h, max(widths) * channel_blocks)
        short_partial = torch.empty(short_slices, places, dim, dtype=torch.float32, device=x.device)
        launch_short_gradients(
            (short_slices, channel_blocks, sum(widths)), (x, dy, short_partial),
            (h, w, batch * h, each, x.numel() if len(dy) > 1 else 0), D=dim, WIDTHS=widths, PLACES=places,
            W=columns_of(GRADIENT_COLUMNS, w), C=CHANNELS, num_warps=1,
        )  # fmt: skip
    length, groups = (1, dim) if cross is None else (cross.shape[2], cross.shape[1])
    if planes is not None:
        line_slices = max(1, min(batch, ceil_div(PROGRAMS // 2, 2 * dim)))
        line_partial = torch.empty(line_slices, 2 * (w + h) - 2, dim, dtype=torch.float32, device=x.device)
        high, wide = sides_of((h, w))
        launch_cross_gradients(
            (line_slices, dim, 2), (to_planes(x), planes, line_partial), (h, w, dim, batch), BH=high, BW=wide,
            num_warps=16 if max(high, wide) > 64 else 8 if max(high, wide) > 32 else 4, num_stages=2,
        )  # fmt: skip
    elif cross is not None:
        columns = columns_of(GRADIENT_COLUMNS, h, w)
        row_blocks, column_blocks = ceil_div(w, columns), ceil_div(h, columns)
        entries = 2 * (row_blocks + column_blocks) - 2
        line_slices = max(1, min(batch * min(h, w), 2 * PROGRAMS // (entries * channel_blocks)))
        line_partial = torch.empty(line_slices, entries, 2 * columns - 1, dim, dtype=torch.float32, device=x.device)
        launch_line_gradients(
            (line_slices, channel_blocks, entries), (x, dy[-1], line_partial),
            (h, w, batch, row_blocks, column_blocks), D=dim, W=columns, C=CHANNELS, num_warps=1,
        )  # fmt: skip
    dshort = flat_like(shorts) if shorts else x
    dcross = None if cross is None else torch.empty(cross.shape, dtype=cross.dtype, device=x.device)
    shares = dscale = None
    if cross is not None and scale is not None:
        shares, dscale = torch.empty(4 * length, dim, dtype=torch.float32, device=x.device), torch.empty_like(scale)
    each = dim // groups
    padded = next_power_of_2(each)
    at_once = 16 // each if each < 16 and padded == each else 1  # groups of a program
    launch_tap_gradients(
        (places + (0 if cross is None else 4 * length), ceil_div(groups, at_once)),
        (short_partial, line_partial, x if scale is None else scale, dshort, x if dcross is None else dcross,
         x if shares is None else shares),
        (dim, short_slices, line_slices, row_blocks, column_blocks, length, groups, h, w), WIDTHS=widths, PLACES=places,
        CROSS=cross is not None, SCALED=shares is not None, W=columns, R=each, RP=padded, GP=at_once, BS=SLICES,
        num_warps=1,
    )  # fmt: skip
    if cross is not None and shares is not None and dscale is not None:
        launch_scale_gradient(
            (ceil_div(dim, 32),), (shares, cross.contiguous(), dscale), (dim, length, groups, each), BL=16, BC=32,
            num_warps=4,
        )  # fmt: skip
    if not shorts:
        return [], dcross, dscale
    parts = dshort.split([short.numel() for short in shorts])
    return [part.view(short.shape) for part, short in zip(parts, shorts, strict=True)], dcross, dscale


def flat_like(shorts: Sequence[Tensor]) -> Tensor:
    size = sum(short.numel() for short in shorts)
    return torch.empty(size, dtype=shorts[0].dtype, device=shorts[0].device)


# Under batch norms ---------------------------------------------------------------------------------------------------


def forward_norm(
    x: Tensor,
    shorts: Sequence[Tensor],
    cross: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    running: Sequence[tuple[Tensor, Tensor]] | None,
    momentum: float,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The result; all branches `[branches, B, h, w, D]`; mean, 1 / sqrt(var + eps), scale and bias of each, `[4, ...]`;
    the taps laid out, for `backward_norm`.

    Updates the running means and variances."""
    batch, h, w, dim = x.shape
    branches = len(shorts) + (cross is not None)
    columns, down, across = tiles_of(x)
    by_planes = cross is not None and uses_planes(x)
    y = torch.empty(branches, *x.shape, dtype=x.dtype, device=x.device)
    state = torch.empty(4, branches, dim, dtype=torch.float32, device=x.device)
    taps = None
    if shorts or not by_planes:
        taps = laid_out(shorts, None if by_planes else cross, None, (h, w), dim)
    first = 0
    for i in range(branches):
        if i == len(shorts) and by_planes and cross is not None:
            tiles = (1, 1, h, w)  # down and across, and the size of each
            sums = torch.empty(batch, 2, dim, dtype=torch.float32, device=x.device)
            from_planes(crossed(to_planes(x), cross, None, batch, (h, w), sums=sums), y[i])
        else:
            tiles = (down, across, ROWS, columns)
            sums = torch.empty(batch * down * across, 2, dim, dtype=torch.float32, device=x.device)
            assert taps is not None
            convolve(x, taps[first:], widths_of(shorts[i : i + 1]), i == len(shorts), y[i], sums=sums)
            first += shorts[i].shape[-1] ** 2 if i < len(shorts) else 0
        means = running[i] if running else (sums, sums)
        launch_statistics(
            (ceil_div(dim, 8),), (sums, weights[i], biases[i], *means, state),
            (len(sums), *tiles, h, w, float(batch * h * w), dim, eps, momentum), BRANCH=i, N=branches,
            TRACK=running is not None, BP=256, BC=8, num_warps=8,
        )  # fmt: skip
    z = torch.empty_like(x)
    rows = batch * h * w
    launch_apply(
        (ceil_div(rows, 8), ceil_div(dim, 128)), (y, state, z), (rows, rows * dim, dim), N=branches, SILU=silu, BR=8,
        BC=128, num_warps=4,
    )  # fmt: skip
    return z, y, state, taps


def backward_norm(
    dz: Tensor,
    x: Tensor,
    y: Tensor,
    state: Tensor,
    taps: Tensor | None,
    shorts: Sequence[Tensor],
    cross: Tensor | None,
    silu: bool,
) -> tuple[Tensor, list[Tensor], Tensor | None, Tensor]:
    """Gradients of x, of the short kernels, of cross, and `[2 branches, D]`: of each weight, then of each bias."""
    batch, h, w, dim = x.shape
    branches, rows = len(y), batch * h * w
    each = ceil_div(ceil_div(rows, PROGRAMS // 2), 8) * 8
    programs, blocks = ceil_div(rows, each), ceil_div(dim, 128)
    partial = torch.empty(programs, branches + 1, dim, dtype=torch.float32, device=x.device)
    launch_gradient_sums(
        (programs, blocks), (y, dz, state, partial), (rows, each, rows * dim, dim), N=branches, SILU=silu, BR=4, BC=128,
        num_warps=4,
    )  # fmt: skip
    # All biases have one gradient; a copy for each, or autograd would make them.
    sums = torch.empty(2 * branches, dim, dtype=torch.float32, device=x.device)
    size = (branches + 1) * dim
    launch_sum(
        (ceil_div(size, 16),), (partial, sums), (programs, size, dim), COPIES=branches, BS=4 * SLICES, BLOCK=16,
        num_warps=4,
    )  # fmt: skip
    dy = torch.empty_like(y)
    launch_gradient(
        (ceil_div(rows, 8), blocks), (y, dz, state, sums, dy), (rows, rows * dim, dim), N=branches, SILU=silu, BR=8,
        BC=128, num_warps=4,
    )  # fmt: skip
    dx, dshorts, dcross, _ = backward(dy, x, shorts, cross, None, True, True, taps)
    assert dx is not None
    return dx, dshorts, dcross, sums
