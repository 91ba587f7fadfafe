"""Triton kernels of the long convolution: block-Toeplitz products on tensor cores, and what surrounds an FFT.

Toeplitz. Tokens are cut into chunks of M. For one channel, the chunks of all sequences are the columns of a matrix, and

    Y[:, (i, b)] = sum_k A_k X[:, (i + k, b)]          A_k[r, c] = tap of lag r - c - k M

              columns (i, b), i slowest                 k from -(chunks before) to +(chunks after)
            +----+----+----+----+----+
          M |    |    |    |    |    |   A tile of columns needs only the k's that reach one of its chunks; what lies
            +----+----+----+----+----+   before the first or behind the last chunk is read as zero by the descriptor.

Columns are stored chunk by chunk, `[D, chunks, B, M]` (`to_chunks`), so that chunk i + k of all sequences is B rows
further down: any B, no tile that straddles. A Toeplitz tile is read from four copies of the reversed taps, each
shifted by one more place: row r takes copy r mod 4 and every row then starts on a multiple of 8 bytes. Reads of 8 bytes
go through the L1 cache, where they nearly always hit, and that is worth more than reads of 16 bytes, which don't
(H100, T = 4,096, D = 1,024, 32,768 tokens: 0.345 against 0.48 ms).

Gradient of the taps. With i' = i - k, and r - c + k M the lag,

    G_k[r, c] = sum_{i, b} dY[i, b, r] X[i - k, b, c]        dtaps[lag] = sum of the entries of all G_k with that lag

one product a lag block, its diagonals summed in a fixed order, so that two runs agree bit for bit.

FFT. `weigh` and `real_part` are the two ends of a right-angle convolution (R. Crandall, Topics in Advanced Scientific
Computation, 1996, section 4.3): with w = exp(i pi / 2n), the cyclic convolution of x_t w^t and h_t w^t is the product
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


@triton.jit(do_not_specialize=["T", "t_tiles", "d_tiles"])
def to_chunks(x, out, T, D, t_tiles, d_tiles, x_b, x_t, x_d, out_b, out_i, out_d, M: tl.constexpr, BT: tl.constexpr,
              BD: tl.constexpr):  # fmt: skip
    """`[B, T, D]` to `[D, chunks, B, M]`, zero behind the last token."""
    pid = tl.program_id(0)
    t = (pid % t_tiles) * BT + tl.arange(0, BT)
    pid = pid // t_tiles
    d = (pid % d_tiles).to(tl.int64) * BD + tl.arange(0, BD)
    b = (pid // d_tiles).to(tl.int64)
    at = x + b * x_b + t.to(tl.int64)[:, None] * x_t + d[None, :] * x_d
    value = tl.load(at, (t < T)[:, None] & (d < D)[None, :], other=0.0)
    at = out + b * out_b + (t // M).to(tl.int64)[:, None] * out_i + (t % M)[:, None] + d[None, :] * out_d
    tl.store(at, value.to(out.dtype.element_ty), (t < (T + M - 1) // M * M)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["T", "t_tiles", "d_tiles"])
def from_chunks(y, out, T, D, t_tiles, d_tiles, y_b, y_i, y_d, out_b, out_t, out_d, M: tl.constexpr, BT: tl.constexpr,
                BD: tl.constexpr):  # fmt: skip
    """The way back."""
    pid = tl.program_id(0)
    t = (pid % t_tiles) * BT + tl.arange(0, BT)
    pid = pid // t_tiles
    d = (pid % d_tiles).to(tl.int64) * BD + tl.arange(0, BD)
    b = (pid // d_tiles).to(tl.int64)
    held = (d < D)[None, :]
    at = y + b * y_b + (t // M).to(tl.int64)[:, None] * y_i + (t % M)[:, None] + d[None, :] * y_d
    value = tl.load(at, (t < (T + M - 1) // M * M)[:, None] & held, other=0.0).to(out.dtype.element_ty)
    tl.store(out + b * out_b + t.to(tl.int64)[:, None] * out_t + d[None, :] * out_d, value, (t < T)[:, None] & held)


@triton.jit(do_not_specialize=["B", "chunks", "rows8", "tiles", "low", "high", "P8", "x_d8", "y_b8", "y_i8", "y_d8"])
def toeplitz(x, table, bias, y, B, chunks, rows8, tiles, low, high, P8, x_d8, y_b8, y_i8, y_d8, M: tl.constexpr,
             N: tl.constexpr, BK: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
             STAGES: tl.constexpr):  # fmt: skip
    """N columns of one channel's Y, plus bias. A step is BK tokens; `low..high` are the steps that meet any tap.

    x lies in chunks; y at strides (y_b, y_i, 1) of (sequence, chunk, token), with room for 8 * rows8 tokens. Strides
    come divided by 8, so that accesses are known to be aligned without a compilation for each shape."""
    K: tl.constexpr = M // BK
    pid = tl.program_id(0)
    n0 = (tiles - 1 - pid % tiles) * N  # causal: the longest sums first
    d = (pid // tiles).to(tl.int64)
    r, c = tl.arange(0, M), tl.arange(0, BK)
    row = table + d * (P8 * 8 * COPIES) + ((r % COPIES) * (P8 * 8) - r // COPIES * COPIES + (M - COPIES) - low * BK)
    columns = tl.make_tensor_descriptor(x + d * (x_d8 * 8), [chunks * B, M], [M, 1], [N, BK])
    start = tl.maximum(low, -((n0 + N - 1) // B) * K)
    end = tl.minimum(high + 1, (chunks - n0 // B) * K)
    acc = tl.zeros((M, N), tl.float32)
    for step in tl.range(start, end, num_stages=STAGES):
        k = _floor_div(step, K)
        a = tl.load(row[:, None] + (step * BK + c)[None, :])
        tokens = columns.load([n0 + k * B, (step - k * K) * BK])
        acc = tl.dot(a, tl.trans(tokens), acc, input_precision=PRECISION)
    if BIAS:
        acc += tl.load(bias + d).to(tl.float32)
    n = n0 + tl.arange(0, N)
    i, b = n // B, n % B
    at = y + d * (y_d8 * 8) + b.to(tl.int64) * (y_b8 * 8) + i.to(tl.int64) * (y_i8 * 8)
    tl.store(at[None, :] + r[:, None], acc.to(y.dtype.element_ty), (i * M)[None, :] + r[:, None] < rows8 * 8)


@triton.jit
def _store_diagonals(part, G, M: tl.constexpr):
    """part[M + l] = sum of the entries of G `[M, M]` with r - c = l, for l from -M to M - 1.

    In squares of 32, which one warp can rotate by shuffles (whole rows of 64 cost 168 registers instead of 90):
    with r = 32 a + r', c = 32 b + c', j = (r' - c') mod 32, an entry has l = 32 (a - b) + j, less 32 where r' < j."""
    Q: tl.constexpr = M // 32
    j = tl.arange(0, 32)[None, None, :]
    row = (tl.arange(0, M) % 32)[:, None, None]
    rotated = tl.gather(G.reshape(M, Q, 32), (row - j + 32) % 32 + tl.zeros((M, Q, 32), tl.int32), 2)
    high = tl.sum(tl.where(row >= j, rotated, 0.0).reshape(Q, 32, Q, 32), 1)
    low = tl.sum(tl.where(row < j, rotated, 0.0).reshape(Q, 32, Q, 32), 1)
    square = tl.arange(0, Q)[:, None, None] - tl.arange(0, Q)[None, :, None]  # a - b
    for e in tl.static_range(-Q, Q):
        total = tl.where(square == e, high, 0.0) + tl.where(square == e + 1, low, 0.0)
        tl.store(part + M + 32 * e + tl.arange(0, 32), tl.sum(tl.sum(total, 0), 0))


