"""Launches of the kernels; nothing here looks at a value, so every launch can go into a CUDA graph.

x and its like are dense `[B, h, w, D]`. Sums over programs are combined in a fixed order: results are deterministic.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from chela_plugin.kernels.launching import Launcher

from . import triton as kernels
from . import triton_norm as norms
from . import triton_planes as products

CHANNELS = 64  # of a program: one warp, two a lane, so that bf16 comes in whole lines of 128 bytes
ROWS = 2  # of outputs a program makes; with 8 columns, 32 sums a thread
COLUMNS = (8, 7, 4)  # of outputs; what wastes least of the grid is taken, the widest of equals
PROGRAMS = 2112  # of a gradient of taps: 16 warps on each of an H100's 132 processors
PLANES_FROM, PLANES_TO = 48, 128  # grids whose row and column kernels run as products of matrices, in 16 bits
Pair = tuple[int, int]

lay_out, tiled_convolve = Launcher(kernels.lay_out), Launcher(kernels.convolve)


def columns_of(width: int) -> int:
    """Columns of a program's outputs on a grid this wide."""
    return min(COLUMNS, key=lambda n: triton.cdiv(width, n) * n)


def tiles_of(x: Tensor) -> tuple[int, int, int]:
    """Columns of a tile, and tiles down and across the grid."""
    columns = columns_of(x.shape[2])
    return columns, triton.cdiv(x.shape[1], ROWS), triton.cdiv(x.shape[2], columns)


