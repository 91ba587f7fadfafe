"""Triton kernels of linear attention; `launch.py` decides which run with what blocks.

One walk does everything causal. It carries `S`, a `[W, X]` fp32 state, in registers over the chunks of one segment:

    out_x = sum_{y before x} w(x, y) (a_x . b_y) c_y            a, b: [n, W]   c, out: [n, X]

      chunk 0      chunk 1      chunk 2
    +---------+  +---------+  +---------+     inside a chunk   P = a b^T, masked and decayed, on tensor cores;  P c
    | a b c   |->| a b c   |->| a b c   |->   before it        a S
    +---------+S0+---------+S1+---------+S2   afterwards       S <- decay S + b^T c        (never written to memory)

Forward it is (a, b, c) = (q, k, v). The gradients are the same sum with other operands:

    dq: (dO, v, k), in time       dk: (v, dO, q), against time       dv: (k, q, dO), against time

so one body serves all four; the backward pass runs the three gradients as three roles of one launch, which read their
common inputs through the L2 cache. Nothing but inputs, outputs and one state per segment is kept for it: the scores
and the states inside a segment are computed again. Without decay dq, too, goes against time, so that all three roles
read the same tokens at the same time: it starts from the state at the segment's end and takes it apart again, chunk by
chunk, S_start = S_end - sum_s k_s^T v_s.

No product takes a computed tile transposed: every role computes its scores the way round that it needs them. Triton 3.4
to 3.7.0 compiles such products wrongly on Hopper (flash-linear-attention, issue 640), where they come from registers.

Where sequences are too few to fill the card, each is cut into segments and there are two levels:

    gather:  every segment's own b^T c, decayed to its end        (all segments in parallel)
    scan:    the state that each segment starts from              (a few elementwise steps)
    walk:    every segment from its start state                   (all segments in parallel)

Decay: `g` is the running sum of log_decay (in base 2) from the start of a chunk, so w(x, y) = exp2(g_x - g_y); only
differences at or below 0 are ever used. Loads and stores go through tensor descriptors, which clip at a segment's end.
Every offset that can pass 2^31 elements is int64.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# A multiprocessor's programs are this many apart where all start at once (132 on an H100): the roles are turned so that
# their costs mix on each.
PROCESSORS = tl.constexpr(132)
LEAST = tl.constexpr(-115.41560327111707)  # reference.LEAST_LOG_DECAY in base 2


@triton.jit
def _bounds(cu_seqlens, n, T):
    """Where sequence n starts and ends, held inside `[0, T]`: a wrong cu_seqlens gives wrong numbers, but no access to
    memory that isn't ours."""
    start = tl.minimum(tl.maximum(tl.load(cu_seqlens + n).to(tl.int64), 0), T)
    return start, tl.minimum(tl.maximum(tl.load(cu_seqlens + n + 1).to(tl.int64), start), T)


