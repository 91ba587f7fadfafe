"""Triton kernels of the convolution on a grid: short k x k kernels, a row and a column kernel as long as the grid.

    y[i, j] = sum_(p, q) short[p, q] x[i - p, j - q] + sum_q row[q] x[i, j - q] + sum_p column[p] x[i - p, j]

for each channel, zeros outside. Channels stand innermost, `[B, h, w, D]`, and a warp takes 64 of them, two a lane, so
that every load and store is one full line and no layout changes. All else is in registers: a program makes R x W
outputs, one vector over channels each, and every x that it loads meets as many taps as it can there (a tuple of
vectors stands for an array in registers). Taps come as `[taps, D]` in fp32, all sums run in fp32 in a fixed order.

Tensor cores need the image of one channel as a matrix, so a change of layout both ways: `triton_planes.py`, for large
grids.
"""

# ruff: noqa: RUF005  # Triton joins tuples, which grow so; it has no starred ones.
# mypy: disable-error-code="assignment"
import triton
import triton.language as tl


@triton.jit
def _zeros(N: tl.constexpr, C: tl.constexpr):
    vectors = ()
    for _ in tl.static_range(N):
        vectors = vectors + (tl.zeros((C,), tl.float32),)
    return vectors


@triton.jit
def _line(start, step, first, count, there, N: tl.constexpr):
    """N neighbours of a line from place `first` on; zeros where the line, of `count` places, has none."""
    vectors = ()
    for j in tl.static_range(N):
        at = first + j
        live = there & (at >= 0) & (at < count)
        vectors = vectors + (tl.load(start + at * step, mask=live, other=0.0).to(tl.float32),)
    return vectors


@triton.jit
def _slope(u):
    """Derivative of SiLU."""
    s = tl.sigmoid(u)
    return s + u * s * (1 - s)


