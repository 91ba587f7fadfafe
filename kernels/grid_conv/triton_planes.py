"""Triton kernels of the row and column kernels on large grids: products of each channel's image with Toeplitz matrices.

    Y = X R + C X        R[j', j] = row[j - j']        C[i, i'] = column[i - i']

for every image X `[h, w]` of every channel, on tensor cores, operands in x's dtype and sums in fp32. The gradients are
sums along the diagonals of X' dY for the row and of dY X' for the column, each summed over the images. The images must
lie as planes, `[D, B, h, w]`, so a change of layout comes before and another behind, which also adds what the short
kernels gave, bias and SiLU. The vectors of `triton.py` do h + w multiplications a number instead; from grids of about
32 on these products and both changes of layout take less in training.
"""

import triton
import triton.language as tl


@triton.jit
def to_planes(x, planes, rows, D, BT: tl.constexpr, BD: tl.constexpr):
    """`[rows, D]` to `[D, rows]`."""
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    live = (t < rows)[:, None] & (d < D)[None, :]
    block = tl.load(x + t[:, None] * D + d[None, :], mask=live, other=0.0)
    tl.store(planes + d.to(tl.int64)[None, :] * rows + t[:, None], block, mask=live)


@triton.jit
def _toeplitz(cross, side, lag, live, groups, L):
    """Taps of two sides, the one of lags at least 0 and the next one, at a matrix of lags."""
    row = side * groups + tl.where(lag < 0, groups, 0)
    return tl.load(cross + row * L + tl.abs(lag), mask=live, other=0.0)


@triton.jit(do_not_specialize=["images"])
def cross_planes(x, cross, scale, y, sums, h, w, D, images, groups, per_group, L,
                 SCALED: tl.constexpr, TRANSPOSED: tl.constexpr, STATISTICS: tl.constexpr, BH: tl.constexpr,
                 BW: tl.constexpr):  # fmt: skip
    """Program: one image of one channel. sums, if STATISTICS: `[images, 2, D]`, as `convolve` has them."""
    image, d = tl.program_id(0), tl.program_id(1)
    i, j = tl.arange(0, BH), tl.arange(0, BW)
    plane = (d.to(tl.int64) * images + image) * h * w + i[:, None] * w + j[None, :]
    live = (i < h)[:, None] & (j < w)[None, :]
    block = tl.load(x + plane, mask=live, other=0.0)
    taps = cross + d // per_group * L
    along, down = j[None, :] - j[:, None], i[:, None] - i[None, :]
    if TRANSPOSED:
        along, down = -along, -down
    row = _toeplitz(taps, 0, along, (j < w)[:, None] & (j < w)[None, :], groups, L).to(block.dtype)
    column = _toeplitz(taps, 2, down, (i < h)[:, None] & (i < h)[None, :], groups, L).to(block.dtype)
    out = tl.dot(column, block, tl.dot(block, row))
    if SCALED:
        out *= tl.load(scale + d).to(tl.float32)
    tl.store(y + plane, out, mask=live)
    if STATISTICS:
        total = tl.sum(tl.where(live, out, 0.0))
        away = tl.where(live, out - total / (h * w).to(tl.float32), 0.0)
        tl.store(sums + image * 2 * D + d, total)
        tl.store(sums + image * 2 * D + D + d, tl.sum(away * away))


@triton.jit
def _diagonals(product, N: tl.constexpr):
    """Sums of product[a, b] over b - a = lag and over a - b = lag, for lags 0 to N - 1."""
    i = tl.arange(0, N)
    lag = i[:, None] + i[None, :]
    kept = lag < N
    lag = tl.minimum(lag, N - 1)
    ahead = tl.sum(tl.where(kept, tl.gather(product, lag, 1), 0.0), 0)
    behind = tl.sum(tl.where(kept, tl.gather(product, lag, 0), 0.0), 1)
    return ahead, behind


@triton.jit
def _store_lags(dtaps, ahead, behind, count, D, N: tl.constexpr):
    lag = tl.arange(0, N)
    tl.store(dtaps + (count - 1 + lag) * D, ahead, mask=lag < count)
    tl.store(dtaps + (count - 1 - lag) * D, behind, mask=(lag > 0) & (lag < count))


@triton.jit(do_not_specialize=["images"])
def cross_gradients(x, dy, dtaps, h, w, D, images, BH: tl.constexpr, BW: tl.constexpr):
    """dtaps `[slices, 2 w - 1 + 2 h - 1, D]`, by lag, the row's first. Program: a slice of the images of one channel,
    of the row or the column."""
    d = tl.program_id(1)
    per_slice = tl.cdiv(images, tl.num_programs(0))
    start = tl.program_id(0) * per_slice
    end = tl.minimum(start + per_slice, images)
    i, j = tl.arange(0, BH), tl.arange(0, BW)
    live = (i < h)[:, None] & (j < w)[None, :]
    plane = d.to(tl.int64) * images * h * w + i[:, None] * w + j[None, :]
    dtaps += tl.program_id(0) * (2 * (w + h) - 2) * D + d
    if tl.program_id(2) == 0:
        row = tl.zeros((BW, BW), tl.float32)
        for image in range(start, end):
            block = tl.load(x + plane + image * h * w, mask=live, other=0.0)
            row = tl.dot(tl.trans(block), tl.load(dy + plane + image * h * w, mask=live, other=0.0), row)
        ahead, behind = _diagonals(row, BW)
        _store_lags(dtaps, ahead, behind, w, D, BW)
    else:
        column = tl.zeros((BH, BH), tl.float32)
        for image in range(start, end):
            block = tl.load(x + plane + image * h * w, mask=live, other=0.0)
            column = tl.dot(tl.load(dy + plane + image * h * w, mask=live, other=0.0), tl.trans(block), column)
        behind, ahead = _diagonals(column, BH)  # dY X' has the output's row first
        _store_lags(dtaps + (2 * w - 1) * D, ahead, behind, h, D, BH)


@triton.jit
def from_planes(planes, partial, bias, y, u, rows, D, PARTIAL: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr,
                SAVE: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """`[D, rows]` to `[rows, D]`, plus `partial` of that order, bias, and SiLU; u: what SiLU was taken of."""
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    live = (t < rows)[:, None] & (d < D)[None, :]
    at = t[:, None] * D + d[None, :]
    out = tl.load(planes + d.to(tl.int64)[None, :] * rows + t[:, None], mask=live, other=0.0).to(tl.float32)
    if PARTIAL:
        out += tl.load(partial + at, mask=live, other=0.0).to(tl.float32)
    if BIAS:
        out += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    if SAVE:
        tl.store(u + at, out, mask=live)
    if SILU:
        out *= tl.sigmoid(out)
    tl.store(y + at, out, mask=live)