@triton.jit
def _segment(p, cuts, T, SEG, SEGMENTS, VARLEN: tl.constexpr, TABLE: tl.constexpr):
    """Segment p: its row, its first token in that row, and its number of tokens.

    `cuts` is cu_seqlens, or with TABLE the `[P, 2]` starts and lengths that `segment_table` wrote."""
    if VARLEN:
        if TABLE:
            start = tl.load(cuts + 2 * p).to(tl.int64)
            length = tl.load(cuts + 2 * p + 1).to(tl.int32)
        else:
            start, end = _bounds(cuts, p, T)
            length = (end - start).to(tl.int32)
        row = tl.zeros((), tl.int64)
    else:
        row = (p // SEGMENTS).to(tl.int64)
        first = (p % SEGMENTS) * SEG
        start = first.to(tl.int64)
        length = tl.minimum(SEG, T - first)
    return row, start, length


@triton.jit
def _tiles(pointer, n, stride, W: tl.constexpr, BT: tl.constexpr, BW: tl.constexpr):
    """`[BT, BW]` tiles of a `[n, W]` matrix; a descriptor may not be empty, an empty segment just never loads."""
    return tl.make_tensor_descriptor(pointer, shape=[tl.maximum(n, 1), W], strides=[stride, 1], block_shape=[BT, BW])


@triton.jit
def segment_table(cu_seqlens, table, owner, first, N, T, SEG, SEGMENTS, BLOCK: tl.constexpr):
    """Cut sequence n into segments: `table[p] = (start, length)` and `owner[p] = n` from p = `first[n]` on.

    The table has room for SEGMENTS; what a wrong cu_seqlens asks for beyond is left out.

    One program a sequence. What lies behind the last segment keeps the length 0 that the table was filled with."""
    n = tl.program_id(0)
    before = tl.zeros((), tl.int64)
    for i in range(0, n, BLOCK):
        at = i + tl.arange(0, BLOCK)
        live = at < n
        begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + at, live, other=0).to(tl.int64), 0), T)
        end = tl.load(cu_seqlens + at + 1, live, other=0).to(tl.int64)
        end = tl.minimum(tl.maximum(end, begin), T)
        before += tl.sum((end - begin + SEG - 1) // SEG)
    before = tl.minimum(before, SEGMENTS)
    begin, end = _bounds(cu_seqlens, n, T)
    tl.store(first + n, before)
    count = tl.minimum((end - begin + SEG - 1) // SEG, SEGMENTS - before)
    if n == N - 1:
        tl.store(first + N, before + count)
    for j in range(count):
        tl.store(owner + before + j, n)
        tl.store(table + 2 * (before + j), begin + j * SEG)
        tl.store(table + 2 * (before + j) + 1, tl.minimum(SEG, end - begin - j * SEG))


@triton.jit
def _checked(log_decay):
    """Natural to base 2, clamped; a decay above 0 turns into NaN, which then fills the output."""
    return tl.where(log_decay > 0, float("nan"), tl.where(log_decay * LOG2_E < LEAST, LEAST, log_decay * LOG2_E))


@triton.jit
def _decay_place(p, token, BT: tl.constexpr):
    """Where the running sums of segment p stand in `g`: every chunk is whole there, so that its address is aligned."""
    return (tl.cdiv(token, BT) + p) * BT


@triton.jit
def cumulative_decay(log_decay, g, cuts, T, H, SEG, SEGMENTS, stride_b, stride_t, stride_h, g_stride,
                     VARLEN: tl.constexpr, TABLE: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr):  # fmt: skip
    """`g[h, :]`: running sums of log_decay in base 2 from the start of each chunk; constant past the segment's end.

    A program is a chunk."""
    chunks = tl.cdiv(SEG, BT)
    p = tl.program_id(0) // chunks
    row, start, n = _segment(p, cuts, T, SEG, SEGMENTS, VARLEN, TABLE)
    t0 = tl.program_id(0) % chunks * BT
    if t0 >= n:
        return
    t = t0 + tl.arange(0, BT)
    place = _decay_place(p, row * T + start, BT) + t
    for h0 in range(0, H, BH):
        h = (h0 + tl.arange(0, BH)).to(tl.int64)
        at = row * stride_b + (start + t)[:, None] * stride_t + h[None, :] * stride_h
        d = _checked(tl.load(log_decay + at, (t < n)[:, None] & (h < H)[None, :], other=0.0).to(tl.float32))
        tl.store(g + h[None, :] * g_stride + place[:, None], tl.cumsum(d, 0), (h < H)[None, :])


@triton.jit
def _sums(g, n, DECAY: tl.constexpr, BT: tl.constexpr):
    """Tiles of the running sums of a segment; `g` points at its first one."""
    if DECAY == 2:
        return tl.make_tensor_descriptor(g, shape=[tl.maximum(tl.cdiv(n, BT), 1) * BT], strides=[1], block_shape=[BT])
    else:
        return n


@triton.jit
def _chunk_decay(log_decay, g, g_tiles, t0, n, DECAY: tl.constexpr, BT: tl.constexpr):
    """The running sum at each place of the chunk at t0, constant past the segment's end, and at its end."""
    if DECAY == 1:
        return (log_decay * tl.minimum(tl.arange(0, BT) + 1, n - t0).to(tl.float32),
                log_decay * tl.minimum(n - t0, BT).to(tl.float32))  # fmt: skip
    else:
        return g_tiles.load([t0]), tl.load(g + t0 + BT - 1)


@triton.jit
def _add(S, b, c, weight, shrink, DECAY: tl.constexpr, PRECISION: tl.constexpr):
    """S <- shrink S + b^T (weight c)."""
    if DECAY:
        c = (c * weight[:, None]).to(b.dtype)
        return tl.dot(tl.trans(b), c, acc=S * shrink, input_precision=PRECISION)
    else:
        return tl.dot(tl.trans(b), c, acc=S, input_precision=PRECISION)


@triton.jit
def _read(a, S, PRECISION: tl.constexpr):
    """a S with fp32 accumulation. A state may pass fp16's 65504, so there it is read as a share of its largest element.

    (Not in tf32: for the code with a in registers that this takes, ptxas 12.8 kept a descriptor of shared memory in
    uniform registers that a copy's coordinates overwrite: K = 40, V = 24, static decay, found by compute-sanitizer.)
    """
    if a.dtype == tl.float16:
        largest = tl.max(tl.max(tl.abs(S), 1), 0)
        largest = tl.where(largest > 0, largest, 1.0)
        return tl.dot(a, (S / largest).to(tl.float16), input_precision=PRECISION) * largest
    else:
        return tl.dot(a, S.to(a.dtype), input_precision=PRECISION)


@triton.jit
def _walk(a, b, c, e, out, dot, stride_a, stride_b, stride_c, stride_e, stride_out,
          carry, carry_rows, carry_w, carry_x, carry_scale, end, end_rows, end_scale, ahead, ahead_scale,
          x0, n, dots, log_decay, g, scale, against, strict,
          W: tl.constexpr, X: tl.constexpr, BW: tl.constexpr, BX: tl.constexpr, BT: tl.constexpr, DECAY: tl.constexpr,
          CARRY: tl.constexpr, END: tl.constexpr, DOT: tl.constexpr, COUNT: tl.constexpr, AHEAD: tl.constexpr,
          THROUGH: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """One segment, columns x0 to x0 + BX of c and out. Pointers stand at the segment's first token.

    against: 0 in time, 1 against it (y then runs from x to the end). THROUGH (against time only): a reads the state on
    the far side of its chunk, less the chunk's pairs that lie before it: y < x where strict is 1, y <= x where it is 0.
    DECAY: 0 none, 1 static, 2 per token. CARRY: the walk starts from `carry_scale * carry[w * carry_w + x * carry_x]`.
    END: the state it ends with, times end_scale, goes to `end`, laid out like `carry`. Rows from carry_rows and
    end_rows on (W, or 0 for none) are left out.
    DOT: per token `dot[t] = out_t . e_t` over these columns, t < dots. Static, unless dots is below 0, this walk's
    share of the decay's gradient (see `backward`) goes to `dot[0]`. COUNT (in time only): this walk counts the bounds
    of chunks, by a second state Z. AHEAD: `ahead_scale * ahead`, laid out like `carry`, is the state that the other
    direction brings to the segment's end.
    """
    a_tiles = _tiles(a, n, stride_a, W, BT, BW)
    b_tiles = _tiles(b, n, stride_b, W, BT, BW)
    c_tiles = _tiles(c, n, stride_c, X, BT, BX)
    out_tiles = _tiles(out, n, stride_out, X, BT, BX)
    if DOT:
        e_tiles = _tiles(e, dots, stride_e, X, BT, BX)
    w = tl.arange(0, BW)[:, None]
    x = x0 + tl.arange(0, BX)[None, :]
    at = w * carry_w + x * carry_x
    if CARRY:
        S = tl.load(carry + at, (w < carry_rows) & (x < X), other=0.0) * carry_scale
    else:
        S = tl.zeros((BW, BX), tl.float32)
    place = tl.arange(0, BT)
    sign = 1 - 2 * against
    lag = (place[:, None] - place[None, :]) * sign
    seen = lag <= -strict if THROUGH else lag >= 0
    if DECAY == 1:  # the same in every chunk
        weights = tl.where(seen, tl.exp2(log_decay * lag.to(tl.float32)), 0.0)
    SUM: tl.constexpr = DOT and DECAY == 1
    if SUM:
        shares = tl.zeros((BT,), tl.float32)
        # Over a whole chunk it leaves nothing that counts beside the rounding of b.
        kind: tl.constexpr = b.dtype.element_ty
        fast = log_decay * BT < (-10 if kind == tl.bfloat16 else -16 if kind == tl.float16 else -24)
    if COUNT:
        Z = S * tl.where(fast, 1.0, 1.0 / BT)
    chunks = tl.cdiv(n, BT)
    g_tiles = _sums(g, n, DECAY, BT)
    for i in tl.range(0, chunks, num_stages=STAGES):
        t0 = (against * (chunks - 1) + sign * i) * BT
        a_t = a_tiles.load([t0, 0])
        b_t = b_tiles.load([t0, 0])
        c_t = c_tiles.load([t0, x0])
        P = tl.dot(a_t, tl.trans(b_t), input_precision=PRECISION)
        if THROUGH:
            S = _add(S, b_t, c_t, 1.0, 1.0, DECAY, PRECISION)
        result = _read(a_t, S, PRECISION)
        if DECAY:
            g_t, g_end = _chunk_decay(log_decay, g, g_tiles, t0, n, DECAY, BT)
            from_start, to_end = tl.exp2(g_t), tl.exp2(g_end - g_t)
            result *= (to_end if against else from_start)[:, None]
            S = _add(S, b_t, c_t, from_start if against else to_end, tl.exp2(g_end), DECAY, PRECISION)
        elif not THROUGH:
            S = _add(S, b_t, c_t, 1.0, 1.0, DECAY, PRECISION)
        if DECAY == 1:
            P *= weights
        elif DECAY == 2:
            g_t = g_t * sign  # weights above 1, even infinite ones, stand only where they are left out
            P = tl.where(seen, P * tl.exp2(g_t[:, None] - g_t[None, :]), 0.0)
        else:
            P = tl.where(seen, -P if THROUGH else P, 0.0)
        P = P.to(c_t.dtype)
        result = tl.dot(P, c_t, acc=result, input_precision=PRECISION)
        if SUM:  # e is loaded no sooner: registers
            e_t = e_tiles.load([t0, x0]).to(tl.float32)
            product = tl.sum(result * e_t, 1)
            shares += (place * sign).to(tl.float32) * product
            if not COUNT and fast:  # Triton puts this behind the loads of the next chunks, which overwrite c_t
                within = tl.sum(tl.dot(P, c_tiles.load([t0, x0]), input_precision=PRECISION) * e_t, 1)
                shares += (tl.minimum(n - t0, BT) - 1).to(tl.float32) * (product - within)
        result *= scale
        if DOT and not SUM:
            tl.store(dot + t0 + place, tl.sum(result * e_tiles.load([t0, x0]).to(tl.float32), 1), t0 + place < dots)
        out_tiles.store([t0, x0], result.to(out.dtype.element_ty))
        if COUNT:  # last, when the scores and the result have left their registers
            shares += tl.sum(_read(a_t, Z, PRECISION) * e_t, 1) * (from_start * tl.where(fast, 1.0, BT))
            Z = Z * tl.exp2(g_end) + S
    if END:
        tl.store(end + at, S * end_scale, (w < end_rows) & (x < X))
    if SUM:
        share = tl.sum(shares)
        if AHEAD:
            R = tl.load(ahead + at, (w < W) & (x < X), other=0.0) * ahead_scale
            last = (n - (chunks - 1) * BT).to(tl.float32)
            Z = tl.where(fast, last * (Z - S), BT * Z + (last - 1 - BT) * S)
            share += tl.sum(tl.sum(Z * R, 1), 0)
        tl.store(dot, tl.where(log_decay == LEAST, 0.0, share * scale), dots >= 0)


@triton.jit
def forward(q, k, v, o, log_decay, g, carry, end, cuts, g_stride, scale, T, H, SEG, SEGMENTS,
            q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
            K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BX: tl.constexpr, BT: tl.constexpr,
            DECAY: tl.constexpr, CARRY: tl.constexpr, END: tl.constexpr, VARLEN: tl.constexpr, TABLE: tl.constexpr,
            PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """o_t = scale * (exp(g_t) q_t S_0 + sum_{s <= t} exp(g_t - g_s) (q_t . k_s) v_s).

    A program is (segment, head, BX columns of v); columns of one head are neighbours and share q and k in the L2.
    """
    columns: tl.constexpr = (V + BX - 1) // BX
    pid = tl.program_id(0)
    x0 = (pid % columns) * BX
    h = (pid // columns) % H
    p = pid // columns // H
    row, start, n = _segment(p, cuts, T, SEG, SEGMENTS, VARLEN, TABLE)
    state = (p.to(tl.int64) * H + h) * (K * V)
    if DECAY == 1:
        log_decay = _checked(tl.load(log_decay + h).to(tl.float32))
    if DECAY == 2:
        g += h.to(tl.int64) * g_stride + _decay_place(p, row * T + start, BT)
    h = h.to(tl.int64)
    _walk(q + row * q_b + start * q_t + h * q_h, k + row * k_b + start * k_t + h * k_h,
          v + row * v_b + start * v_t + h * v_h, q, o + ((row * T + start) * H + h) * V, q, q_t, k_t, v_t, q_t, H * V,
          carry + state, K, V, 1, 1.0, end + state, K, 1.0, carry, 1.0, x0, n, 0, log_decay, g, scale, 0, 0,
          K, V, BK, BX, BT, DECAY, CARRY, END, False, False, False, False, PRECISION, STAGES)  # fmt: skip


@triton.jit
def backward(q, k, v, do, dq, dk, dv, dots, log_decay, g, before, after, dinitial, cuts,
             tokens, g_stride, scale, T, H, SEG, SEGMENTS, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
             do_b, do_t, do_h,
             K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, XK: tl.constexpr, XV: tl.constexpr,
             BT: tl.constexpr, DECAY: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, END: tl.constexpr,
             AFTER_SCALED: tl.constexpr, VARLEN: tl.constexpr, TABLE: tl.constexpr,
             PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """The three gradients as three roles; R_s = sum_{t > s} exp(g_t - g_s) q_t^T dO_t + exp(g_T - g_s) dS_T / scale.

        dq_t = scale * (exp(g_t) dO_t S_0^T + sum_{s <= t} exp(g_t - g_s) (dO_t . v_s) k_s)
        dk_s = scale * (v_s R^T             + sum_{t >= s} exp(g_t - g_s) (v_s . dO_t) q_t)
        dv_s = scale * (k_s R               + sum_{t >= s} exp(g_t - g_s) (k_s . q_t) dO_t)

    Without decay S_{t0} = S_{t1} - sum_{t0 < s <= t1} k_s^T v_s, and dq goes against time too, from -S_T:
    dq_t = -scale * (dO_t (-S_{t0})^T - sum_{t0 < s <= t} (dO_t . v_s) k_s), t0 the start of t's chunk. dk and dv then
    read R at the start of the chunk, too: one order of products for the three. (The state at the chunk's end, less the
    pairs behind t, would do as well but for its size: it made bf16's rounding 1.7 % larger in dq.)

    `before` holds S at the segments' starts, or at their ends where there is no decay; `after` holds R at their ends
    (dS_T itself where AFTER_SCALED). `dots`, for the decay's gradient: per token `dots[role, h, t] = q_t . dq_t` or
    `k_t . dk_t` over the role's columns. Static: `dots[p, role, h]`, which over p and role add up to

        dL/dd = sum of lag(u, s) X(u, s) over pairs,  X(u, s) = scale * exp(g_u - g_s) (dO_u . v_s) (q_u . k_s)

    with pairs of S_0 and dS_T. The lag is split at the bounds of chunks: place in the chunk of u, less that of s, plus
    the chunk's length for each bound between them. The places weigh the dot products that dq and dk give; within a
    chunk both round the scores alike, so that what cancels leaves nothing. The bounds are counted by dq's walk alone,
    in Z <- shrink Z + S, and nothing cancels. (As sums over the whole sequence, t q_t . dq_t - t k_t . dk_t, the
    rounding of the states, different in dq and dk, is multiplied by t: 2 to 20 % in bf16.) A fast decay leaves nothing
    over a whole chunk: a bound then counts 1 and the chunk's other tokens weigh what dk takes from later chunks, lest
    the pairs that cross it count 64 - 63 times. Its error is then of its operands' rounding, in between up to 1 %.
    """
    k_columns: tl.constexpr = (K + XK - 1) // XK
    v_columns: tl.constexpr = (V + XV - 1) // XV
    roles: tl.constexpr = 2 * k_columns + v_columns
    pid = tl.program_id(0)
    role = pid % roles
    if DECAY == 1 and roles <= PROCESSORS:
        role = (role + pid // roles // (PROCESSORS // roles) * (roles // 2)) % roles
    h = (pid // roles) % H
    p = pid // roles // H
    row, start, n = _segment(p, cuts, T, SEG, SEGMENTS, VARLEN, TABLE)
    state = (p.to(tl.int64) * H + h) * (K * V)
    at = row * T + start
    if DECAY == 1:
        log_decay = _checked(tl.load(log_decay + h).to(tl.float32))
        dots += (p.to(tl.int64) * (2 * k_columns) + role) * H + h
    if DECAY == 2:
        g += h.to(tl.int64) * g_stride + _decay_place(p, at, BT)
    h = h.to(tl.int64)
    q += row * q_b + start * q_t + h * q_h
    k += row * k_b + start * k_t + h * k_h
    v += row * v_b + start * v_t + h * v_h
    do += row * do_b + start * do_t + h * do_h
    dq += (at * H + h) * K
    dk += (at * H + h) * K
    dv += (at * H + h) * V
    before += state
    after += state
    dinitial += state
    is_dq = role < k_columns
    is_dv = role >= 2 * k_columns
    before_rows = V if BEFORE else 0
    before_scale = 1.0 if DECAY else -1.0
    after_rows = (K if is_dv else V) if AFTER else 0
    after_scale = 1.0 / scale if AFTER_SCALED else 1.0
    block = role % k_columns
    dot = dots
    if DECAY == 2:
        dot = dots + (role.to(tl.int64) * H + h) * tokens + at
    if DECAY == 1 and is_dq:
        _walk(do, v, k, q, dq, dot, do_t, v_t, k_t, q_t, H * K, before, before_rows, 1, V, 1.0, before, 0, 1.0,
              after, after_scale, block * XK, n, n, log_decay, g, scale, 0, 0,
              V, K, BV, XK, BT, DECAY, BEFORE, False, True, True, AFTER, False, PRECISION, STAGES)  # fmt: skip
    else:
        if DECAY == 1:
            is_dq = False
        against = 1
        if DECAY == 2:
            against = 0 if is_dq else 1
        strict = 0 if is_dq else 1
        if DECAY == 0:
            scale = -scale if is_dq else scale
        if K == V:  # one body for the roles: less code, less shared memory
            rows = -1 if is_dv else n
            _walk(do if is_dq else (k if is_dv else v), v if is_dq else (q if is_dv else do),
                  k if is_dq else (do if is_dv else q), q if is_dq else k, dq if is_dq else (dv if is_dv else dk), dot,
                  do_t if is_dq else (k_t if is_dv else v_t), v_t if is_dq else (q_t if is_dv else do_t),
                  k_t if is_dq else (do_t if is_dv else q_t), q_t if is_dq else k_t, H * K,
                  before if is_dq else after, before_rows if is_dq else after_rows,
                  V if is_dv else 1, 1 if is_dv else V, before_scale if is_dq else after_scale,
                  dinitial, K if is_dv else 0, scale, after, 1.0,
                  block * XK, n, rows, log_decay, g, scale, against, strict, V, K, BV, XK, BT,
                  DECAY, BEFORE or AFTER, END, DECAY != 0, False, False, DECAY == 0, PRECISION, STAGES)  # fmt: skip
        elif is_dv:
            _walk(k, q, do, k, dv, dots, k_t, q_t, do_t, k_t, H * V, after, after_rows, V, 1, after_scale, dinitial, K,
                  scale, after, 1.0, (role - 2 * k_columns) * XV, n, 0, log_decay, g, scale, 1, 1,
                  K, V, BK, XV, BT, DECAY, AFTER, END, False, False, False, DECAY == 0, PRECISION, STAGES)  # fmt: skip
        else:
            _walk(do if is_dq else v, v if is_dq else do, k if is_dq else q, q if is_dq else k,
                  dq if is_dq else dk, dot,
                  do_t if is_dq else v_t, v_t if is_dq else do_t, k_t if is_dq else q_t, q_t if is_dq else k_t, H * K,
                  before if is_dq else after, before_rows if is_dq else after_rows, 1, V,
                  before_scale if is_dq else after_scale, before, 0, 1.0, after, 1.0,
                  block * XK, n, n, log_decay, g, scale, against, strict, V, K, BV, XK, BT,
                  DECAY, BEFORE or AFTER, False, DECAY != 0, False, False, DECAY == 0, PRECISION, STAGES)  # fmt: skip


@triton.jit
def gather(a, b, out, totals, log_decay, g, mask, cuts, g_stride, T, H, SEG, SEGMENTS,
           a_b, a_t, a_h, b_b, b_t, b_h, W: tl.constexpr, X: tl.constexpr, BW: tl.constexpr, BX: tl.constexpr,
           BT: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr, MASK: tl.constexpr, SKIP: tl.constexpr,
           VARLEN: tl.constexpr, TABLE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """out[p, h] = sum over the segment of w_t a_t^T b_t, decayed to its end (REVERSE: to its start).

    With decay `totals[p, h]` is the segment's whole log decay. MASK: tokens where `mask[row, t]` is 0 are left out.
    SKIP: leaves out the last segment of each row (REVERSE: the first), from which nothing starts.
    """
    columns: tl.constexpr = (X + BX - 1) // BX
    pid = tl.program_id(0)
    x0 = (pid % columns) * BX
    h = (pid // columns) % H
    p = pid // columns // H
    if SKIP and p % SEGMENTS == (0 if REVERSE else SEGMENTS - 1):
        return
    row, start, n = _segment(p, cuts, T, SEG, SEGMENTS, VARLEN, TABLE)
    if DECAY == 1:
        log_decay = _checked(tl.load(log_decay + h).to(tl.float32))
    if DECAY == 2:
        g += h.to(tl.int64) * g_stride + _decay_place(p, row * T + start, BT)
    mask += row * T + start
    head = h.to(tl.int64)
    a += row * a_b + start * a_t + head * a_h
    b += row * b_b + start * b_t + head * b_h
    a_tiles = _tiles(a, n, a_t, W, BT, BW)
    b_tiles = _tiles(b, n, b_t, X, BT, BX)
    S = tl.zeros((BW, BX), tl.float32)
    total = 0.0
    chunks = tl.cdiv(n, BT)
    g_tiles = _sums(g, n, DECAY, BT)
    for i in tl.range(0, chunks, num_stages=STAGES):
        t0 = ((chunks - 1 - i) if REVERSE else i) * BT
        a_t_ = a_tiles.load([t0, 0])
        b_t_ = b_tiles.load([t0, x0])
        if MASK:
            t = t0 + tl.arange(0, BT)
            a_t_ = tl.where((tl.load(mask + t, t < n, other=0) != 0)[:, None], a_t_, 0.0).to(a_t_.dtype)
        if DECAY:
            g_t, g_end = _chunk_decay(log_decay, g, g_tiles, t0, n, DECAY, BT)
            weight = tl.exp2(g_t) if REVERSE else tl.exp2(g_end - g_t)
            S = _add(S, a_t_, b_t_, weight, tl.exp2(g_end), DECAY, PRECISION)
            total += g_end
        else:
            S = _add(S, a_t_, b_t_, 1.0, 1.0, DECAY, PRECISION)
    w = tl.arange(0, BW)[:, None]
    x = x0 + tl.arange(0, BX)[None, :]
    tl.store(out + (p.to(tl.int64) * H + h) * (W * X) + w * X + x, S, (w < W) & (x < X))
    if DECAY and x0 == 0:
        tl.store(totals + p.to(tl.int64) * H + h, total)


@triton.jit
def scan(states, totals, initial, final, first, before, last, inner, initial_scale, final_scale, inner_scale, H,
         SEGMENTS, P,
         SIZE: tl.constexpr, BLOCK: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr,
         INITIAL: tl.constexpr, FINAL: tl.constexpr, INNER: tl.constexpr, TABLE: tl.constexpr):  # fmt: skip
    """From every segment's own contribution to the state that it starts from, in place.

    A program is (sequence, head, BLOCK numbers of the state); REVERSE goes from the last segment to the first.
    INNER (with REVERSE): `inner[block, p, h] = inner_scale * <S, R>` at the end of segment p, where S is what segment
    p + 1 starts from, in `before`; behind the last segment it is `last`, and R is 0 unless INITIAL.
    """
    blocks: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    block = pid % blocks
    h = (pid // blocks) % H
    n = pid // blocks // H
    at = block * BLOCK + tl.arange(0, BLOCK)
    live = at < SIZE
    if TABLE:
        start = tl.load(first + n)
        count = (tl.load(first + n + 1) - start).to(tl.int32)
    else:
        start = n.to(tl.int64) * SEGMENTS
        count = SEGMENTS
    whole = (n.to(tl.int64) * H + h) * SIZE + at
    S = tl.load(initial + whole, live, other=0.0) * initial_scale if INITIAL else tl.zeros((BLOCK,), tl.float32)
    for j in range(count):
        p = (start + ((count - 1 - j) if REVERSE else j)) * H + h
        own = tl.load(states + p * SIZE + at, live, other=0.0)
        tl.store(states + p * SIZE + at, S, live)
        if INNER:
            if j > 0:
                tl.store(inner + block.to(tl.int64) * P * H + p,
                         tl.sum(S * tl.load(before + (p + H) * SIZE + at, live, other=0.0)) * inner_scale)  # fmt: skip
            elif INITIAL:
                tl.store(inner + block.to(tl.int64) * P * H + p,
                         tl.sum(S * tl.load(last + whole, live, other=0.0)) * inner_scale)  # fmt: skip
        if DECAY:
            S *= tl.exp2(tl.load(totals + p))
        S += own
    if FINAL:
        tl.store(final + whole, S * final_scale, live)


@triton.jit
def decay_gradient(dots, inner, log_decay, out, cuts, T, H, SEG, SEGMENTS, tokens, P, d_b, d_t, d_h,
                   K_COLUMNS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
                   VARLEN: tl.constexpr, TABLE: tl.constexpr):  # fmt: skip
    """dL/d log_decay_t = <S, dS at the segment's end> + sum_{u >= t} (q_u . dq_u - k_u . dk_u), per token.

    A program is (segment, head). The sum is the inner product of the state before t, decayed, with the gradient of the
    state after t: of all pairs (u, s) those with s < t <= u count once, the others cancel. Starting each segment from
    the inner product of the states at its end, `inner[part, p, h]`, keeps rounding from piling up over the
    whole sequence.
    """
    pid = tl.program_id(0)
    h = pid % H
    p = pid // H
    row, start, n = _segment(p, cuts, T, SEG, SEGMENTS, VARLEN, TABLE)
    tail = 0.0
    for part in tl.static_range(PARTS):
        tail += tl.load(inner + (part * P + p).to(tl.int64) * H + h)
    at = row * T + start
    tiles = tl.cdiv(n, BLOCK)
    for i in range(tiles):
        t = (tiles - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        live = t < n
        x = tl.zeros((BLOCK,), tl.float32)
        for column in tl.static_range(K_COLUMNS):
            of_q = (h.to(tl.int64) + column * H) * tokens + at + t
            of_k = (h.to(tl.int64) + (K_COLUMNS + column) * H) * tokens + at + t
            x += tl.load(dots + of_q, live, other=0.0) - tl.load(dots + of_k, live, other=0.0)
        whole = tl.sum(x)
        d = tail + (whole - tl.cumsum(x) + x)
        tail += whole
        place = row * d_b + (start + t) * d_t + h.to(tl.int64) * d_h
        clamped = tl.load(log_decay + place, live, other=0.0).to(tl.float32) * LOG2_E < LEAST
        tl.store(out + (at + t) * H + h, tl.where(clamped, 0.0, d).to(out.dtype.element_ty), live)


@triton.jit
def step(q, k, v, state, log_decay, o, new_state, scale, H, q_b, q_h, k_b, k_h, v_b, v_h, d_b, d_h,
         K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BX: tl.constexpr, DECAY: tl.constexpr):  # fmt: skip
    """One token: S' = exp(d) S + k^T v, o = scale * q S'. A program is (row, head, BX columns of v)."""
    columns: tl.constexpr = (V + BX - 1) // BX
    pid = tl.program_id(0)
    x = (pid % columns) * BX + tl.arange(0, BX)
    h = (pid // columns) % H
    b = (pid // columns // H).to(tl.int64)
    w = tl.arange(0, BK)
    q_w = tl.load(q + b * q_b + h * q_h + w, w < K, other=0.0).to(tl.float32)
    k_w = tl.load(k + b * k_b + h * k_h + w, w < K, other=0.0).to(tl.float32)
    v_x = tl.load(v + b * v_b + h * v_h + x, x < V, other=0.0).to(tl.float32)
    at = (b * H + h) * (K * V) + w[:, None] * V + x[None, :]
    live = (w < K)[:, None] & (x < V)[None, :]
    S = tl.load(state + at, live, other=0.0)
    if DECAY:
        S *= tl.exp2(_checked(tl.load(log_decay + b * d_b + h * d_h).to(tl.float32)))
    S += k_w[:, None] * v_x[None, :]
    tl.store(new_state + at, S, live)
    out = tl.sum(q_w[:, None] * S, 0) * scale
    tl.store(o + (b * H + h) * V + x, out.to(o.dtype.element_ty), x < V)
