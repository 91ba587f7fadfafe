"""Triton kernels of the long convolution: block-Toeplitz products on tensor cores, and what surrounds an FFT.

Toeplitz. Tokens are cut into chunks of M. For one channel, the chunks of all sequences are the columns of a matrix, and

    Y[:, (i, b)] = sum_k A_k X[:, (i + k, b)]          A_k[r, c] = tap of lag r - c - k M

              columns (i, b), i slowest                 k from -(chunks before) to +(chunks after)
            +----+----+----+----+----+
          M |    |    |    |    |    |   A tile of columns needs only the k's that reach one of its chunks; what lies
            +----+----+----+----+----+   before the first or behind the last chunk is read as zero by the descriptor.

Columns are stored chunk by chunk, `[D, chunks, B, M]` (`to_chunks`), so that chunk i + k of all sequences is B rows
further down: any B, no tile that straddles. Packed sequences (cu_seqlens) each start a new chunk, a slot of `places`
`[4, slots]`: the chunk's number in its sequence, the chunks of that sequence, its first token, its number of tokens;
behind them the chunks of the longest sequence. Their tiles span sequences, so rows are read one by one, under a mask.

A Toeplitz tile is read from four copies of the reversed taps, each shifted by one more place: row r takes copy r mod 4
and every row then starts on a multiple of 8 bytes. Asynchronous copies of 8 bytes go through the L1 cache, where they
nearly always hit; those of 16 bytes and tensor descriptors go past it (H100, D = 1,024, T = 4,096, 32,768 tokens: 0.345
ms with 8 bytes, 0.48 with descriptors).

Gradient of the taps. With i' = i - k, and r - c + k M the lag,

    G_k[r, c] = sum_{i, b} dY[i, b, r] X[i - k, b, c]        dtaps[lag] = sum of the entries of all G_k with that lag

one product a lag block, its diagonals summed in a fixed order, so that two runs agree bit for bit.

FFT. `weigh` and `real_part` are the two ends of a right-angle convolution (R. Crandall, Topics in Advanced Scientific
Computation, 1996): with w = exp(i pi / 2n), the cyclic convolution of x_t w^t and h_t w^t is the product
of their polynomials modulo z^n - i, so that whatever passes the end of the n points, or lies before their start, lands
in the imaginary part. n >= T complex points suffice, one- or two-sided, where a real transform is padded to 2T or 3T.
"""

import triton
import triton.language as tl

COPIES = tl.constexpr(4)


@triton.jit
def _floor_div(a, b: tl.constexpr):
    """Floor of a / b for a > -2^20 b; `//` rounds towards zero."""
    return (a + (1 << 20) * b) // b - (1 << 20)


@triton.jit(do_not_specialize=["centre", "first_lag", "last_lag", "zero", "P"])
def shifted_taps(taps, table, centre, first_lag, last_lag, zero, P, taps_d, taps_j, SIGN: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """table[d, s, p] = tap of lag s + zero - p, or with SIGN = -1 of the opposite lag; 0 outside the lags given."""
    d = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, COPIES)[:, None]
    p = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    lag = s + zero - p
    live = (lag >= first_lag) & (lag <= last_lag)
    h = tl.load(taps + d * taps_d + (centre + SIGN * lag).to(tl.int64) * taps_j, live, other=0.0)
    tl.store(table + (d * COPIES + s) * P + p, h.to(table.dtype.element_ty), p < P)


@triton.jit
def _silu_gradient(u):
    gate = 1 / (1 + tl.exp(-u))
    return gate * (1 + u * (1 - gate))