def laid_out(short: Tensor | None, cross: Tensor | None, scale: Tensor | None, grid: Pair, dim: int) -> Tensor:
    """Taps as the kernels read them, `[taps, D]` in fp32: k x k, the row, the column."""
    h, w = grid
    k = 0 if short is None else short.shape[-1]
    columns = 0 if cross is None else 2 * (w + h) - 2
    like = cross if short is None else short
    assert like is not None
    taps = torch.empty(k * k + columns, dim, dtype=torch.float32, device=like.device)
    pointers = (
        like if short is None else short.contiguous(),
        like if cross is None else cross.contiguous(),
        like if scale is None else scale,
        taps,
    )
    length, groups = (1, 1) if cross is None else (cross.shape[2], cross.shape[1])
    lay_out(
        (len(taps), triton.cdiv(dim, 128)), pointers, (dim, 0, columns, length, groups, dim // groups, h, w), K=k,
        SCALED=scale is not None, BLOCK=128, num_warps=1,
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
        (batch * down * across, triton.cdiv(dim, CHANNELS)), pointers, (h, w, dim, down, across, branch_stride),
        WIDTHS=widths, CROSS=cross, TRANSPOSED=transposed, BIAS=bias is not None, SILU=silu, SAVE=u is not None,
        STATISTICS=sums is not None, R=ROWS, W=columns, C=CHANNELS, num_warps=1,
    )  # fmt: skip


def uses_planes(x: Tensor) -> bool:
    """Whether the cross runs as products of matrices (`triton_planes.py`)."""
    return PLANES_FROM <= max(x.shape[1:3]) <= PLANES_TO and x.element_size() == 2


def crossed(
    x: Tensor, cross: Tensor, scale: Tensor | None, *, transposed: bool = False, sums: Tensor | None = None
) -> Tensor:
    """The row and the column kernel of x, as planes `[D, B h w]`."""
    batch, h, w, dim = x.shape
    rows = batch * h * w
    planes = torch.empty(2, dim, rows, dtype=x.dtype, device=x.device)
    products.to_planes[(triton.cdiv(rows, 64), triton.cdiv(dim, 64))](x, planes[0], rows, dim, BT=64, BD=64)
    high, wide = (max(16, triton.next_power_of_2(n)) for n in (h, w))
    products.cross_planes[(batch, dim)](
        planes[0], cross.contiguous(), cross if scale is None else scale, planes[1], planes if sums is None else sums,
        h, w, dim, batch, cross.shape[1], dim // cross.shape[1], cross.shape[2], SCALED=scale is not None,
        TRANSPOSED=transposed, STATISTICS=sums is not None, BH=high, BW=wide, num_warps=8 if high * wide >= 4096 else 4,
    )  # fmt: skip
    return planes[1]


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
    products.from_planes[(triton.cdiv(rows, 64), triton.cdiv(dim, 64))](
        planes, y if partial is None else partial, planes if bias is None else bias, y, y if u is None else u, rows,
        dim, PARTIAL=partial is not None, BIAS=bias is not None, SILU=silu, SAVE=u is not None, BT=64, BD=64,
    )  # fmt: skip


def widths_of(*shorts: Tensor | None) -> tuple[int, ...]:
    return tuple(short.shape[-1] for short in shorts if short is not None)


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
    grid, dim = (x.shape[1], x.shape[2]), x.shape[3]
    if cross is None or not uses_planes(x):
        taps = laid_out(short, cross, scale, grid, dim)
        convolve(x, taps, widths_of(short), cross is not None, y, bias=bias, silu=silu, u=u)
        return y
    partial = None if short is None else torch.empty_like(x)
    if partial is not None:
        convolve(x, laid_out(short, None, None, grid, dim), widths_of(short), False, partial)
    from_planes(crossed(x, cross, scale), y, partial, bias=bias, silu=silu, u=u)
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    short: Tensor | None,
    cross: Tensor | None,
    scale: Tensor | None,
    want_x: bool,
    want_taps: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, short, cross and scale; dy is that of the sum before SiLU."""
    dx = dshort = dcross = dscale = None
    if want_x:
        dx = gradient_of_x(dy[None], [] if short is None else [short], cross, scale)
    if want_taps and short is not None:
        dshort = short_gradient(x, dy, short)
    if want_taps and cross is not None:
        dcross, dscale = cross_gradient(x, dy, cross, scale)
    return dx, dshort, dcross, dscale


def gradient_of_x(dy: Tensor, shorts: list[Tensor], cross: Tensor | None, scale: Tensor | None) -> Tensor:
    """From dy `[branches, B, h, w, D]`, or `[1, ...]` where all branches have the same: the short ones', the cross'."""
    dx = torch.empty_like(dy[0])
    grid, dim = (dx.shape[1], dx.shape[2]), dx.shape[3]
    stride = dx.numel() if len(dy) > 1 else 0
    planes = cross is not None and uses_planes(dx)
    taps = [laid_out(short, None, None, grid, dim) for short in shorts]
    if cross is not None and not planes:
        taps.append(laid_out(None, cross, scale, grid, dim))
    partial = torch.empty_like(dx) if planes and shorts else dx
    if taps:
        joined = torch.cat(taps) if len(taps) > 1 else taps[0]
        with_cross = cross is not None and not planes
        convolve(dy, joined, widths_of(*shorts), with_cross, partial, transposed=True, branch_stride=stride)
    if planes:
        assert cross is not None
        from_planes(crossed(dy[-1], cross, scale, transposed=True), dx, partial if shorts else None)
    return dx


def sliced(lines: int, others: int) -> Pair:
    """Slices of the lines, and lines in each, so that about PROGRAMS programs run."""
    each = triton.cdiv(lines, max(1, min(lines, PROGRAMS // others)))
    return triton.cdiv(lines, each), each


def summed(partial: Tensor) -> Tensor:
    """Over dim 0, in order."""
    total = torch.empty(partial.shape[1:], dtype=torch.float32, device=partial.device)
    size = total.numel()
    kernels.sum_slices[(triton.cdiv(size, 128),)](partial, total, partial.shape[0], size, BLOCK=128, num_warps=4)
    return total


def short_gradient(x: Tensor, dy: Tensor, short: Tensor) -> Tensor:
    """`[D, k, k]` in short's dtype."""
    batch, h, w, dim = x.shape
    k, blocks = short.shape[-1], triton.cdiv(dim, CHANNELS)
    slices, each = sliced(batch * h, k * blocks)
    partial = torch.empty(slices, k, k, dim, dtype=torch.float32, device=x.device)
    kernels.short_gradient[(slices, blocks, k)](
        x, dy, partial, h, w, dim, batch * h, each, K=k, W=columns_of(w), C=CHANNELS, num_warps=1
    )
    return summed(partial).permute(2, 0, 1).to(short.dtype).contiguous()


def line_gradient(x: Tensor, dy: Tensor, along_row: bool) -> Tensor:
    """Gradient of a row kernel of lags 1 - w to w - 1, or of a column kernel: `[2 w - 1, D]` in fp32."""
    batch, h, w, dim = x.shape
    count, inner = (w, h) if along_row else (h, w)
    steps = (dim, w * dim) if along_row else (w * dim, dim)
    columns = columns_of(count)
    blocks, channel_blocks = triton.cdiv(count, columns), triton.cdiv(dim, CHANNELS)
    slices, each = sliced(batch * inner, (2 * blocks - 1) * channel_blocks)
    partial = torch.empty(slices, 2 * blocks - 1, 2 * columns - 1, dim, dtype=torch.float32, device=x.device)
    kernels.line_gradient[(slices, channel_blocks, 2 * blocks - 1)](
        x, dy, partial, count, dim, steps[0], inner, steps[1], h * w * dim, batch * inner, each, blocks, W=columns,
        C=CHANNELS, num_warps=1,
    )  # fmt: skip
    found = summed(partial)
    # Entry e holds lags (e - blocks + 1) columns + (1 - columns to columns - 1): neighbours share all but one.
    lags = torch.zeros(2 * blocks, columns, dim, dtype=torch.float32, device=x.device)
    lags[1:] += found[:, columns - 1 :]
    lags[:-1, 1:] += found[:, : columns - 1]
    return lags.flatten(0, 1)[blocks * columns - count + 1 : blocks * columns + count]


def cross_gradient(x: Tensor, dy: Tensor, cross: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Of cross `[4, G, L]` and of scale `[D]`, in their dtypes."""
    groups, dim = cross.shape[1], x.shape[3]
    sides = torch.zeros(4, cross.shape[2], dim, dtype=torch.float32, device=x.device)
    for first, along_row in ((0, True), (2, False)):
        lags = line_gradient(x, dy, along_row)
        count = len(lags) // 2 + 1
        sides[first, :count] = lags[count - 1 :]
        sides[first + 1, 1:count] = lags[: count - 1].flip(0)
    dscale = None
    if scale is not None:
        given = cross.float().repeat_interleave(dim // groups, dim=1).transpose(1, 2)  # [4, L, D]
        dscale = (sides * given).sum((0, 1)).to(scale.dtype)
        sides = sides * scale.float()
    dcross = sides.unflatten(2, (groups, -1)).sum(-1).transpose(1, 2)
    return dcross.to(cross.dtype).contiguous(), dscale


# Under batch norms ---------------------------------------------------------------------------------------------------


def forward_norm(
    x: Tensor,
    shorts: list[Tensor],
    cross: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor],
    running: list[tuple[Tensor, Tensor]] | None,
    momentum: float,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result; all branches `[branches, B, h, w, D]`; mean, 1 / sqrt(var + eps), scale and bias of each, `[4, ...]`.

    Updates the running means and variances."""
    batch, h, w, dim = x.shape
    branches = len(shorts) + (cross is not None)
    columns, down, across = tiles_of(x)
    y = torch.empty(branches, *x.shape, dtype=x.dtype, device=x.device)
    state = torch.empty(4, branches, dim, dtype=torch.float32, device=x.device)
    torch.stack(biases, out=state[3]) if biases[0].dtype == torch.float32 else state[3].copy_(torch.stack(biases))
    for i in range(branches):
        short, long = (shorts[i], None) if i < len(shorts) else (None, cross)
        if long is not None and uses_planes(x):
            tiles = (1, 1, h, w)  # down and across, and the size of each
            sums = torch.empty(batch, 2, dim, dtype=torch.float32, device=x.device)
            from_planes(crossed(x, long, None, sums=sums), y[i])
        else:
            tiles = (down, across, ROWS, columns)
            sums = torch.empty(batch * down * across, 2, dim, dtype=torch.float32, device=x.device)
            taps = laid_out(short, long, None, (h, w), dim)
            convolve(x, taps, widths_of(short), long is not None, y[i], sums=sums)
        means = running[i] if running else (sums, sums)
        norms.statistics[(triton.cdiv(dim, 32),)](
            sums, weights[i], *means, state[0, i], state[1, i], state[2, i], len(sums), *tiles, h, w,
            float(batch * h * w), dim, eps, momentum, TRACK=running is not None, BP=64, BC=32, num_warps=8,
        )  # fmt: skip
    z = torch.empty_like(x)
    rows = batch * h * w
    norms.apply[(triton.cdiv(rows, 8), triton.cdiv(dim, 128))](
        y, state[0], state[2], state[3], z, rows, rows * dim, dim, N=branches, SILU=silu, BR=8, BC=128, num_warps=4
    )
    return z, y, state


def backward_norm(
    dz: Tensor, x: Tensor, y: Tensor, state: Tensor, shorts: list[Tensor], cross: Tensor | None, silu: bool
) -> tuple[Tensor, list[Tensor], Tensor | None, Tensor]:
    """Gradients of x, of the short kernels, of cross, and `[branches + 1, D]`: of each weight, then of every bias."""
    batch, h, w, dim = x.shape
    branches, rows = len(y), batch * h * w
    mean, rstd, scale, bias = state
    each = triton.cdiv(triton.cdiv(rows, PROGRAMS // 2), 8) * 8
    programs, blocks = triton.cdiv(rows, each), triton.cdiv(dim, 128)
    partial = torch.empty(programs, branches + 1, dim, dtype=torch.float32, device=x.device)
    tensors = (y, dz, mean, rstd, scale, bias)
    norms.gradient_sums[(programs, blocks)](
        *tensors, partial, rows, each, rows * dim, dim, N=branches, SILU=silu, BR=4, BC=128, num_warps=4
    )
    sums = summed(partial)
    dy = torch.empty_like(y)
    norms.gradient[(triton.cdiv(rows, 8), blocks)](
        *tensors, sums, dy, rows, rows * dim, dim, N=branches, SILU=silu, BR=8, BC=128, num_warps=4
    )
    dx = gradient_of_x(dy, shorts, cross, None)
    dshorts = [short_gradient(x, dy[i], short) for i, short in enumerate(shorts)]
    dcross = None if cross is None else cross_gradient(x, dy[-1], cross, None)[0]
    return dx, dshorts, dcross, sums