@triton.jit(do_not_specialize=["places", "columns"])
def lay_out(short, cross, scale, taps, D, places, columns, L, GROUPS, per_group, h, w,
            K: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """All taps channel innermost: `[K K + columns, D]`, a short kernel `[D, K, K]`, then cross `[4, GROUPS, L]` as a
    row of lags 1 - w to w - 1 and a column of lags 1 - h to h - 1. Program: one tap of BLOCK channels."""
    m = tl.program_id(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = d < D
    if m < K * K:
        tap = tl.load(short + d * (K * K) + m, mask=there, other=0.0).to(tl.float32)
    else:
        m -= K * K
        along = m < 2 * w - 1
        lag = tl.where(along, m - (w - 1), m - (2 * w - 1) - (h - 1))
        side = tl.where(along, 0, 2) + tl.where(lag < 0, 1, 0)
        source = cross + (side * GROUPS + d // per_group) * L + tl.abs(lag)
        tap = tl.load(source, mask=there, other=0.0).to(tl.float32)
        if SCALED:
            tap *= tl.load(scale + d, mask=there, other=0.0).to(tl.float32)
    tl.store(taps + tl.program_id(0) * D + d, tap, mask=there)


@triton.jit
def _short(out, source, tap, i0, j0, h, w, D, there,
           K: tl.constexpr, TRANSPOSED: tl.constexpr, R: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """`out` of the tile at (i0, j0), plus a K x K convolution."""
    HALF: tl.constexpr = K // 2
    # Input row i0 - HALF + n meets tap n - r of output row r, seen from the top.
    for n in range(tl.maximum(0, HALF - i0), tl.minimum(K + R - 1, h - i0 + HALF)):
        row = _line(source + (i0 - HALF + n) * w * D, D, j0 - HALF, w, there, W + 2 * HALF)
        for q in tl.static_range(K):
            updated = ()
            for r in tl.static_range(R):
                p = n - r
                place = p * K + q if TRANSPOSED else (K - 1 - p) * K + (K - 1 - q)
                t = tl.load(tap + place * D, mask=there & (p >= 0) & (p < K), other=0.0)
                for j in tl.static_range(W):
                    updated = updated + (out[r * W + j] + t * row[j + q],)
            out = updated
    return out


@triton.jit(do_not_specialize=["tile_rows", "tile_columns"])
def convolve(
    x, taps, bias, y, u, sums, h, w, D, tile_rows, tile_columns, branch_stride,
    WIDTHS: tl.constexpr, CROSS: tl.constexpr, TRANSPOSED: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr,
    SAVE: tl.constexpr, STATISTICS: tl.constexpr, R: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """WIDTHS: of the short kernels, whose taps lie behind one another, then those of row and column. Kernel b reads
    x + b branch_stride, the cross the last one. TRANSPOSED: the gradient of x, lags negated.

    u: the sum before SiLU, if SAVE. sums, if STATISTICS: `[programs, 2, D]`, the sum over the program's outputs and
    the sum of squared distances from their mean (Chan et al. 1983: they combine without cancellation).
    """
    tile = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * C + tl.arange(0, C)
    there = c < D
    j0 = (tile % tile_columns).to(tl.int32) * W
    i0 = (tile // tile_columns % tile_rows).to(tl.int32) * R
    image = tile // (tile_columns * tile_rows) * h * w * D
    source = x + image + c
    tap = taps + c
    out = _zeros(R * W, C)

    for b in tl.static_range(len(WIDTHS)):
        out = _short(out, source, tap, i0, j0, h, w, D, there, WIDTHS[b], TRANSPOSED, R, W)
        tap += WIDTHS[b] * WIDTHS[b] * D
        source += branch_stride

    if CROSS:
        middle = tap + (w - 1) * D
        for first in range(0, w, W):
            updated = ()
            for r in tl.static_range(R):
                row = _line(source + (i0 + r) * w * D, D, first, w, there & (i0 + r < h), W)
                line = ()
                for j in tl.static_range(W):
                    line = line + (out[r * W + j],)
                for s in tl.static_range(2 * W - 1):
                    lag = j0 - first + s - (W - 1)
                    known = there & (lag > -w) & (lag < w)
                    t = tl.load(middle - lag * D if TRANSPOSED else middle + lag * D, mask=known, other=0.0)
                    after = ()
                    for j in tl.static_range(W):
                        if j - s + (W - 1) >= 0 and j - s + (W - 1) < W:
                            after = after + (line[j] + t * row[j - s + (W - 1)],)
                        else:
                            after = after + (line[j],)
                    line = after
                updated = updated + line
            out = updated
        middle = tap + (2 * w - 1 + h - 1) * D
        for n in range(h):
            row = _line(source + n * w * D, D, j0, w, there, W)
            updated = ()
            for r in tl.static_range(R):
                lag = i0 + r - n
                t = tl.load(middle - lag * D if TRANSPOSED else middle + lag * D, mask=there & (lag < h), other=0.0)
                for j in tl.static_range(W):
                    updated = updated + (out[r * W + j] + t * row[j],)
            out = updated

    if STATISTICS:
        total = tl.zeros((C,), tl.float32)
        for r in tl.static_range(R):
            for j in tl.static_range(W):
                total += tl.where((i0 + r < h) & (j0 + j < w), out[r * W + j], 0.0)
        mean = total / (tl.minimum(R, h - i0) * tl.minimum(W, w - j0)).to(tl.float32)
        spread = tl.zeros((C,), tl.float32)
        for r in tl.static_range(R):
            for j in tl.static_range(W):
                away = tl.where((i0 + r < h) & (j0 + j < w), out[r * W + j] - mean, 0.0)
                spread += away * away
        tl.store(sums + tile * 2 * D + c, total, mask=there)
        tl.store(sums + tile * 2 * D + D + c, spread, mask=there)

    shift = tl.zeros((C,), tl.float32)
    if BIAS:
        shift = tl.load(bias + c, mask=there, other=0.0).to(tl.float32)
    for r in tl.static_range(R):
        for j in tl.static_range(W):
            value = out[r * W + j] + shift
            at = image + ((i0 + r) * w + j0 + j) * D + c
            live = there & (i0 + r < h) & (j0 + j < w)
            if SAVE:
                tl.store(u + at, value, mask=live)
            if SILU:
                value *= tl.sigmoid(value)
            tl.store(y + at, value, mask=live)


@triton.jit(do_not_specialize=["lines", "per_slice"])
def short_gradient(x, dy, dtaps, h, w, D, lines, per_slice,
                   K: tl.constexpr, W: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """dtaps `[slices, K, K, D]`: sums over `per_slice` of the `lines` rows of all images. Program: one row of taps."""
    p = tl.program_id(2)  # of lag p - HALF
    c = tl.program_id(1) * C + tl.arange(0, C)
    there = c < D
    HALF: tl.constexpr = K // 2
    found = _zeros(K, C)
    start = tl.program_id(0) * per_slice
    for line in range(start, tl.minimum(start + per_slice, lines)):
        other = line % h - (p - HALF)
        inside = there & (other >= 0) & (other < h)
        at = tl.cast(line, tl.int64) * w * D + c
        for j0 in range(0, w, W):
            g = _line(dy + at, D, j0, w, inside, W)
            row = _line(x + at - (p - HALF) * w * D, D, j0 - HALF, w, inside, W + 2 * HALF)
            updated = ()
            for q in tl.static_range(K):  # of lag q - HALF
                total = found[q]
                for j in tl.static_range(W):
                    total += g[j] * row[j + 2 * HALF - q]
                updated = updated + (total,)
            found = updated
    for q in tl.static_range(K):
        tl.store(dtaps + ((tl.program_id(0) * K + p) * K + q) * D + c, found[q], mask=there)


@triton.jit(do_not_specialize=["lines", "per_slice", "blocks"])
def line_gradient(x, dy, dtaps, count, D, step, inner, inner_step, outer_step, lines, per_slice, blocks,
                  W: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """Gradient of a kernel along lines of `count` places, `step` apart; line n begins at
    n // inner outer_step + n % inner inner_step. Program: outputs and inputs `delta` blocks of W apart.

    dtaps `[slices, 2 blocks, 2 W, D]`: at [., e, s] lag (e - blocks) W + s - W.
    """
    delta = tl.program_id(2) - blocks + 1
    c = tl.program_id(1) * C + tl.arange(0, C)
    there = c < D
    found = _zeros(2 * W - 1, C)
    start = tl.program_id(0) * per_slice
    for line in range(start, tl.minimum(start + per_slice, lines)):
        at = tl.cast(line // inner, tl.int64) * outer_step + line % inner * inner_step + c
        for block in range(tl.maximum(delta, 0), tl.minimum(blocks, blocks + delta)):
            g = _line(dy + at, step, block * W, count, there, W)
            row = _line(x + at, step, (block - delta) * W, count, there, W)
            updated = ()
            for s in tl.static_range(2 * W - 1):
                total = found[s]
                for j in tl.static_range(W):
                    if j - s + (W - 1) >= 0 and j - s + (W - 1) < W:
                        total += g[j] * row[j - s + (W - 1)]
                updated = updated + (total,)
            found = updated
    for s in tl.static_range(2 * W - 1):
        place = (tl.program_id(0) * (2 * blocks - 1) + tl.program_id(2)) * (2 * W - 1) + s
        tl.store(dtaps + place.to(tl.int64) * D + c, found[s], mask=there)


@triton.jit(do_not_specialize=["slices"])
def sum_slices(partial, total, slices, size, BLOCK: tl.constexpr):
    """`[slices, size]` to `[size]`, one after the other."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    found = tl.zeros((BLOCK,), tl.float32)
    for s in range(slices):
        found += tl.load(partial + tl.cast(s, tl.int64) * size + at, mask=at < size, other=0.0)
    tl.store(total + at, found, mask=at < size)
