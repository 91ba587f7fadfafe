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
def _there(c, D: tl.constexpr, C: tl.constexpr):
    """Which channels there are; where all programs are whole, the compiler then drops the question."""
    if D % C == 0:
        return tl.full((C,), 1, tl.int1)
    else:
        return c < D


@triton.jit
def _line(start, step, first, count, there, N: tl.constexpr):
    """N neighbours of a line from place `first` on; zeros where the line, of `count` places, has none.

    Addresses are a base and, where `step` is constant, offsets that the loads' instructions hold. One comparison,
    without sign, asks for both ends."""
    start += first * step
    end = tl.cast(count, tl.uint32)
    vectors = ()
    for j in tl.static_range(N):
        live = there & (tl.cast(first + j, tl.uint32) < end)
        vectors = vectors + (tl.load(start, mask=live, other=0.0).to(tl.float32),)
        start += step
    return vectors


@triton.jit
def _slope(u):
    """Derivative of SiLU."""
    s = tl.sigmoid(u)
    return s + u * s * (1 - s)


@triton.jit
def lay_out(short, cross, scale, taps, D, L, GROUPS, per_group, h, w, WIDTHS: tl.constexpr,
            CROSS: tl.constexpr, SCALED: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """All taps channel innermost: short kernels `[D, k, k]`, one behind the other, as `[k k, D]` each, then cross
    `[4, GROUPS, L]` as a row of lags 1 - w to w - 1 and a column of lags 1 - h to h - 1, PAD zeros around each.
    Program: one tap of BLOCK channels."""
    m = tl.program_id(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = d < D
    for b in tl.static_range(len(WIDTHS)):
        if (m >= 0) & (m < WIDTHS[b] * WIDTHS[b]):
            tap = tl.load(short + d * (WIDTHS[b] * WIDTHS[b]) + m, mask=there, other=0.0).to(tl.float32)
            tl.store(taps + tl.program_id(0) * D + d, tap, mask=there)
        m -= WIDTHS[b] * WIDTHS[b]
        short += D * WIDTHS[b] * WIDTHS[b]
    if CROSS and m >= 0:
        row = 2 * w - 1 + 2 * PAD
        count = tl.where(m < row, w, h)
        lag = tl.where(m < row, m, m - row) - PAD - (count - 1)
        side = tl.where(m < row, 0, 2) + tl.where(lag < 0, 1, 0)
        source = cross + (side * GROUPS + d // per_group) * L + tl.abs(lag)
        tap = tl.load(source, mask=there & (tl.abs(lag) < count), other=0.0).to(tl.float32)
        if SCALED:
            tap *= tl.load(scale + d, mask=there, other=0.0).to(tl.float32)
        tl.store(taps + tl.program_id(0) * D + d, tap, mask=there)


@triton.jit
def _short(out, source, tap, i0, j0, h, w, there, D: tl.constexpr,
           K: tl.constexpr, TRANSPOSED: tl.constexpr, R: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """`out` of the tile at (i0, j0), plus a K x K convolution."""
    HALF: tl.constexpr = K // 2
    # Input row i0 - HALF + n meets tap n - r of output row r, seen from the top.
    for n in range(tl.maximum(0, HALF - i0), tl.minimum(K + R - 1, h - i0 + HALF)):
        row = _line(source + (i0 - HALF + n) * w * D, D, j0 - HALF, w, there, W + 2 * HALF)
        rows = ()
        for r in tl.static_range(R):
            rows = rows + (tap + (n - r if TRANSPOSED else K - 1 - n + r) * (K * D),)
        for q in tl.static_range(K):
            updated = ()
            for r in tl.static_range(R):
                live = there & (n - r >= 0) & (n - r < K)
                t = tl.load(rows[r] + (q if TRANSPOSED else K - 1 - q) * D, mask=live, other=0.0)
                for j in tl.static_range(W):
                    updated = updated + (out[r * W + j] + t * row[j + q],)
            out = updated
    return out


@triton.jit(do_not_specialize=["tile_rows", "tile_columns"])
def convolve(
    x, taps, bias, y, u, sums, h, w, tile_rows, tile_columns, branch_stride, D: tl.constexpr,
    WIDTHS: tl.constexpr, CROSS: tl.constexpr, TRANSPOSED: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr,
    SAVE: tl.constexpr, STATISTICS: tl.constexpr, PAD: tl.constexpr, R: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """WIDTHS: of the short kernels, whose taps lie behind one another, then those of row and column, with PAD (at least
    R - 1 and W - 1) zeros around each, so that no lag of a tile needs to be asked whether there is one. Kernel b reads
    x + b branch_stride, the cross the last one. TRANSPOSED: the gradient of x, lags negated.

    u: the sum before SiLU, if SAVE. sums, if STATISTICS: `[programs, 2, D]`, the sum over the program's outputs and
    the sum of squared distances from their mean (Chan et al. 1983: they combine without cancellation).
    """
    tile = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * C + tl.arange(0, C)
    there = _there(c, D, C)
    j0 = (tile % tile_columns).to(tl.int32) * W
    i0 = (tile // tile_columns % tile_rows).to(tl.int32) * R
    image = tile // (tile_columns * tile_rows) * h * w * D
    source = x + image + c
    tap = taps + c
    out = _zeros(R * W, C)

    for b in tl.static_range(len(WIDTHS)):
        out = _short(out, source, tap, i0, j0, h, w, there, D, WIDTHS[b], TRANSPOSED, R, W)
        tap += WIDTHS[b] * WIDTHS[b] * D
        source += branch_stride

    if CROSS:
        middle = tap + (w - 1 + PAD) * D
        for first in range(0, w, W):
            near = middle + (first - j0 if TRANSPOSED else j0 - first) * D
            updated = ()
            for r in tl.static_range(R):
                row = _line(source + (i0 + r) * w * D, D, first, w, there & (i0 + r < h), W)
                line = ()
                for j in tl.static_range(W):
                    line = line + (out[r * W + j],)
                for s in tl.static_range(2 * W - 1):
                    t = tl.load(near + (W - 1 - s if TRANSPOSED else s - (W - 1)) * D, mask=there, other=0.0)
                    after = ()
                    for j in tl.static_range(W):
                        if j - s + (W - 1) >= 0 and j - s + (W - 1) < W:
                            after = after + (line[j] + t * row[j - s + (W - 1)],)
                        else:
                            after = after + (line[j],)
                    line = after
                updated = updated + line
            out = updated
        middle = tap + (2 * w - 1 + 2 * PAD + h - 1 + PAD) * D
        for n in range(h):
            row = _line(source + n * w * D, D, j0, w, there, W)
            near = middle + (n - i0 if TRANSPOSED else i0 - n) * D
            updated = ()
            for r in tl.static_range(R):
                t = tl.load(near + (-r if TRANSPOSED else r) * D, mask=there, other=0.0)
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


@triton.jit
def _short_gradient(x, dy, dtaps, p, c, h, w, lines, per_slice, D: tl.constexpr, K: tl.constexpr, W: tl.constexpr,
                    C: tl.constexpr):  # fmt: skip
    """Row p of the taps of one kernel, of lag p - HALF, over one slice of the lines."""
    HALF: tl.constexpr = K // 2
    there = _there(c, D, C)
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
        tl.store(dtaps + (p * K + q) * D + c, found[q], mask=there)


@triton.jit(do_not_specialize=["lines", "per_slice"])
def short_gradients(x, dy, dtaps, h, w, lines, per_slice, branch_stride, D: tl.constexpr, WIDTHS: tl.constexpr,
                    PLACES: tl.constexpr, W: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """dtaps `[slices, PLACES, D]`: sums over `per_slice` of the `lines` rows of all images, of all short kernels one
    behind the other. The gradient behind kernel b is dy + b branch_stride. Program: one row of taps of one kernel."""
    p = tl.program_id(2)
    c = tl.program_id(1) * C + tl.arange(0, C)
    dtaps += tl.program_id(0) * PLACES * D
    for b in tl.static_range(len(WIDTHS)):
        if (p >= 0) & (p < WIDTHS[b]):
            _short_gradient(x, dy, dtaps, p, c, h, w, lines, per_slice, D, WIDTHS[b], W, C)
        p -= WIDTHS[b]
        dtaps += WIDTHS[b] * WIDTHS[b] * D
        dy += branch_stride


@triton.jit(do_not_specialize=["images", "row_blocks", "column_blocks"])
def line_gradients(x, dy, dtaps, h, w, images, row_blocks, column_blocks, D: tl.constexpr, W: tl.constexpr,
                   C: tl.constexpr):  # fmt: skip
    """Gradients of the row kernel and of the column kernel. Program: of one of them, over a slice of all lines, outputs
    and inputs `delta` blocks of W places apart.

    dtaps `[slices, 2 row_blocks - 1 + 2 column_blocks - 1, 2 W - 1, D]`: at [., e, s] lag (e - blocks + 1) W + s -
    (W - 1), of the rows first. Neighbouring e share all lags but one.
    """
    e = tl.program_id(2)
    along_row = e < 2 * row_blocks - 1
    blocks = tl.where(along_row, row_blocks, column_blocks)
    delta = tl.where(along_row, e, e - (2 * row_blocks - 1)) - blocks + 1
    count, inner = tl.where(along_row, w, h), tl.where(along_row, h, w)
    step, inner_step = D * tl.where(along_row, 1, w), D * tl.where(along_row, w, 1)
    lines = images * inner
    per_slice = tl.cdiv(lines, tl.num_programs(0))
    c = tl.program_id(1) * C + tl.arange(0, C)
    there = _there(c, D, C)
    found = _zeros(2 * W - 1, C)
    start = tl.program_id(0) * per_slice
    for line in range(start, tl.minimum(start + per_slice, lines)):
        at = tl.cast(line // inner, tl.int64) * h * w * D + line % inner * inner_step + c
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
    entries = 2 * (row_blocks + column_blocks) - 2
    for s in tl.static_range(2 * W - 1):
        place = (tl.program_id(0) * entries + e) * (2 * W - 1) + s
        tl.store(dtaps + place.to(tl.int64) * D + c, found[s], mask=there)


@triton.jit
def _over_slices(partial, slices, stride, c, there, BS: tl.constexpr):
    """Sum of `slices` rows, `stride` apart, at c: a fixed order."""
    s = tl.arange(0, BS)
    found = tl.zeros((BS, c.shape[0]), tl.float32)
    for first in range(0, slices, BS):
        at = partial + (first + s).to(tl.int64)[:, None] * stride + c[None, :]
        found += tl.load(at, mask=(first + s < slices)[:, None] & there[None, :], other=0.0)
    return tl.sum(found, 0)


@triton.jit(do_not_specialize=["short_slices", "line_slices", "row_blocks", "column_blocks"])
def tap_gradients(shorts, lines, scale, dshort, dcross, shares, D, short_slices, line_slices, row_blocks, column_blocks,
                  L, GROUPS, h, w, WIDTHS: tl.constexpr, PLACES: tl.constexpr, CROSS: tl.constexpr,
                  SCALED: tl.constexpr, W: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, GP: tl.constexpr,
                  BS: tl.constexpr):  # fmt: skip
    """All gradients from the partial sums that `short_gradients` and `line_gradients` left; W = 0: the lines' are
    `[slices, 2 w - 1 + 2 h - 1, D]`, by lag, as `triton_planes.cross_gradients` leaves them.

    dshort, dcross: as `lay_out` takes them. shares, if SCALED: of dcross before the scale, `[4 L, D]`.
    Program: one tap of GP groups of R channels, RP with padding.
    """
    m = tl.program_id(0)
    n = tl.arange(0, GP * RP)
    group = tl.program_id(1) * GP + n // RP
    c = group * R + n % RP
    there = (n % RP < R) & (c < D)
    for b in tl.static_range(len(WIDTHS)):
        if (m >= 0) & (m < WIDTHS[b] * WIDTHS[b]):
            total = _over_slices(shorts + tl.program_id(0) * D, short_slices, PLACES * D, c, there, BS)
            tl.store(dshort + c * (WIDTHS[b] * WIDTHS[b]) + m, total, mask=there)
        m -= WIDTHS[b] * WIDTHS[b]
        dshort += D * WIDTHS[b] * WIDTHS[b]
    if CROSS and m >= 0:
        side, lag = m // L, m % L
        row = side < 2
        behind = side % 2 == 1
        count, blocks = tl.where(row, w, h), tl.where(row, row_blocks, column_blocks)
        known = there & (lag < count) & ((lag > 0) | (side % 2 == 0))
        lag = tl.where(behind, -lag, lag)
        if W == 0:
            place = tl.where(row, 0, 2 * w - 1) + count - 1 + lag
            total = _over_slices(lines + place * D, line_slices, (2 * (w + h) - 2) * D, c, known, BS)
        else:
            N: tl.constexpr = 2 * W - 1
            e, r = (lag + blocks * W) // W, (lag + blocks * W) % W
            first = lines + tl.where(row, 0, 2 * row_blocks - 1) * N * D
            stride = (2 * (row_blocks + column_blocks) - 2) * N * D
            total = _over_slices(first + ((e - 1) * N + W - 1 + r) * D, line_slices, stride, c, known & (e > 0), BS)
            other = known & (r > 0) & (e < 2 * blocks - 1)
            total += _over_slices(first + (e * N + r - 1) * D, line_slices, stride, c, other, BS)
        if SCALED:
            tl.store(shares + m * D + c, total, mask=there)
            total *= tl.load(scale + c, mask=there, other=0.0).to(tl.float32)
        total = tl.sum(tl.reshape(total, (GP, RP)), 1)
        g = tl.program_id(1) * GP + tl.arange(0, GP)
        tl.store(dcross + (side * GROUPS + g) * L + m % L, total, mask=g < GROUPS)


@triton.jit
def scale_gradient(shares, cross, dscale, D, L, GROUPS, per_group, BL: tl.constexpr, BC: tl.constexpr):
    """dscale `[D]` from the shares `[4 L, D]` that `tap_gradients` left."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    found = tl.zeros((BL, BC), tl.float32)
    for first in range(0, 4 * L, BL):
        m = first + tl.arange(0, BL)
        live = (m < 4 * L)[:, None] & (c < D)[None, :]
        at = ((m // L)[:, None] * GROUPS + (c // per_group)[None, :]) * L + (m % L)[:, None]
        tap = tl.load(cross + at, mask=live, other=0.0).to(tl.float32)
        found += tap * tl.load(shares + m[:, None] * D + c[None, :], mask=live, other=0.0)
    tl.store(dscale + c, tl.sum(found, 0), mask=c < D)


@triton.jit(do_not_specialize=["slices"])
def sum_slices(partial, total, slices, size, last, COPIES: tl.constexpr, BS: tl.constexpr, BLOCK: tl.constexpr):
    """`[slices, size]` to `[size]`, of which the `last` numbers are written COPIES times."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    found = _over_slices(partial, slices, size, at, at < size, BS)
    tl.store(total + at, found, mask=at < size)
    for i in tl.static_range(1, COPIES):
        tl.store(total + i * last + at, found, mask=(at >= size - last) & (at < size))