@triton.jit
def _tile(t_tiles, d_tiles, BT: tl.constexpr, BD: tl.constexpr):
    """This program's first place, channels and sequence."""
    pid = tl.program_id(0)
    rest = pid // t_tiles
    d = (rest % d_tiles).to(tl.int64) * BD + tl.arange(0, BD)
    return (pid % t_tiles) * BT, d, (rest // d_tiles).to(tl.int64)


@triton.jit
def _token(t, places, slots, T, M: tl.constexpr, PACKED: tl.constexpr):
    """The token that stands at place t of the chunks, and whether one does."""
    if PACKED:
        slot, r = t // M, t % M
        live = slot < slots
        length = tl.load(places + 3 * slots + slot, live, other=0)
        return tl.load(places + 2 * slots + slot, live, other=0) + r, r < length
    else:
        return t.to(tl.int64), t < T


@triton.jit(do_not_specialize=["slots", "t_tiles", "d_tiles"])
def to_chunks(x, u, out, sums, places, slots, T, D, t_tiles, d_tiles, x_b, x_t, x_d, u_b, u_t, u_d, out_b, out_i, out_d,
              sums_t, M: tl.constexpr, PACKED: tl.constexpr, SILU: tl.constexpr, SUM: tl.constexpr, BT: tl.constexpr,
              BD: tl.constexpr):  # fmt: skip
    """`[B, T, D]` to `[D, slots, B, M]`, zero behind the last token of a sequence. SILU: x is the gradient behind
    SiLU(u); SUM: each tile's sum over its tokens, in B t_tiles rows of `sums`, `sums_t` apart."""
    t0, d, b = _tile(t_tiles, d_tiles, BT, BD)
    t = t0 + tl.arange(0, BT)
    held = (d < D)[None, :]
    token, live = _token(t, places, slots, T, M, PACKED)
    value = tl.load(x + b * x_b + token[:, None] * x_t + d[None, :] * x_d, live[:, None] & held, other=0.0)
    if SILU:
        before = tl.load(u + b * u_b + token[:, None] * u_t + d[None, :] * u_d, live[:, None] & held, other=0.0)
        value = value.to(tl.float32) * _silu_gradient(before.to(tl.float32))
    if SUM:
        tl.store(sums + (b * t_tiles + t0 // BT) * sums_t + d, tl.sum(value.to(tl.float32), 0), d < D)
    at = out + b * out_b + (t // M).to(tl.int64)[:, None] * out_i + (t % M)[:, None] + d[None, :] * out_d
    tl.store(at, value.to(out.dtype.element_ty), (t < slots * M)[:, None] & held)


@triton.jit(do_not_specialize=["slots", "T", "t_tiles", "d_tiles"])
def from_chunks(y, out, u, places, slots, T, D, t_tiles, d_tiles, y_b, y_i, y_d, out_b, out_t, out_d, M: tl.constexpr,
                PACKED: tl.constexpr, SILU: tl.constexpr, SAVE: tl.constexpr, BT: tl.constexpr,
                BD: tl.constexpr):  # fmt: skip
    """The way back, under SiLU if asked for; SAVE: also what it was taken of, laid out as `out`."""
    t0, d, b = _tile(t_tiles, d_tiles, BT, BD)
    t = t0 + tl.arange(0, BT)
    held = (d < D)[None, :]
    at = y + b * y_b + (t // M).to(tl.int64)[:, None] * y_i + (t % M)[:, None] + d[None, :] * y_d
    value = tl.load(at, (t < slots * M)[:, None] & held, other=0.0)
    token, live = _token(t, places, slots, T, M, PACKED)
    at = b * out_b + token[:, None] * out_t + d[None, :] * out_d
    if SILU:
        if SAVE:
            tl.store(u + at, value.to(out.dtype.element_ty), live[:, None] & held)
        value = value.to(tl.float32)
        value = value / (1 + tl.exp(-value))
    tl.store(out + at, value.to(out.dtype.element_ty), live[:, None] & held)


@triton.jit
def _rows(x, n, k, within, count, at, M: tl.constexpr, W: tl.constexpr):
    """x[n + k, at : at + W], zero where that chunk is of another sequence (packed sequences)."""
    live = (within + k >= 0) & (within + k < count)
    return tl.load(x + (n + k).to(tl.int64)[:, None] * M + at + tl.arange(0, W)[None, :], live[:, None], other=0.0)


@triton.jit(do_not_specialize=["B", "chunks", "rows8", "tiles", "low", "high", "P8", "x_d8", "y_b8", "y_i8", "y_d8"])
def toeplitz(x, table, bias, y, u, places, B, chunks, rows8, tiles, low, high, P8, x_d8, y_b8, y_i8, y_d8,
             M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, BIAS: tl.constexpr, PACKED: tl.constexpr,
             SILU: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """N columns of one channel's Y, plus bias. A step is BK tokens; `low..high` are the steps that meet any tap.

    x lies in chunks; y at strides (y_b, y_i, 1) of (sequence, chunk, token), with room for 8 * rows8 tokens. Strides
    come divided by 8, so that accesses are known to be aligned without a compilation for each shape. SILU and SAVE as
    in `from_chunks`."""
    K: tl.constexpr = M // BK
    pid = tl.program_id(0)
    n0 = (tiles - 1 - pid % tiles) * N  # causal: the longest sums first
    d = (pid // tiles).to(tl.int64)
    r, c = tl.arange(0, M), tl.arange(0, BK)
    row = table + d * (P8 * 8 * COPIES) + ((r % COPIES) * (P8 * 8) - r // COPIES * COPIES + (M - COPIES) - low * BK)
    n = n0 + tl.arange(0, N)
    x += d * (x_d8 * 8)
    if PACKED:
        within = tl.load(places + n, n < chunks, other=0).to(tl.int32)
        count = tl.load(places + chunks + n, n < chunks, other=0).to(tl.int32)
        start = tl.maximum(low, -tl.max(within) * K)
        end = tl.minimum(high + 1, tl.max(count - within) * K)
    else:
        columns = tl.make_tensor_descriptor(x, [chunks * B, M], [M, 1], [N, BK])
        start = tl.maximum(low, -((n0 + N - 1) // B) * K)
        end = tl.minimum(high + 1, (chunks - n0 // B) * K)
    acc = tl.zeros((M, N), tl.float32)
    for step in tl.range(start, end, num_stages=STAGES):
        k = _floor_div(step, K)
        a = tl.load(row[:, None] + (step * BK + c)[None, :])
        if PACKED:
            tokens = _rows(x, n, k, within, count, (step - k * K) * BK, M, BK)
        else:
            tokens = columns.load([n0 + k * B, (step - k * K) * BK])
        acc = tl.dot(a, tl.trans(tokens), acc, input_precision=PRECISION)
    if BIAS:
        acc += tl.load(bias + d).to(tl.float32)
    i, b = n // B, n % B
    at = (d * (y_d8 * 8) + b.to(tl.int64) * (y_b8 * 8) + i.to(tl.int64) * (y_i8 * 8))[None, :] + r[:, None]
    held = (i * M)[None, :] + r[:, None] < rows8 * 8
    if SILU:
        if SAVE:
            tl.store(u + at, acc.to(y.dtype.element_ty), held)
        acc = acc / (1 + tl.exp(-acc))
    tl.store(y + at, acc.to(y.dtype.element_ty), held)


@triton.jit
def _store_diagonals(part, G, M: tl.constexpr):
    """part[0, j] = sum of G[r, r - j], part[1, j] = sum of G[r, r - j + M]."""
    r = tl.arange(0, M)
    rotated = tl.gather(G, (r[:, None] - r[None, :] + M) % M, 1)
    below = r[:, None] >= r[None, :]
    tl.store(part + r, tl.sum(tl.where(below, rotated, 0.0), 0))
    tl.store(part + M + r, tl.sum(tl.where(below, 0.0, rotated), 0))


@triton.jit(do_not_specialize=["B", "chunks", "blocks", "low", "x_d8", "dy_d8"])
def lag_products(x, dy, part, places, B, chunks, blocks, low, x_d8, dy_d8, CHUNK: tl.constexpr, M: tl.constexpr,
                 N: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """part[d, e] = the diagonals of G_k, k = low + e: two neighbouring k a program, which share dY.

    Blocks are of M tokens, RATIO to a chunk of x and dy."""
    RATIO: tl.constexpr = CHUNK // M
    pid = tl.program_id(0)
    pairs = (blocks + 1) // 2
    d = (pid // pairs).to(tl.int64)
    e = (pid % pairs) * 2
    k = low + e
    x += d * (x_d8 * 8)
    x_rows = tl.make_tensor_descriptor(x, [chunks * B, CHUNK], [CHUNK, 1], [N, M])
    dy_rows = tl.make_tensor_descriptor(dy + d * (dy_d8 * 8), [chunks * B, CHUNK], [CHUNK, 1], [N, M])
    first = tl.maximum(0, _floor_div(k, RATIO)) * B
    end = tl.minimum(chunks, chunks + _floor_div(k + 1, RATIO) + 1) * B
    if PACKED:  # nothing to do beyond the longest sequence
        longest = tl.load(places + 4 * chunks).to(tl.int32) * RATIO
        end = tl.where((k < longest) & (k + 1 > -longest), end, first)
    G0 = tl.zeros((M, M), tl.float32)
    G1 = tl.zeros((M, M), tl.float32)
    for step in tl.range(0, (end - first + N - 1) // N * RATIO, num_stages=STAGES):
        n, h = first + step // RATIO * N, step % RATIO
        g = tl.trans(dy_rows.load([n, h * M]))
        q0, q1 = _floor_div(h - k, RATIO), _floor_div(h - k - 1, RATIO)
        at0, at1 = (h - k - q0 * RATIO) * M, (h - k - 1 - q1 * RATIO) * M
        if PACKED:
            row = n + tl.arange(0, N)
            within = tl.load(places + row, row < chunks, other=0).to(tl.int32)
            count = tl.load(places + chunks + row, row < chunks, other=0).to(tl.int32)
            x0 = _rows(x, row, q0, within, count, at0, CHUNK, M)
            x1 = _rows(x, row, q1, within, count, at1, CHUNK, M)
        else:
            x0, x1 = x_rows.load([n + q0 * B, at0]), x_rows.load([n + q1 * B, at1])
        G0 = tl.dot(g, x0, G0, input_precision=PRECISION)
        G1 = tl.dot(g, x1, G1, input_precision=PRECISION)
    part += (d * blocks + e) * (2 * M)
    _store_diagonals(part, G0, M)
    if e + 1 < blocks:
        _store_diagonals(part + 2 * M, G1, M)


@triton.jit(do_not_specialize=["blocks", "low", "centre", "first_lag", "last_lag", "L"])
def sum_diagonals(part, out, blocks, low, centre, first_lag, last_lag, L, M: tl.constexpr, BLOCK: tl.constexpr):
    """out[d, column] = what the two lag blocks that hold its lag = column - centre found; 0 where no token reaches."""
    d = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    lag = column - centre
    e = _floor_div(lag, M) - low
    j = lag - (e + low) * M
    live = (lag >= first_lag) & (lag <= last_lag)
    at = part + (d * blocks + e) * (2 * M) + j
    total = tl.load(at, live & (e >= 0) & (e < blocks), other=0.0)
    total += tl.load(at + 3 * M, live & (e >= -1) & (e + 1 < blocks), other=0.0)
    tl.store(out + d * L + column, total, column < L)


@triton.jit(do_not_specialize=["first", "last", "t_tiles", "d_tiles"])
def weigh(x, u, z, sums, first, last, D, n, t_tiles, d_tiles, angle, x_b, x_t, x_d, u_b, u_t, u_d, z_b, z_d, sums_t,
          TWO_SIDED: tl.constexpr, SILU: tl.constexpr, SUM: tl.constexpr, BT: tl.constexpr,
          BD: tl.constexpr):  # fmt: skip
    """z[d, b, p mod n] += x[b, p - first, d] e^(i angle p), p = first..last, with angle n = pi / 2; |p| < n.
    SILU and SUM as in `to_chunks`, of one-sided x."""
    t0, d, b = _tile(t_tiles, d_tiles, BT, BD)
    t = t0 + tl.arange(0, BT)
    row = x + b * x_b + d[None, :] * x_d
    held = (d < D)[None, :]
    at = row + (t - first).to(tl.int64)[:, None] * x_t
    ahead = tl.load(at, (t <= last)[:, None] & held, other=0.0).to(tl.float32)
    if SILU:
        at = u + b * u_b + d[None, :] * u_d + t.to(tl.int64)[:, None] * u_t
        ahead *= _silu_gradient(tl.load(at, (t <= last)[:, None] & held, other=0.0).to(tl.float32))
    if SUM:
        tl.store(sums + (b * t_tiles + t0 // BT) * sums_t + d, tl.sum(ahead, 0), d < D)
    turn = t.to(tl.float32) * angle
    cos, sin = tl.cos(turn)[:, None], tl.sin(turn)[:, None]
    real, imaginary = ahead * cos, ahead * sin
    if TWO_SIDED:  # e^(i angle (t - n)) = -i e^(i angle t)
        at = row + (t - n - first).to(tl.int64)[:, None] * x_t
        behind = tl.load(at, ((t - n >= first) & (t < n))[:, None] & held, other=0.0).to(tl.float32)
        real, imaginary = real + behind * sin, imaginary - behind * cos
    pair = tl.permute(tl.join(real, imaginary), (1, 0, 2)).reshape(BD, 2 * BT)  # as it lies: whole rows are written
    p = t0 * 2 + tl.arange(0, 2 * BT)
    tl.store(z + b * z_b + d[:, None] * z_d + p.to(tl.int64)[None, :], pair, (d < D)[:, None] & (p < 2 * n)[None, :])


@triton.jit(do_not_specialize=["T", "t_tiles", "d_tiles"])
def real_part(z, y, u, bias, T, D, n, t_tiles, d_tiles, angle, factor, z_b, z_d, y_b, y_t, y_d, BIAS: tl.constexpr,
              SILU: tl.constexpr, SAVE: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """y[b, t, d] = factor Re(e^(-i angle t) z[d, b, t]) + bias[d]; SILU and SAVE as in `from_chunks`."""
    t0, d, b = _tile(t_tiles, d_tiles, BT, BD)
    t = t0 + tl.arange(0, BT)
    p = t0 * 2 + tl.arange(0, 2 * BT)
    at = z + b * z_b + d[:, None] * z_d + p.to(tl.int64)[None, :]
    pair = tl.load(at, (d < D)[:, None] & (p < 2 * n)[None, :], other=0.0)
    real, imaginary = tl.split(tl.permute(pair.reshape(BD, BT, 2), (1, 0, 2)))
    turn = t.to(tl.float32) * angle
    value = factor * (real * tl.cos(turn)[:, None] + imaginary * tl.sin(turn)[:, None])
    if BIAS:
        value += tl.load(bias + d, d < D, other=0.0).to(tl.float32)[None, :]
    at = b * y_b + t.to(tl.int64)[:, None] * y_t + d[None, :] * y_d
    held = (t < T)[:, None] & (d < D)[None, :]
    if SILU:
        if SAVE:
            tl.store(u + at, value.to(y.dtype.element_ty), held)
        value = value / (1 + tl.exp(-value))
    tl.store(y + at, value.to(y.dtype.element_ty), held)


@triton.jit(do_not_specialize=["B", "n"])
def correlate(dy, x, h, c, B, n, BLOCK: tl.constexpr):
    """Spectra `[D, B, n]`, complex as pairs: c[d] = sum_b dy[d, b] conj(x[d, b]), and dy[d, b] *= conj(h[d])."""
    d = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = (p < n)[:, None]
    at = p.to(tl.int64)[:, None] * 2 + tl.arange(0, 2)[None, :]
    h_re, h_im = tl.split(tl.load(h + d * n * 2 + at, live, other=0.0))
    c_re = tl.zeros((BLOCK,), tl.float32)
    c_im = tl.zeros((BLOCK,), tl.float32)
    for b in range(B):
        here = (d * B + b) * n * 2 + at
        g_re, g_im = tl.split(tl.load(dy + here, live, other=0.0))
        x_re, x_im = tl.split(tl.load(x + here, live, other=0.0))
        c_re += g_re * x_re + g_im * x_im
        c_im += g_im * x_re - g_re * x_im
        tl.store(dy + here, tl.join(g_re * h_re + g_im * h_im, g_im * h_re - g_re * h_im), live)
    tl.store(c + d * n * 2 + at, tl.join(c_re, c_im), live)
