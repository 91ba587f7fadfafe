"""Triton kernels that write all taps of a short-long convolution in one launch, and take their gradients back.

    taps[d, column] = scales[last, d] long[row(d, lag), |lag|] + sum_b scales[b, d] kernel_b[d, place of lag]

A program holds the `R` channels that share a long filter, and a block of columns, so that a long tap is made once for
them. `long` is read, or is the multiscale filter (`reference.py`), made here. The lag of a column is column - centre;
row(d, lag) is d's group, or behind lag 0 the same group of the second half of the rows.

The gradient goes in two launches: `fold_gradient` sums over channels what each long tap gets, and over lags what each
scale gets; `generator_gradient` goes on to the sub-kernels, and to the short kernels. Every sum has a fixed order.
"""

import triton
import triton.language as tl


@triton.jit
def _scale_of(lag, d: tl.constexpr):
    """The scale that holds a lag, floor(log2(lag / d + 1)), and its factor 2^scale."""
    q = lag // d + 1
    q = q & ~(q >> 1)  # keeps the highest bit and cannot round up to the next power of two in 24 bits
    scale = (q.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
    return scale, tl.full(lag.shape, 1, tl.int32) << scale


@triton.jit
def _place(lag, factor, d: tl.constexpr):
    """Where a lag falls among the nodes 0..d-1 of its scale; edges are held."""
    within = (lag - d * (factor - 1)).to(tl.float32)
    return tl.minimum(tl.maximum((within + 0.5) / factor.to(tl.float32) - 0.5, 0.0), d - 1.0)


@triton.jit
def _multiscale(u, ratio_logit, row, lag, live, S: tl.constexpr, d: tl.constexpr):
    """The multiscale tap of each lag >= 0; row: of each lag."""
    scale, factor = _scale_of(lag, d)
    place = _place(lag, factor, d)
    node = place.to(tl.int32)
    share = place - node.to(tl.float32)
    at = u + (row * S + tl.minimum(scale, S - 1)) * d
    low = tl.load(at + node, live, other=0.0).to(tl.float32)
    high = tl.load(at + tl.minimum(node + 1, d - 1), live, other=0.0).to(tl.float32)
    half = 0.5 / (1 + tl.exp(-tl.load(ratio_logit + row, live, other=0.0).to(tl.float32)))
    return (low + share * (high - low)) * tl.exp2(scale.to(tl.float32) * tl.log2(half))


@triton.jit
def _long(source, ratio_logit, g, groups, lag, live, length, S: tl.constexpr, SUB: tl.constexpr):
    """The long tap at each lag; behind lag 0 of the second half of the rows. SUB: taps of a sub-kernel, or 0."""
    row = tl.where(lag < 0, g + groups, g)
    away = tl.abs(lag)
    if SUB > 0:
        return _multiscale(source, ratio_logit, row, away, live, S, SUB)
    else:
        return tl.load(source + row.to(tl.int64) * length + away, live, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["centre", "length"])
def fold(source, ratio_logit, short, scales, taps, D, R, groups, centre, length, columns,
         LONG: tl.constexpr, S: tl.constexpr, SUB: tl.constexpr, WIDTHS: tl.constexpr, KERNELS: tl.constexpr,
         LONG_SCALE: tl.constexpr, SHORT_SCALED: tl.constexpr, TWO_SIDED: tl.constexpr,
         BLOCK: tl.constexpr):  # fmt: skip
    """Program (group, block of columns). short: all KERNELS short kernels one behind the other; LONG_SCALE: the row
    of `scales` for the long taps, or -1 for none."""
    g = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    lag = column - centre
    long = tl.zeros((BLOCK,), tl.float32)
    if LONG:
        long = _long(source, ratio_logit, g, groups, lag, inside, length, S, SUB)
    for c in range(R):
        d = g * R + c
        there = d < D
        total = long
        if LONG_SCALE >= 0:
            total = long * tl.load(scales + LONG_SCALE * D + d, there, other=0.0).to(tl.float32)
        base = short
        for b in tl.static_range(KERNELS):
            at = lag + ((WIDTHS[b] - 1) // 2 if TWO_SIDED else 0)
            held = there & (at >= 0) & (at < WIDTHS[b])
            tap = tl.load(base + d * WIDTHS[b] + at, held, other=0.0).to(tl.float32)
            if SHORT_SCALED:
                tap *= tl.load(scales + b * D + d, there, other=0.0).to(tl.float32)
            total += tap
            base += D * WIDTHS[b]
        tl.store(taps + d.to(tl.int64) * columns + column, total, inside & there)


@triton.jit(do_not_specialize=["centre", "length", "blocks"])
def fold_gradient(source, ratio_logit, scales, dtaps, dlong, shares, D, R, groups, centre, length, columns, blocks,
                  S: tl.constexpr, SUB: tl.constexpr, LONG_SCALE: tl.constexpr, TWO_SIDED: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    """dlong `[rows, length]`, and this block's share of each long scale, in `[D, blocks]`."""
    g = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    lag = column - centre
    long = tl.zeros((BLOCK,), tl.float32)
    if LONG_SCALE >= 0:
        long = _long(source, ratio_logit, g, groups, lag, inside, length, S, SUB)
    total = tl.zeros((BLOCK,), tl.float32)
    for c in range(R):
        d = g * R + c
        grad = tl.load(dtaps + d.to(tl.int64) * columns + column, inside, other=0.0).to(tl.float32)
        if LONG_SCALE >= 0:
            tl.store(shares + d * blocks + tl.program_id(1), tl.sum(grad * long))
            grad *= tl.load(scales + LONG_SCALE * D + d).to(tl.float32)
        total += grad
    row = tl.where(lag < 0, g + groups, g).to(tl.int64)
    tl.store(dlong + row * length + tl.abs(lag), total.to(dlong.dtype.element_ty), inside)
    if TWO_SIDED:  # the second half's tap at lag 0 is unused
        unused = dlong + (g + groups).to(tl.int64) * length + lag
        tl.store(unused, tl.zeros((BLOCK,), dlong.dtype.element_ty), inside & (lag == 0))


@triton.jit(do_not_specialize=["length", "reached"])
def sub_kernel_gradient(source, ratio_logit, dlong, dsource, dratio, length, reached, S: tl.constexpr,
                        SUB: tl.constexpr, NODES: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Of one row of multiscale filters. `reached`: scales that hold any of the `length` lags."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, NODES)
    j = tl.arange(0, BLOCK)
    ratio = 1 / (1 + tl.exp(-tl.load(ratio_logit + row).to(tl.float32)))
    last = tl.zeros((NODES,), tl.float32)
    slope = 0.0
    for i in range(reached):
        size = tl.full((BLOCK,), 1, tl.int32) << i
        start = SUB * tl.max(size - 1, 0)
        end = tl.minimum(start + SUB * tl.max(size, 0), length)
        found = tl.zeros((NODES,), tl.float32)
        for first in range(start, end, BLOCK):
            lag = first + j
            grad = tl.load(dlong + row * length + lag, lag < end, other=0.0)
            weight = 1 - tl.abs(_place(lag, size, SUB)[None, :] - n.to(tl.float32)[:, None])
            found += tl.sum(tl.maximum(weight, 0.0) * grad[None, :], 1)
        found *= tl.exp2(i * tl.log2(ratio / 2))
        node = (row * S + tl.minimum(i, S - 1)) * SUB + n
        slope += i * tl.sum(found * tl.load(source + node, n < SUB, other=0.0).to(tl.float32))
        if i >= S - 1:  # the last sub-kernel makes all further scales
            last += found
            found = last
        tl.store(dsource + node, found.to(dsource.dtype.element_ty), n < SUB)
    for i in range(reached, S):
        tl.store(dsource + (row * S + i) * SUB + n, tl.zeros((NODES,), dsource.dtype.element_ty), n < SUB)
    tl.store(dratio + row, (slope * (1 - ratio)).to(dratio.dtype.element_ty))


@triton.jit(do_not_specialize=["centre", "blocks"])
def short_gradient(short, scales, dtaps, shares, dshort, dscales, D, centre, columns, blocks,
                   WIDTHS: tl.constexpr, KERNELS: tl.constexpr, ROWS: tl.constexpr, SHORT_SCALED: tl.constexpr,
                   LONG: tl.constexpr, TWO_SIDED: tl.constexpr, NODES: tl.constexpr, BLOCK: tl.constexpr,
                   CHANNELS: tl.constexpr):  # fmt: skip
    """Of CHANNELS channels: their short kernels, and their column of all ROWS of scales."""
    d = (tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)).to(tl.int64)
    there = d < D
    n = tl.arange(0, NODES)
    base = 0
    for b in tl.static_range(KERNELS):
        at = centre + n - ((WIDTHS[b] - 1) // 2 if TWO_SIDED else 0)
        held = there[:, None] & (n < WIDTHS[b])[None, :]
        grad = tl.load(dtaps + d[:, None] * columns + at[None, :], held, other=0.0).to(tl.float32)
        place = base + d[:, None] * WIDTHS[b] + n[None, :]
        if SHORT_SCALED:
            tap = tl.load(short + place, held, other=0.0).to(tl.float32)
            tl.store(dscales + b * D + d, tl.sum(grad * tap, 1).to(dscales.dtype.element_ty), there)
            grad *= tl.load(scales + b * D + d, there, other=0.0).to(tl.float32)[:, None]
        tl.store(dshort + place, grad.to(dshort.dtype.element_ty), held)
        base += D * WIDTHS[b]
    FIRST: tl.constexpr = KERNELS if SHORT_SCALED else 0
    if ROWS > FIRST:
        total = tl.zeros((CHANNELS,), tl.float32)
        if LONG:
            j = tl.arange(0, BLOCK)
            for first in range(0, blocks, BLOCK):
                live = there[:, None] & (first + j < blocks)[None, :]
                total += tl.sum(tl.load(shares + d[:, None] * blocks + first + j[None, :], live, other=0.0), 1)
        tl.store(dscales + FIRST * D + d, total.to(dscales.dtype.element_ty), there)
