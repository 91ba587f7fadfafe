"""Triton kernels of modal filters: an exact near part on tensor cores, and a far part carried as a state.

The formula is `reference.modal_scan`'s. Channels that share a filter, and several segments of the tokens, stand side by
side as the N columns of one product, so that one chunk of C tokens costs

    U^T [N, C] = X^T [N, C] near^T [C, C] + S^T [N, SP] out^T [SP, C]
    S^T       <- turn(S^T) + X^T into^T [C, SP]

A state's row holds the real parts of all modes, then the imaginary ones: S1 = (re, im). Beside it runs i S, that is
S2 = (-im, re), so that turning by p^C = a + i b needs no exchange of rows: S1 <- a S1 + b S2, S2 <- a S2 - b S1.
Columns come first in the products because an accumulator [N, ...] is a left operand of the next product as it lies.

Where rows are few, the tokens are cut into segments that run side by side: `modal_ends` finds the state each segment
adds, `modal_carry` strings them together. `modal_scan` then goes through each segment.

The gradient of x is the same scan against time (REVERSE) with `into` and `out` exchanged and near transposed, over the
adjoint states L: L_n = turn^T L_(n+1) + out^T dU; what it finds, times x, sums up to the scale's gradient. With the
states that both scans leave at each chunk, all other gradients are sums over chunks in any order, which `modal_sums`
takes in a fixed one, program by program,

    dnear = dU (scale X)^T     dout = dU (scale S)^T     dinto = (scale X) L^T     dturn = L . (scale S)

and `modal_gradient` adds up and takes on to the poles and residues. A thread of a scan holds 8 rows one token apart,
and for short taps those around them, so that each input is read (7 + taps) / 8 times: the rows are put together as the
products' X, and their sums are split into rows again, for the short taps, SiLU and the stores. `short_sums` takes the
short taps' gradient and the bias' in the pass that takes dy back through SiLU. A two-sided filter is two scans, the
second over the tokens in reverse order (negative strides), which adds to what the first left in fp32.

X_T, Y_T, G_T and U_T are strides of time where these are the width, 0 otherwise: compiled in, they leave one address
for all rows. FETCH: the next chunk is loaded while this one is multiplied.
"""

# Triton unrolls loops over tuples that grow: joined with +, since it does not unpack them, and of no one type.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc, var-annotated"
import os

import triton
import triton.language as tl

RUN = tl.constexpr(8)  # neighbouring tokens that a thread holds
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on"))