@triton.jit(do_not_specialize=["B", "T", "blocks", "low", "x_d8", "dy_d8"])
def lag_products(x, dy, part, B, T, blocks, low, x_d8, dy_d8, CHUNK: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
                 PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """part[d, e] = the diagonals of G_k, k = low + e: two neighbouring k a program, which share dY.

    Blocks are of M tokens, RATIO to a chunk of x and dy."""
    RATIO: tl.constexpr = CHUNK // M
    pid = tl.program_id(0)
    pairs = (blocks + 1) // 2
    d = (pid // pairs).to(tl.int64)
    e = (pid % pairs) * 2
    k = low + e
    chunks = (T + CHUNK - 1) // CHUNK
    x_rows = tl.make_tensor_descriptor(x + d * (x_d8 * 8), [chunks * B, CHUNK], [CHUNK, 1], [N, M])
    dy_rows = tl.make_tensor_descriptor(dy + d * (dy_d8 * 8), [chunks * B, CHUNK], [CHUNK, 1], [N, M])
    first = tl.maximum(0, _floor_div(k, RATIO)) * B
    end = tl.minimum(chunks, chunks + _floor_div(k + 1, RATIO) + 1) * B
    G0 = tl.zeros((M, M), tl.float32)
    G1 = tl.zeros((M, M), tl.float32)
    for step in tl.range(0, (end - first + N - 1) // N * RATIO, num_stages=STAGES):
        n, h = first + step // RATIO * N, step % RATIO
        g = tl.trans(dy_rows.load([n, h * M]))
        q = _floor_div(h - k, RATIO)
        G0 = tl.dot(g, x_rows.load([n + q * B, (h - k - q * RATIO) * M]), G0, input_precision=PRECISION)
        q = _floor_div(h - k - 1, RATIO)
        G1 = tl.dot(g, x_rows.load([n + q * B, (h - k - 1 - q * RATIO) * M]), G1, input_precision=PRECISION)
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
    total = tl.load(at + M, live & (e >= 0) & (e < blocks), other=0.0)
    total += tl.load(at + 2 * M, live & (e >= -1) & (e + 1 < blocks), other=0.0)
    tl.store(out + d * L + column, total, column < L)


@triton.jit(do_not_specialize=["first", "last", "t_tiles", "d_tiles"])
def weigh(x, z, first, last, D, n, t_tiles, d_tiles, angle, x_b, x_t, x_d, z_b, z_d, TWO_SIDED: tl.constexpr,
          BT: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """z[d, b, p mod n] += x[b, p - first, d] e^(i angle p), p = first..last, with angle n = pi / 2; |p| < n."""
    pid = tl.program_id(0)
    t0 = (pid % t_tiles) * BT
    t = t0 + tl.arange(0, BT)
    pid = pid // t_tiles
    d = (pid % d_tiles).to(tl.int64) * BD + tl.arange(0, BD)
    b = (pid // d_tiles).to(tl.int64)
    row = x + b * x_b + d[None, :] * x_d
    held = (d < D)[None, :]
    at = row + (t - first).to(tl.int64)[:, None] * x_t
    ahead = tl.load(at, (t <= last)[:, None] & held, other=0.0).to(tl.float32)
    turn = t.to(tl.float32) * angle
    cos, sin = tl.cos(turn)[:, None], tl.sin(turn)[:, None]
    real, imaginary = ahead * cos, ahead * sin
    if TWO_SIDED:  # e^(i angle (t - n)) = -i e^(i angle t)
        at = row + (t - n - first).to(tl.int64)[:, None] * x_t
        behind = tl.load(at, (t - n >= first)[:, None] & held, other=0.0).to(tl.float32)
        real, imaginary = real + behind * sin, imaginary - behind * cos
    pair = tl.permute(tl.join(real, imaginary), (1, 0, 2)).reshape(BD, 2 * BT)  # as it lies: whole rows are written
    p = t0 * 2 + tl.arange(0, 2 * BT)
    tl.store(z + b * z_b + d[:, None] * z_d + p.to(tl.int64)[None, :], pair, (d < D)[:, None] & (p < 2 * n)[None, :])


@triton.jit(do_not_specialize=["T", "t_tiles", "d_tiles"])
def real_part(z, y, bias, T, D, n, t_tiles, d_tiles, angle, factor, z_b, z_d, y_b, y_t, y_d, BIAS: tl.constexpr,
              BT: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """y[b, t, d] = factor Re(e^(-i angle t) z[d, b, t]) + bias[d]."""
    pid = tl.program_id(0)
    t0 = (pid % t_tiles) * BT
    t = t0 + tl.arange(0, BT)
    pid = pid // t_tiles
    d = (pid % d_tiles).to(tl.int64) * BD + tl.arange(0, BD)
    b = (pid // d_tiles).to(tl.int64)
    p = t0 * 2 + tl.arange(0, 2 * BT)
    at = z + b * z_b + d[:, None] * z_d + p.to(tl.int64)[None, :]
    pair = tl.load(at, (d < D)[:, None] & (p < 2 * n)[None, :], other=0.0)
    real, imaginary = tl.split(tl.permute(pair.reshape(BD, BT, 2), (1, 0, 2)))
    turn = t.to(tl.float32) * angle
    value = factor * (real * tl.cos(turn)[:, None] + imaginary * tl.sin(turn)[:, None])
    if BIAS:
        value += tl.load(bias + d, d < D, other=0.0).to(tl.float32)[None, :]
    at = y + b * y_b + t.to(tl.int64)[:, None] * y_t + d[None, :] * y_d
    tl.store(at, value.to(y.dtype.element_ty), (t < T)[:, None] & (d < D)[None, :])


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