@triton.jit
def _power(log_radius, turns, lag):
    """p^lag; turns: the angle over 2 pi, in fp64, for it grows with the lag."""
    radius = tl.exp(log_radius * lag.to(tl.float32))
    turned = turns * lag.to(tl.float64)
    angle = (turned - tl.floor(turned)).to(tl.float32) * 6.283185307179586
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def _modes(log_time, frequency, residue, g, s, M, SP: tl.constexpr):
    """log|p|, angle over 2 pi, log time, whether there is such a mode, c and (1 - |p|) for each place s of a state."""
    m = s % (SP // 2)
    live = m < M
    t = tl.load(log_time + g * M + m, live, other=0.0).to(tl.float32)
    f = tl.load(frequency + g * M + m, live, other=0.0).to(tl.float64)
    re = tl.load(residue + (g * M + m) * 2, live, other=0.0).to(tl.float32)
    im = tl.load(residue + (g * M + m) * 2 + 1, live, other=0.0).to(tl.float32)
    rate = tl.exp(-t)
    # 1 - e^-rate without cancellation where rate is small.
    series = rate * (1 - rate / 2 * (1 - rate / 3 * (1 - rate / 4 * (1 - rate / 5))))
    loss = tl.where(rate < 0.03, series, 1 - tl.exp(-rate))
    return -rate, f * 0.15915494309189535, live, re, im, loss


@triton.jit(do_not_specialize=["M", "size"])
def modal_matrices(log_time, frequency, residue, taps, into, out, turn, M, size, C: tl.constexpr, SP: tl.constexpr,
                   STRICT: tl.constexpr):  # fmt: skip
    """Of one group: taps `[C]`; into, out `[2, C, SP]`, for S1 and for S2; turn `[2, 2, SP]`, by C and size tokens.
    STRICT: the tap at lag 0 is 0."""
    g = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, SP)
    r = tl.arange(0, C)
    log_radius, turns, live, re, im, loss = _modes(log_time, frequency, residue, g, s, M, SP)
    real = (s < SP // 2)[None, :]
    c_re, c_im = (re * loss)[None, :], (im * loss)[None, :]
    z_re, z_im = _power(log_radius[None, :], turns[None, :], r[:, None])
    z_re, z_im = tl.where(live[None, :], z_re, 0.0), tl.where(live[None, :], z_im, 0.0)

    tile = g * (2 * C * SP) + (C - 1 - r)[:, None] * SP + s[None, :]  # at lag C - 1 - r
    tl.store(into + tile, tl.where(real, z_re, z_im).to(into.dtype.element_ty))
    tl.store(into + tile + C * SP, tl.where(real, -z_im, z_re).to(into.dtype.element_ty))

    tap = tl.sum(tl.where(real, c_re * z_re - c_im * z_im, 0.0), 1)
    tl.store(taps + g * C + r, tl.where(r > 0, tap, 0.0) if STRICT else tap)

    tile = g * (2 * C * SP) + r[:, None] * SP + s[None, :]  # at lag r + 1
    p_re, p_im = _power(log_radius, turns, tl.full((SP,), 1, tl.int32))
    z_re, z_im = z_re * p_re[None, :] - z_im * p_im[None, :], z_re * p_im[None, :] + z_im * p_re[None, :]
    w_re, w_im = c_re * z_re - c_im * z_im, c_re * z_im + c_im * z_re
    tl.store(out + tile, tl.where(real, w_re, -w_im).to(out.dtype.element_ty))
    tl.store(out + tile + C * SP, tl.where(real, -w_im, -w_re).to(out.dtype.element_ty))

    at = turn + g * (4 * SP) + s
    z_re, z_im = _power(log_radius, turns, tl.full((SP,), C, tl.int32))
    tl.store(at, z_re)
    tl.store(at + SP, z_im)
    z_re, z_im = _power(log_radius, turns, tl.zeros((SP,), tl.int32) + size)
    tl.store(at + 2 * SP, z_re)
    tl.store(at + 3 * SP, z_im)


@triton.jit
def _columns(places, T, D, R, Q, segments, per_row, size, blocks, C: tl.constexpr, CB: tl.constexpr, N: tl.constexpr,
             PACKED: tl.constexpr):  # fmt: skip
    """This program's group, channel block and, for its columns: segment, channel, first token, what lies around it.

    q: channel block in all, of Q; before: tokens of the sequence before the segment; left: from its start on; slot:
    where the states of its chunks begin."""
    pid = tl.program_id(0)
    q = pid % Q
    n = tl.arange(0, N)
    segment = (pid // Q) * (N // CB) + n // CB
    g = q // blocks
    channel = (q % blocks) * CB + n % CB
    live = (segment < segments) & (channel < R)
    if PACKED:
        begin = tl.load(places + segment, live, other=0)
        before = tl.load(places + segments + segment, live, other=0).to(tl.int32)
        left = tl.maximum(tl.load(places + 2 * segments + segment, live, other=0).to(tl.int32), 0)
        slot = tl.load(places + 3 * segments + segment, live, other=0)
        row = begin * 0
    else:
        row = (segment // per_row).to(tl.int64)
        before = tl.where(live, segment % per_row * size, 0)  # a dead column reads nothing, ahead of it neither
        begin = before.to(tl.int64)
        left = tl.where(live, T - before, 0)
        slot = row * ((T + C - 1) // C) + before // C
    d = (g * R + channel).to(tl.int64)
    return g.to(tl.int64), q.to(tl.int64), segment.to(tl.int64), d, live, row, begin, before, left, slot


@triton.jit
def _state_at(base, segment, q, Q, SP: tl.constexpr, CB: tl.constexpr, N: tl.constexpr, SWAP: tl.constexpr):
    """Where the states `[segments, Q, CB, SP]` of the columns lie; with SWAP re and im exchanged."""
    s = tl.arange(0, SP)
    if SWAP:
        s = (s + SP // 2) % SP
    n = tl.arange(0, N)
    return base + ((segment * Q + q) * CB + n % CB)[:, None] * SP + s[None, :]


@triton.jit
def _join_run(t):
    """RUN tiles `[C / RUN, N]`, one token apart, as one tile `[C, N]`."""
    low = tl.join(tl.join(t[0], t[1]), tl.join(t[2], t[3]))
    high = tl.join(tl.join(t[4], t[5]), tl.join(t[6], t[7]))
    return tl.reshape(tl.permute(tl.join(low, high), (0, 4, 3, 2, 1)), (t[0].shape[0] * RUN, t[0].shape[1]))


@triton.jit
def _split_run(t):
    """The other way round: RUN tiles `[C / RUN, N]`, one token apart, of one tile `[C, N]`."""
    t = tl.permute(tl.reshape(t, (t.shape[0] // RUN, 2, 2, 2, t.shape[1])), (0, 4, 3, 2, 1))
    low, high = tl.split(t)
    t01, t23 = tl.split(low)
    t45, t67 = tl.split(high)
    t0, t1 = tl.split(t01)
    t2, t3 = tl.split(t23)
    t4, t5 = tl.split(t45)
    t6, t7 = tl.split(t67)
    return t0, t1, t2, t3, t4, t5, t6, t7


@triton.jit
def _near(taps, g, row, column, C: tl.constexpr):
    lag = row - column
    return tl.load(taps + g * C + lag, lag >= 0, other=0.0)


@triton.jit(do_not_specialize=["T", "segments", "per_row"])
def modal_ends(x, ends, into, turn, places, T, D, R, Q, segments, per_row, size, blocks, x_b, x_t, x_d,
               C: tl.constexpr, SP: tl.constexpr, CB: tl.constexpr, N: tl.constexpr, REVERSE: tl.constexpr,
               PACKED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """What each segment adds to the state, `[segments, Q, CB, SP]`; REVERSE: against time."""
    g, q, segment, d, _, row, begin, _, left, _ = _columns(
        places, T, D, R, Q, segments, per_row, size, blocks, C, CB, N, PACKED
    )
    r, s = tl.arange(0, C), tl.arange(0, SP)
    dtype = into.dtype.element_ty
    tile = g * (2 * C * SP) + r[:, None] * SP + s[None, :]
    V1, V2 = tl.load(into + tile), tl.load(into + tile + C * SP)
    a, b = tl.load(turn + g * (4 * SP) + s)[None, :], tl.load(turn + g * (4 * SP) + SP + s)[None, :]
    S1 = tl.zeros((N, SP), tl.float32)
    S2 = tl.zeros((N, SP), tl.float32)
    x += row * x_b + begin * x_t + d * x_d
    chunks = (tl.minimum(tl.max(left), size) + C - 1).to(tl.int32) // C
    for c in tl.range(0, chunks, num_stages=STAGES):
        if REVERSE:
            c = chunks - 1 - c
        t = c * C + r
        held = t[:, None] < left[None, :]
        XT = tl.trans(tl.load(x[None, :] + t.to(tl.int64)[:, None] * x_t, held, other=0.0).to(dtype))
        A1, A2 = a * S1 + b * S2, a * S2 - b * S1
        S1 = tl.dot(XT, V1, A1, input_precision=PRECISION)
        S2 = tl.dot(XT, V2, A2, input_precision=PRECISION)
    tl.store(_state_at(ends, segment, q, Q, SP, CB, N, False), S1, (segment < segments)[:, None])


@triton.jit(do_not_specialize=["segments", "count"])
def modal_carry(ends, starts, turn, places, Q, segments, count, blocks, SP: tl.constexpr, CB: tl.constexpr,
                REVERSE: tl.constexpr, PACKED: tl.constexpr, SIDE: tl.constexpr):  # fmt: skip
    """The state that each segment starts from (REVERSE: ends with), strung together over a row's segments in turn."""
    q = (tl.program_id(0) % Q).to(tl.int64)
    first = tl.program_id(0) // Q * count
    g = q // blocks
    s = tl.arange(0, SP)
    a = tl.load(turn + g * (4 * SP) + 2 * SP + s)[None, :]
    b = tl.load(turn + g * (4 * SP) + 3 * SP + s)[None, :]
    sign = tl.where((s < SP // 2) == REVERSE, 1.0, -1.0)[None, :]
    n = tl.arange(0, CB)[:, None]
    S1 = tl.zeros((CB, SP), tl.float32)
    S2 = tl.zeros((CB, SP), tl.float32)
    swapped = (s + SP // 2) % SP
    for some in range(0, count, SIDE):
        # Loads of several segments before their stores, or each segment waits for memory alone.
        found = ()
        for k in tl.static_range(SIDE):
            i = count - 1 - (some + k) if REVERSE else some + k
            at = (((first + i).to(tl.int64) * Q + q) * CB + n) * SP
            there = some + k < count
            E1, E2 = tl.load(ends + at + s[None, :], there), tl.load(ends + at + swapped[None, :], there)
            found = found + ((E1, E2 * sign),)
        for k in tl.static_range(SIDE):
            i = count - 1 - (some + k) if REVERSE else some + k
            segment = first + i
            if PACKED:
                if REVERSE:  # nothing comes back from another sequence
                    next_is_there = (some + k < count) & (segment + 1 < segments)
                    begins = tl.load(places + segments + segment + 1, next_is_there, other=0) == 0
                else:
                    begins = tl.load(places + segments + segment, some + k < count, other=0) == 0
                S1, S2 = tl.where(begins, 0.0, S1), tl.where(begins, 0.0, S2)
            at = ((segment.to(tl.int64) * Q + q) * CB + n) * SP
            tl.store(starts + at + s[None, :], S1, some + k < count)
            E1, E2 = found[k]
            S1, S2 = a * S1 + b * S2 + E1, a * S2 - b * S1 + E2


@triton.jit
def _run_of(x, t, before, left, x_t, LENGTH: tl.constexpr, FIRST: tl.constexpr):
    """x at tokens t + FIRST on of a segment, one token apart: a tuple of LENGTH tiles, zero where there is no token."""
    run = ()
    for j in tl.static_range(LENGTH):
        at = t + (j + FIRST)
        # From the sequence's or the segment's start on, as numbers without a sign: one comparison, not two.
        if FIRST < 0:
            since, end = at[:, None] + before[None, :], before + left
        else:
            since, end = at[:, None], left
        seen = since.to(tl.uint32, bitcast=True) < end[None, :].to(tl.uint32, bitcast=True)
        run = run + (tl.load(x[None, :] + at.to(tl.int64)[:, None] * x_t, seen, other=0.0),)
    return run


@triton.jit
def _sigmoid(x):
    """By approximations within 2 ulp that leave out denormals and quotients beyond 2^126: 4 instructions, not 12."""
    if INTERPRETED:
        return 1 / (1 + tl.exp(-x))
    return tl.inline_asm_elementwise(
        """{
        .reg .f32 t;
        mul.f32 t, $1, 0fBFB8AA3B;
        ex2.approx.ftz.f32 t, t;
        add.f32 t, t, 0f3F800000;
        rcp.approx.ftz.f32 $0, t;
        }""",
        "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "segments", "per_row"])
def modal_scan(x, y, u, add, states, starts, taps, into, out, turn, short, scale, bias, dscale, places, T, D, R, Q,
               segments, per_row, size, blocks, x_b, x_t, x_d, y_b, y_t, y_d,
               C: tl.constexpr, SP: tl.constexpr, CB: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
               AHEAD: tl.constexpr, ADD: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr,
               SAVE: tl.constexpr, CARRY: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr,
               PRECISION: tl.constexpr, STAGES: tl.constexpr, FETCH: tl.constexpr, X_T: tl.constexpr,
               Y_T: tl.constexpr):  # fmt: skip
    """y = SiLU(u) or u, u = bias + short * x + scale (modal * x). SAVE: also u (with SILU) and each
    chunk's state, scaled.

    REVERSE: the transpose of short * x + scale (modal * x), for which `into` and `out` come exchanged. With SCALE
    `u`, which then is what the filter met, laid out as y, fills `dscale [D, segments]`: <modal * u, x> =
    <u, modal^T x>. AHEAD: short taps in front of lag 0. ADD: more summands of u, laid out as y."""
    g, q, segment, d, live, row, begin, before, left, slot = _columns(
        places, T, D, R, Q, segments, per_row, size, blocks, C, CB, N, PACKED
    )
    r, s = tl.arange(0, C), tl.arange(0, SP)
    H: tl.constexpr = C // RUN
    SIGN: tl.constexpr = -1.0 if REVERSE else 1.0
    dtype = into.dtype.element_ty
    tile = g * (2 * C * SP) + r[:, None] * SP + s[None, :]
    V1, V2 = tl.load(into + tile), tl.load(into + tile + C * SP)
    WT = tl.load(out + g * (2 * C * SP) + r[None, :] * SP + s[:, None])
    if REVERSE:
        NT = _near(taps, g, r[:, None], r[None, :], C).to(dtype)
    else:
        NT = _near(taps, g, r[None, :], r[:, None], C).to(dtype)
    a, b = tl.load(turn + g * (4 * SP) + s)[None, :], tl.load(turn + g * (4 * SP) + SP + s)[None, :]
    S1 = tl.zeros((N, SP), tl.float32)
    S2 = tl.zeros((N, SP), tl.float32)
    if CARRY:
        there = (segment < segments)[:, None]
        S1 = tl.load(_state_at(starts, segment, q, Q, SP, CB, N, False), there, other=0.0)
        S2 = tl.load(_state_at(starts, segment, q, Q, SP, CB, N, True), there, other=0.0)
        S2 *= tl.where(s < SP // 2, -SIGN, SIGN)[None, :]
    x += row * x_b + begin * x_t + d * x_d
    y += row * y_b + begin * y_t + d * y_d
    u += row * y_b + begin * y_t + d * y_d
    add += row * y_b + begin * y_t + d * y_d
    factor = tl.full((N,), 1.0, tl.float32)
    if SCALE:
        factor = tl.load(scale + d, live, other=0.0).to(tl.float32)
    shift = tl.zeros((N,), tl.float32)
    if BIAS:
        shift = tl.load(bias + d, live, other=0.0).to(tl.float32)
    if X_T != 0:
        x_t = X_T
    if Y_T != 0:
        y_t = Y_T
    acc_scale = tl.zeros((H, N), tl.float32)
    h = tl.arange(0, H) * RUN
    tap = ()
    for k in tl.static_range(K):
        tap = tap + (tl.load(short + d * K + k, live, other=0.0).to(tl.float32),)
    BEHIND: tl.constexpr = 0 if K == 0 else (AHEAD if REVERSE else K - 1 - AHEAD)
    LENGTH: tl.constexpr = RUN + (K - 1 if K > 0 else 0)
    chunks = (tl.minimum(tl.max(left), size) + C - 1).to(tl.int32) // C
    if FETCH:
        first = chunks - 1 if REVERSE else 0
        next_run = _run_of(x, first * C + h, before, left, x_t, LENGTH, -BEHIND)
    for step in tl.range(0, chunks, num_stages=STAGES):
        c = chunks - 1 - step if REVERSE else step
        if FETCH:
            run = next_run
            # The next chunk is on its way while this one is multiplied: no load goes past the stores below.
            next_run = _run_of(x, (c - 1 if REVERSE else c + 1) * C + h, before, left, x_t, LENGTH, -BEHIND)
        else:
            run = _run_of(x, c * C + h, before, left, x_t, LENGTH, -BEHIND)
        middle = ()
        for j in tl.static_range(RUN):
            middle = middle + (run[BEHIND + j].to(dtype),)
        XT = tl.trans(_join_run(middle))
        if REVERSE and SCALE:
            met = _run_of(u, c * C + h, before, left, y_t, RUN, 0)
        if SAVE:
            at = _state_at(states, slot + c, q, Q, SP, CB, N, False)
            kept = S1 * factor[:, None] if SCALE and not REVERSE else S1
            tl.store(at, kept.to(dtype), (live & (c * C < left))[:, None])
        acc = tl.dot(S1.to(dtype), WT, input_precision=PRECISION)
        acc = tl.dot(XT, NT, acc, input_precision=PRECISION)
        A1, A2 = a * S1 + b * S2, a * S2 - b * S1
        S1 = tl.dot(XT, V1, A1, input_precision=PRECISION)
        S2 = tl.dot(XT, V2, A2, input_precision=PRECISION)
        rows = _split_run(tl.trans(acc))
        for j in tl.static_range(RUN):
            t = c * C + h + j
            held = t[:, None] < left[None, :]
            at = t.to(tl.int64)[:, None] * y_t
            total = rows[j]
            if REVERSE and SCALE:
                acc_scale += total * met[j].to(tl.float32)
            total = total * factor[None, :] + shift[None, :]
            for k in tl.static_range(K):
                total += run[j + (k if REVERSE else K - 1 - k)].to(tl.float32) * tap[k][None, :]
            if ADD:
                total += tl.load(add[None, :] + at, held, other=0.0).to(tl.float32)
            if SILU:
                if SAVE:
                    tl.store(u[None, :] + at, total.to(dtype), held)
                total *= _sigmoid(total)
            tl.store(y[None, :] + at, total.to(y.dtype.element_ty), held)
    if REVERSE and SCALE:
        tl.store(dscale + d * segments + segment, tl.sum(acc_scale, 0), live)


@triton.jit
def _met_in_sums(du, x, states, adjoints, c, slot, q, Q, left, live, g_t, x_t, C: tl.constexpr, SP: tl.constexpr,
                 CB: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """Of chunk c: du and x `[C, N]`, state, adjoint state and the latter with re and im exchanged `[N, SP]`."""
    t = c * C + tl.arange(0, C)
    held = t[:, None] < left[None, :]
    G = tl.load(du[None, :] + t.to(tl.int64)[:, None] * g_t, held, other=0.0)
    X = tl.load(x[None, :] + t.to(tl.int64)[:, None] * x_t, held, other=0.0)
    here = (live & (c * C < left))[:, None]
    S = tl.load(_state_at(states, slot + c, q, Q, SP, CB, N, False), here, other=0.0)
    L = tl.load(_state_at(adjoints, slot + c, q, Q, SP, CB, N, False), here, other=0.0)
    L2 = tl.load(_state_at(adjoints, slot + c, q, Q, SP, CB, N, True), here, other=0.0)
    return G, X, S, L, L2


@triton.jit(do_not_specialize=["T", "segments", "per_row"])
def modal_sums(du, x, states, adjoints, scale, places, dnear, dinto, dout, dturn, T, D, R, Q, segments, per_row,
               size, blocks, g_b, g_t, g_d, x_b, x_t, x_d,
               C: tl.constexpr, SP: tl.constexpr, CB: tl.constexpr, N: tl.constexpr, SCALE: tl.constexpr,
               PACKED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, FETCH: tl.constexpr,
               X_T: tl.constexpr, G_T: tl.constexpr):  # fmt: skip
    """This program's share of dnear `[C, C]`, dinto and dout `[C, SP]`, dturn `[2, SP]`."""
    pid = tl.program_id(0).to(tl.int64)
    _, q, _, d, live, row, begin, _, left, slot = _columns(
        places, T, D, R, Q, segments, per_row, size, blocks, C, CB, N, PACKED
    )
    r, s = tl.arange(0, C), tl.arange(0, SP)
    dtype = states.dtype.element_ty
    du += row * g_b + begin * g_t + d * g_d
    x += row * x_b + begin * x_t + d * x_d
    factor = tl.full((N,), 1.0, tl.float32)
    if SCALE:
        factor = tl.load(scale + d, live, other=0.0).to(tl.float32)
    chunks = (tl.minimum(tl.max(left), size) + C - 1).to(tl.int32) // C
    acc_near = tl.zeros((C, C), tl.float32)
    acc_into = tl.zeros((C, SP), tl.float32)
    acc_out = tl.zeros((C, SP), tl.float32)
    turn_re = tl.zeros((N, SP), tl.float32)
    turn_im = tl.zeros((N, SP), tl.float32)
    if X_T != 0:
        x_t = X_T
    if G_T != 0:
        g_t = G_T
    if FETCH:
        ahead = _met_in_sums(du, x, states, adjoints, 0, slot, q, Q, left, live, g_t, x_t, C, SP, CB, N)
    for c in tl.range(0, chunks, num_stages=STAGES):
        if FETCH:
            G, X, S, L, L2 = ahead
            ahead = _met_in_sums(du, x, states, adjoints, c + 1, slot, q, Q, left, live, g_t, x_t, C, SP, CB, N)
        else:
            G, X, S, L, L2 = _met_in_sums(du, x, states, adjoints, c, slot, q, Q, left, live, g_t, x_t, C, SP, CB, N)
        L2 = L2.to(tl.float32)
        turn_re += L.to(tl.float32) * S.to(tl.float32)
        turn_im += L2 * S.to(tl.float32)
        if SCALE:
            X = (X.to(tl.float32) * factor[None, :]).to(dtype)
        acc_near = tl.dot(G, tl.trans(X), acc_near, input_precision=PRECISION)
        acc_out = tl.dot(G, S, acc_out, input_precision=PRECISION)
        acc_into = tl.dot(X, L, acc_into, input_precision=PRECISION)
    tl.store(dnear + pid * (C * C) + r[:, None] * C + r[None, :], acc_near)
    tl.store(dinto + pid * (C * SP) + r[:, None] * SP + s[None, :], acc_into)
    tl.store(dout + pid * (C * SP) + r[:, None] * SP + s[None, :], acc_out)
    tl.store(dturn + pid * (2 * SP) + s, tl.sum(turn_re, 0))
    # L2 holds L with re and im exchanged, without the sign that i L has.
    tl.store(dturn + pid * (2 * SP) + SP + s, tl.sum(turn_im, 0) * tl.where(s < SP // 2, 1.0, -1.0))


@triton.jit(do_not_specialize=["T", "segments", "per_row"])
def short_sums(dy, u, x, du, places, shares, T, D, segments, per_row, size, d_blocks, g_b, g_t, g_d, u_b, u_t, u_d,
               x_b, x_t, x_d, C: tl.constexpr, K: tl.constexpr, AHEAD: tl.constexpr, PARTS: tl.constexpr,
               SILU: tl.constexpr, PACKED: tl.constexpr, BD: tl.constexpr, X_T: tl.constexpr, G_T: tl.constexpr,
               U_T: tl.constexpr):  # fmt: skip
    """SILU: du = dy SiLU'(u), laid out as u. A row of shares, for each of PARTS parts of a segment: what its tokens
    give the short taps `[D, K]`, and behind them the bias `[D]`."""
    pid = tl.program_id(0)
    d = (pid % d_blocks * BD + tl.arange(0, BD)).to(tl.int64)
    there = (d < D)[None, :]
    share = pid // d_blocks
    segment, part = share // PARTS, share % PARTS
    if PACKED:
        begin = tl.load(places + segment)
        before = tl.load(places + segments + segment).to(tl.int32)
        left = tl.load(places + 2 * segments + segment).to(tl.int32)
        row = begin * 0
    else:
        row = (segment // per_row).to(tl.int64)
        before = segment % per_row * size
        begin = before.to(tl.int64)
        left = T - before
    H: tl.constexpr = C // RUN
    h = tl.arange(0, H)[:, None] * RUN
    dy += row * g_b + begin * g_t + d[None, :] * g_d
    u += row * u_b + begin * u_t + d[None, :] * u_d
    du += row * u_b + begin * u_t + d[None, :] * u_d
    x += row * x_b + begin * x_t + d[None, :] * x_d
    if X_T != 0:
        x_t = X_T
    if G_T != 0:
        g_t = G_T
    if U_T != 0:
        u_t = U_T
    acc_bias = tl.zeros((H, BD), tl.float32)
    accs = ()
    for _ in tl.static_range(K):
        accs = accs + (tl.zeros((H, BD), tl.float32),)
    chunks = (tl.minimum(left, size) + C - 1).to(tl.int32) // C
    for c in range(chunks * part // PARTS, chunks * (part + 1) // PARTS):
        first = c * C + h
        xs = ()
        for j in tl.static_range(RUN + K - 1 if K > 0 else 0):
            t = first + (j - (K - 1) + AHEAD)
            seen = there & (t + before >= 0) & (t < left)
            xs = xs + (tl.load(x + t.to(tl.int64) * x_t, seen, other=0.0),)
        # All loads of a chunk before its first store: the compiler takes none past a store, and each would wait alone.
        grads = ()
        values = ()
        for j in tl.static_range(RUN):
            t = first + j
            seen = there & (t < left)
            grads = grads + (tl.load(dy + t.to(tl.int64) * g_t, seen, other=0.0),)
            if SILU:
                values = values + (tl.load(u + t.to(tl.int64) * u_t, seen, other=0.0),)
        for j in tl.static_range(RUN):
            grad = grads[j].to(tl.float32)
            if SILU:
                t = first + j
                value = values[j].to(tl.float32)
                gate = _sigmoid(value)
                grad = (grad * gate * (1 + value * (1 - gate))).to(du.dtype.element_ty)
                tl.store(du + t.to(tl.int64) * u_t, grad, there & (t < left))
                grad = grad.to(tl.float32)
            acc_bias += grad
            news = ()
            for k in tl.static_range(K):
                news = news + (accs[k] + grad * xs[j + K - 1 - k].to(tl.float32),)
            accs = news
    held = d < D
    shares += share.to(tl.int64) * D * (K + 1)
    for k in tl.static_range(K):
        tl.store(shares + d * K + k, tl.sum(accs[k], 0), held)
    tl.store(shares + D * K + d, tl.sum(acc_bias, 0), held)


@triton.jit(do_not_specialize=["M", "parts", "rows"])
def modal_gradient(dnear, dinto, dout, dturn, log_time, frequency, residue, dlog_time, dfrequency, dresidue, shares,
                   sums, M, Q, parts, blocks, groups, rows, columns, C: tl.constexpr, SP: tl.constexpr,
                   STRICT: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Sums a group's shares and takes them on to its poles and residues; programs beyond the groups sum up BLOCK
    columns each of `short_sums`' shares `[rows, columns]`.

    Every entry is a real function of z = p^lag: with G = dL/dRe z + i dL/dIm z, what it gives log|p| is
    lag Re(conj(G) z), and what it gives the angle is lag Re(conj(G) i z)."""
    g = tl.program_id(0)
    r = tl.arange(0, C)
    if g >= groups:
        column = (g - groups) * BLOCK + tl.arange(0, BLOCK)
        held = column < columns
        total = tl.zeros((C, BLOCK), tl.float32)
        for first in tl.range(0, rows, C, num_stages=STAGES):
            at = (first + r).to(tl.int64)[:, None] * columns + column[None, :]
            total += tl.load(shares + at, (first + r < rows)[:, None] & held[None, :], other=0.0)
        tl.store(sums + column, tl.sum(total, 0), held)
        return
    H: tl.constexpr = SP // 2
    m = tl.arange(0, H)
    N = tl.zeros((C, C), tl.float32)
    into_re = tl.zeros((C, H), tl.float32)
    into_im = tl.zeros((C, H), tl.float32)
    out_re = tl.zeros((C, H), tl.float32)
    out_im = tl.zeros((C, H), tl.float32)
    turn_re = tl.zeros((H,), tl.float32)
    turn_im = tl.zeros((H,), tl.float32)
    half = r[:, None] * SP + m[None, :]
    turned = (C - 1 - r)[:, None] * SP + m[None, :]  # row r of `into` holds the power C - 1 - r
    for i in tl.range(0, parts * blocks, num_stages=STAGES):
        pid = ((i // blocks) * Q + g * blocks + i % blocks).to(tl.int64)
        N += tl.load(dnear + pid * (C * C) + r[:, None] * C + r[None, :])
        into_re += tl.load(dinto + pid * (C * SP) + turned)
        into_im += tl.load(dinto + pid * (C * SP) + turned + H)
        out_re += tl.load(dout + pid * (C * SP) + half)
        out_im -= tl.load(dout + pid * (C * SP) + half + H)
        turn_re += tl.load(dturn + pid * (2 * SP) + m) + tl.load(dturn + pid * (2 * SP) + H + m)
        turn_im += tl.load(dturn + pid * (2 * SP) + SP + m) + tl.load(dturn + pid * (2 * SP) + SP + H + m)
    rotated = tl.gather(N, (r[:, None] - r[None, :] + C) % C, 1)
    dtaps = tl.sum(tl.where(r[:, None] >= r[None, :], rotated, 0.0), 0)
    if STRICT:
        dtaps = tl.where(r > 0, dtaps, 0.0)
    dtaps = dtaps[:, None]
    log_radius, turns, live, re, im, loss = _modes(log_time, frequency, residue, g, m, M, SP)
    c_re, c_im = (re * loss)[None, :], (im * loss)[None, :]

    lag = r[:, None]
    z_re, z_im = _power(log_radius[None, :], turns[None, :], lag)
    dc_re, dc_im = dtaps * z_re, -dtaps * z_im
    g_re, g_im = dtaps * c_re, -dtaps * c_im
    radial = lag * (g_re * z_re + g_im * z_im)
    angular = lag * (g_im * z_re - g_re * z_im)

    radial += lag * (into_re * z_re + into_im * z_im)
    angular += lag * (into_im * z_re - into_re * z_im)

    lag += 1
    p_re, p_im = _power(log_radius, turns, tl.full((H,), 1, tl.int32))
    z_re, z_im = z_re * p_re[None, :] - z_im * p_im[None, :], z_re * p_im[None, :] + z_im * p_re[None, :]
    dc_re += out_re * z_re + out_im * z_im
    dc_im += out_im * z_re - out_re * z_im
    g_re, g_im = out_re * c_re + out_im * c_im, out_im * c_re - out_re * c_im
    radial += lag * (g_re * z_re + g_im * z_im)
    angular += lag * (g_im * z_re - g_re * z_im)

    dc_re, dc_im, radial, angular = tl.sum(dc_re, 0), tl.sum(dc_im, 0), tl.sum(radial, 0), tl.sum(angular, 0)
    z_re, z_im = _power(log_radius, turns, tl.full((H,), C, tl.int32))
    radial += C * (turn_re * z_re + turn_im * z_im)
    angular += C * (turn_im * z_re - turn_re * z_im)

    # c = residue (1 - |p|), log|p| = -exp(-log_time)
    radial -= (dc_re * re + dc_im * im) * (1 - loss)
    at = g * M + m
    tl.store(dlog_time + at, (-log_radius * radial).to(dlog_time.dtype.element_ty), live)
    tl.store(dfrequency + at, angular.to(dfrequency.dtype.element_ty), live)
    tl.store(dresidue + at * 2, (dc_re * loss).to(dresidue.dtype.element_ty), live)
    tl.store(dresidue + at * 2 + 1, (dc_im * loss).to(dresidue.dtype.element_ty), live)
