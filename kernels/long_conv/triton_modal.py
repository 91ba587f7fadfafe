"""Triton kernels of modal filters: an exact near part on tensor cores, and a far part carried as a state.

The formula is `reference.modal_scan`'s. Channels that share a filter, and several segments of the tokens, stand side by
side as the N columns of one product, so that one chunk of C tokens costs

    U^T [N, C] = X^T [N, C] near^T [C, C] + S^T [N, SP] out^T [SP, C]
    S^T       <- turn(S^T) + X^T into^T [C, SP]

A state's row holds the real parts of all modes, then the imaginary ones: S1 = (re, im). Beside it runs i S, that is
S2 = (-im, re), so that turning by p^C = a + i b needs no exchange of rows: S1 <- a S1 + b S2, S2 <- a S2 - b S1.
Columns come first in the products because an accumulator [N, ...] is a left operand of the next product as it lies.

Where rows are few, the tokens are cut into segments that run side by side: `modal_ends` finds the state each segment
adds, `modal_carry` strings them together. The backward pass runs the same scan against time over the adjoint states
L, L_n = turn^T L_(n+1) + out^T dU, reads the states that the forward pass left at each chunk, and gathers

    dnear = dU (scale X)^T     dout = dU (scale S)^T     dinto = (scale X) L^T     dturn = L . (scale S)

per program in a fixed order; `modal_gradient` sums them and takes them on to the poles and residues. Short taps run on
the ordinary cores: 8 rows one token apart are held at once, so that each input is read (7 + taps) / 8 times.
"""

# Triton unrolls loops over tuples that grow: joined with +, since it does not unpack them, and of no one type.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc, var-annotated"
import triton
import triton.language as tl

RUN = tl.constexpr(8)  # neighbouring tokens that a thread holds for the short taps


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
def modal_matrices(log_time, frequency, residue, taps, into, out, turn, M, size, C: tl.constexpr, SP: tl.constexpr):
    """Of one group: taps `[C]`; into, out `[2, C, SP]`, for S1 and for S2; turn `[2, 2, SP]`, by C and size tokens."""
    g = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, SP)
    r = tl.arange(0, C)
    log_radius, turns, live, re, im, loss = _modes(log_time, frequency, residue, g, s, M, SP)
    real = (s < SP // 2)[None, :]
    c_re, c_im = (re * loss)[None, :], (im * loss)[None, :]
    tile = g * (2 * C * SP) + r[:, None] * SP + s[None, :]

    z_re, z_im = _power(log_radius[None, :], turns[None, :], (C - 1 - r)[:, None])
    z_re, z_im = tl.where(live[None, :], z_re, 0.0), tl.where(live[None, :], z_im, 0.0)
    tl.store(into + tile, tl.where(real, z_re, z_im).to(into.dtype.element_ty))
    tl.store(into + tile + C * SP, tl.where(real, -z_im, z_re).to(into.dtype.element_ty))

    z_re, z_im = _power(log_radius[None, :], turns[None, :], (r + 1)[:, None])
    w_re, w_im = c_re * z_re - c_im * z_im, c_re * z_im + c_im * z_re
    tl.store(out + tile, tl.where(real, w_re, -w_im).to(out.dtype.element_ty))
    tl.store(out + tile + C * SP, tl.where(real, -w_im, -w_re).to(out.dtype.element_ty))

    z_re, z_im = _power(log_radius[None, :], turns[None, :], r[:, None])
    tl.store(taps + g * C + r, tl.sum(tl.where(real, c_re * z_re - c_im * z_im, 0.0), 1))

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
        before = tl.load(places + segments + segment, live, other=0)
        left = tl.load(places + 2 * segments + segment, live, other=0)
        slot = tl.load(places + 3 * segments + segment, live, other=0)
        row = begin * 0
    else:
        row = (segment // per_row).to(tl.int64)
        before = tl.where(live, (segment % per_row).to(tl.int64) * size, 0)  # a dead column has no token
        begin = before
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
def _sum_runs(x):
    """`[C, N]` summed over runs of RUN tokens: `[C / RUN, N]`."""
    return tl.sum(tl.reshape(x, (x.shape[0] // RUN, RUN, x.shape[1])), 1)


@triton.jit
def _near(taps, g, row, column, C: tl.constexpr):
    lag = row - column
    return tl.load(taps + g * C + lag, lag >= 0, other=0.0)


@triton.jit
def _silu_gradient(u):
    gate = 1 / (1 + tl.exp(-u))
    return gate * (1 + u * (1 - gate))


@triton.jit(do_not_specialize=["T", "segments", "per_row"])
def modal_ends(x, u, ends, into, turn, places, T, D, R, Q, segments, per_row, size, blocks, x_b, x_t, x_d, u_b, u_t,
               u_d, C: tl.constexpr, SP: tl.constexpr, CB: tl.constexpr, N: tl.constexpr, SILU: tl.constexpr,
               REVERSE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
               STAGES: tl.constexpr):  # fmt: skip
    """What each segment adds to the state, `[segments, Q, CB, SP]`; REVERSE: against time, of x = dy under SiLU'(u)."""
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
    u += row * u_b + begin * u_t + d * u_d
    chunks = (tl.minimum(tl.max(left), size) + C - 1).to(tl.int32) // C
    for c in tl.range(0, chunks, num_stages=STAGES):
        if REVERSE:
            c = chunks - 1 - c
        t = c * C + r
        held = t[:, None] < left[None, :]
        X = tl.load(x[None, :] + t.to(tl.int64)[:, None] * x_t, held, other=0.0)
        if SILU:
            U = tl.load(u[None, :] + t.to(tl.int64)[:, None] * u_t, held, other=0.0).to(tl.float32)
            X = X.to(tl.float32) * _silu_gradient(U)
        XT = tl.trans(X.to(dtype))
        A1, A2 = a * S1 + b * S2, a * S2 - b * S1
        S1 = tl.dot(XT, V1, A1, input_precision=PRECISION)
        S2 = tl.dot(XT, V2, A2, input_precision=PRECISION)
    tl.store(_state_at(ends, segment, q, Q, SP, CB, N, False), S1, (segment < segments)[:, None])


@triton.jit(do_not_specialize=["segments", "count"])
def modal_carry(ends, starts, turn, places, Q, segments, count, blocks, SP: tl.constexpr, CB: tl.constexpr,
                REVERSE: tl.constexpr, PACKED: tl.constexpr):  # fmt: skip
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
    for i in range(count):
        if REVERSE:
            i = count - 1 - i
        segment = first + i
        if PACKED:
            if REVERSE:  # nothing comes back from another sequence
                begins = tl.load(places + segments + segment + 1, segment + 1 < segments, other=0) == 0
            else:
                begins = tl.load(places + segments + segment) == 0
            S1, S2 = tl.where(begins, 0.0, S1), tl.where(begins, 0.0, S2)
        at = ((segment.to(tl.int64) * Q + q) * CB + n) * SP
        tl.store(starts + at + s[None, :], S1)
        E1 = tl.load(ends + at + s[None, :])
        E2 = tl.load(ends + at + ((s + SP // 2) % SP)[None, :])
        E2 *= sign
        S1, S2 = a * S1 + b * S2 + E1, a * S2 - b * S1 + E2


@triton.jit(do_not_specialize=["T", "segments", "per_row"])
def modal_forward(x, y, u, states, starts, taps, into, out, turn, short, scale, bias, places, T, D, R, Q, segments,
                  per_row, size, blocks, x_b, x_t, x_d, y_b, y_t, y_d,
                  C: tl.constexpr, SP: tl.constexpr, CB: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
                  SCALE: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, SAVE: tl.constexpr, CARRY: tl.constexpr,
                  PACKED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """y = SiLU(u) or u, u = bias + short * x + scale (modal * x). SAVE: also u (with SILU) and each chunk's state."""
    g, q, segment, d, live, row, begin, before, left, slot = _columns(
        places, T, D, R, Q, segments, per_row, size, blocks, C, CB, N, PACKED
    )
    r, s = tl.arange(0, C), tl.arange(0, SP)
    H: tl.constexpr = C // RUN
    dtype = into.dtype.element_ty
    tile = g * (2 * C * SP) + r[:, None] * SP + s[None, :]
    V1, V2 = tl.load(into + tile), tl.load(into + tile + C * SP)
    WT = tl.load(out + g * (2 * C * SP) + r[None, :] * SP + s[:, None])
    NT = _near(taps, g, r[None, :], r[:, None], C).to(dtype)
    a, b = tl.load(turn + g * (4 * SP) + s)[None, :], tl.load(turn + g * (4 * SP) + SP + s)[None, :]
    S1 = tl.zeros((N, SP), tl.float32)
    S2 = tl.zeros((N, SP), tl.float32)
    if CARRY:
        there = (segment < segments)[:, None]
        S1 = tl.load(_state_at(starts, segment, q, Q, SP, CB, N, False), there, other=0.0)
        S2 = tl.load(_state_at(starts, segment, q, Q, SP, CB, N, True), there, other=0.0)
        S2 *= tl.where(s < SP // 2, -1.0, 1.0)[None, :]
    x += row * x_b + begin * x_t + d * x_d
    y += row * y_b + begin * y_t + d * y_d
    u += row * y_b + begin * y_t + d * y_d
    factor = tl.full((N,), 1.0, tl.float32)
    if SCALE:
        factor = tl.load(scale + d, live, other=0.0).to(tl.float32)
    shift = tl.zeros((N,), tl.float32)
    if BIAS:
        shift = tl.load(bias + d, live, other=0.0).to(tl.float32)
    h = tl.arange(0, H) * RUN
    chunks = (tl.minimum(tl.max(left), size) + C - 1).to(tl.int32) // C
    for c in tl.range(0, chunks, num_stages=STAGES):
        t = c * C + r
        held = t[:, None] < left[None, :]
        XT = tl.trans(tl.load(x[None, :] + t.to(tl.int64)[:, None] * x_t, held, other=0.0))
        if SAVE:
            at = _state_at(states, slot + c, q, Q, SP, CB, N, False)
            tl.store(at, S1.to(dtype), (live & (c * C < left))[:, None])
        acc = tl.dot(XT, NT, input_precision=PRECISION)
        acc = tl.dot(S1.to(dtype), WT, acc, input_precision=PRECISION)
        A1, A2 = a * S1 + b * S2, a * S2 - b * S1
        S1 = tl.dot(XT, V1, A1, input_precision=PRECISION)
        S2 = tl.dot(XT, V2, A2, input_precision=PRECISION)
        total = tl.trans(acc) * factor[None, :] + shift[None, :]
        if K > 0:
            xs = ()
            for j in tl.static_range(RUN + K - 1):
                tt = c * C + h + (j - (K - 1))
                seen = (tt[:, None] + before[None, :] >= 0) & (tt[:, None] < left[None, :])
                xs = xs + (tl.load(x[None, :] + tt.to(tl.int64)[:, None] * x_t, seen, other=0.0).to(tl.float32),)
            sums = ()
            for j in tl.static_range(RUN):
                part = tl.zeros((H, N), tl.float32)
                for k in tl.static_range(K):
                    part += xs[j + K - 1 - k] * tl.load(short + d * K + k, live, other=0.0).to(tl.float32)[None, :]
                sums = sums + (part,)
            total += _join_run(sums)
        at = t.to(tl.int64)[:, None] * y_t
        if SILU:
            if SAVE:
                tl.store(u[None, :] + at, total.to(dtype), held)
            total = total / (1 + tl.exp(-total))
        tl.store(y[None, :] + at, total.to(dtype), held)


@triton.jit(do_not_specialize=["T", "segments", "per_row"])
def modal_backward(dy, x, u, states, starts, dx, taps, into, out, turn, short, scale, places, dnear, dinto, dout, dturn,
                   dchannel, T, D, R, Q, segments, per_row, size, blocks, g_b, g_t, g_d, x_b, x_t, x_d, u_b, u_t, u_d,
                   y_b, y_t, y_d,
                   C: tl.constexpr, SP: tl.constexpr, CB: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
                   SCALE: tl.constexpr, SILU: tl.constexpr, CARRY: tl.constexpr, PACKED: tl.constexpr,
                   PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """dx, and this program's share of dnear `[C, C]`, dinto and dout `[C, SP]`, dturn `[2, SP]`; per segment and
    channel, in dchannel, short taps `[segments, D, K]`, scale and bias `[segments, D]` one behind the other."""
    pid = tl.program_id(0).to(tl.int64)
    g, q, segment, d, live, row, begin, before, left, slot = _columns(
        places, T, D, R, Q, segments, per_row, size, blocks, C, CB, N, PACKED
    )
    r, s = tl.arange(0, C), tl.arange(0, SP)
    H: tl.constexpr = C // RUN
    AHEAD: tl.constexpr = K - 1 if K > 0 else 0
    dtype = into.dtype.element_ty
    tile = g * (2 * C * SP) + r[:, None] * SP + s[None, :]
    W1, W2 = tl.load(out + tile), tl.load(out + tile + C * SP)
    VT = tl.load(into + g * (2 * C * SP) + r[None, :] * SP + s[:, None])
    near = _near(taps, g, r[:, None], r[None, :], C).to(dtype)
    a, b = tl.load(turn + g * (4 * SP) + s)[None, :], tl.load(turn + g * (4 * SP) + SP + s)[None, :]
    there = (segment < segments)[:, None]
    L1 = tl.zeros((N, SP), tl.float32)
    L2 = tl.zeros((N, SP), tl.float32)
    if CARRY:
        L1 = tl.load(_state_at(starts, segment, q, Q, SP, CB, N, False), there, other=0.0)
        L2 = tl.load(_state_at(starts, segment, q, Q, SP, CB, N, True), there, other=0.0)
        L2 *= tl.where(s < SP // 2, 1.0, -1.0)[None, :]
    dy += row * g_b + begin * g_t + d * g_d
    x += row * x_b + begin * x_t + d * x_d
    u += row * u_b + begin * u_t + d * u_d
    dx += row * y_b + begin * y_t + d * y_d
    factor = tl.full((N,), 1.0, tl.float32)
    if SCALE:
        factor = tl.load(scale + d, live, other=0.0).to(tl.float32)
    h = tl.arange(0, H) * RUN
    chunks = (tl.minimum(tl.max(left), size) + C - 1).to(tl.int32) // C
    acc_near = tl.zeros((C, C), tl.float32)
    acc_into = tl.zeros((C, SP), tl.float32)
    acc_out = tl.zeros((C, SP), tl.float32)
    turn_re = tl.zeros((N, SP), tl.float32)
    turn_im = tl.zeros((N, SP), tl.float32)
    acc_scale = tl.zeros((H, N), tl.float32)
    acc_bias = tl.zeros((H, N), tl.float32)
    acc_short = ()
    for _ in tl.static_range(K):
        acc_short = acc_short + (tl.zeros((H, N), tl.float32),)
    for step in tl.range(0, chunks, num_stages=STAGES):
        c = chunks - 1 - step
        xs = ()
        for j in tl.static_range(RUN + AHEAD):
            tt = c * C + h + (j - AHEAD)
            seen = (tt[:, None] + before[None, :] >= 0) & (tt[:, None] < left[None, :])
            xs = xs + (tl.load(x[None, :] + tt.to(tl.int64)[:, None] * x_t, seen, other=0.0).to(tl.float32),)
        du = ()
        for j in tl.static_range(RUN + AHEAD):
            tt = c * C + h + j
            seen = tt[:, None] < left[None, :]
            grad = tl.load(dy[None, :] + tt.to(tl.int64)[:, None] * g_t, seen, other=0.0).to(tl.float32)
            if SILU:
                before_silu = tl.load(u[None, :] + tt.to(tl.int64)[:, None] * u_t, seen, other=0.0).to(tl.float32)
                grad = grad * _silu_gradient(before_silu)
            du = du + (grad,)
        sums = ()
        for j in tl.static_range(RUN):
            acc_bias += du[j]
            part = tl.zeros((H, N), tl.float32)
            for k in tl.static_range(K):
                part += du[j + k] * tl.load(short + d * K + k, live, other=0.0).to(tl.float32)[None, :]
            sums = sums + (part,)
        news = ()
        for k in tl.static_range(K):
            new = acc_short[k]
            for j in tl.static_range(RUN):
                new += du[j] * xs[j + AHEAD - k]
            news = news + (new,)
        acc_short = news
        wide = _join_run((xs[AHEAD], xs[AHEAD + 1], xs[AHEAD + 2], xs[AHEAD + 3], xs[AHEAD + 4], xs[AHEAD + 5],
                          xs[AHEAD + 6], xs[AHEAD + 7]))  # fmt: skip
        X = (wide * factor[None, :]).to(dtype)
        G = _join_run((du[0], du[1], du[2], du[3], du[4], du[5], du[6], du[7])).to(dtype)
        GT = tl.trans(G)
        back = tl.dot(GT, near, input_precision=PRECISION)
        L1_low = L1.to(dtype)
        back = tl.trans(tl.dot(L1_low, VT, back, input_precision=PRECISION))
        total = back * factor[None, :]
        if K > 0:
            total += _join_run(sums)
        t = c * C + r
        tl.store(dx[None, :] + t.to(tl.int64)[:, None] * y_t, total.to(dtype), t[:, None] < left[None, :])
        if SCALE:
            acc_scale += _sum_runs(wide * back)
        at = _state_at(states, slot + c, q, Q, SP, CB, N, False)
        S = tl.load(at, (live & (c * C < left))[:, None], other=0.0).to(tl.float32) * factor[:, None]
        acc_near = tl.dot(G, tl.trans(X), acc_near, input_precision=PRECISION)
        acc_out = tl.dot(G, S.to(dtype), acc_out, input_precision=PRECISION)
        acc_into = tl.dot(X, L1_low, acc_into, input_precision=PRECISION)
        turn_re += L1 * S
        turn_im += L2 * S
        A1, A2 = a * L1 + b * L2, a * L2 - b * L1
        L1 = tl.dot(GT, W1, A1, input_precision=PRECISION)
        L2 = tl.dot(GT, W2, A2, input_precision=PRECISION)
    tl.store(dnear + pid * (C * C) + r[:, None] * C + r[None, :], acc_near)
    tl.store(dinto + pid * (C * SP) + r[:, None] * SP + s[None, :], acc_into)
    tl.store(dout + pid * (C * SP) + r[:, None] * SP + s[None, :], acc_out)
    tl.store(dturn + pid * (2 * SP) + s, tl.sum(turn_re, 0))
    tl.store(dturn + pid * (2 * SP) + SP + s, tl.sum(turn_im, 0))
    at = dchannel + segment * D + d
    for k in tl.static_range(K):
        tl.store(dchannel + (segment * D + d) * K + k, tl.sum(acc_short[k], 0), live)
    tl.store(at + K * segments * D, tl.sum(acc_scale, 0), live)
    tl.store(at + (K + 1) * segments * D, tl.sum(acc_bias, 0), live)


@triton.jit(do_not_specialize=["M", "parts"])
def modal_gradient(dnear, dinto, dout, dturn, log_time, frequency, residue, dlog_time, dfrequency, dresidue, M, Q,
                   parts, blocks, C: tl.constexpr, SP: tl.constexpr):  # fmt: skip
    """Sums a group's shares and takes them on to its poles and residues.

    Every entry is a real function of z = p^lag: with G = dL/dRe z + i dL/dIm z, what it gives log|p| is
    lag Re(conj(G) z), and what it gives the angle is lag Re(conj(G) i z)."""
    g = tl.program_id(0)
    r = tl.arange(0, C)
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
    for i in range(parts * blocks):
        pid = ((i // blocks) * Q + g * blocks + i % blocks).to(tl.int64)
        N += tl.load(dnear + pid * (C * C) + r[:, None] * C + r[None, :])
        into_re += tl.load(dinto + pid * (C * SP) + half)
        into_im += tl.load(dinto + pid * (C * SP) + half + H)
        out_re += tl.load(dout + pid * (C * SP) + half)
        out_im -= tl.load(dout + pid * (C * SP) + half + H)
        turn_re += tl.load(dturn + pid * (2 * SP) + m) + tl.load(dturn + pid * (2 * SP) + H + m)
        turn_im += tl.load(dturn + pid * (2 * SP) + SP + m) + tl.load(dturn + pid * (2 * SP) + SP + H + m)
    rotated = tl.gather(N, (r[:, None] - r[None, :] + C) % C, 1)
    dtaps = tl.sum(tl.where(r[:, None] >= r[None, :], rotated, 0.0), 0)[:, None]
    log_radius, turns, live, re, im, loss = _modes(log_time, frequency, residue, g, m, M, SP)
    c_re, c_im = (re * loss)[None, :], (im * loss)[None, :]

    lag = r[:, None]
    z_re, z_im = _power(log_radius[None, :], turns[None, :], lag)
    dc_re, dc_im = tl.sum(dtaps * z_re, 0), -tl.sum(dtaps * z_im, 0)
    g_re, g_im = dtaps * c_re, -dtaps * c_im
    radial = tl.sum(lag * (g_re * z_re + g_im * z_im), 0)
    angular = tl.sum(lag * (g_im * z_re - g_re * z_im), 0)

    lag = C - 1 - lag
    z_re, z_im = _power(log_radius[None, :], turns[None, :], lag)
    radial += tl.sum(lag * (into_re * z_re + into_im * z_im), 0)
    angular += tl.sum(lag * (into_im * z_re - into_re * z_im), 0)

    lag = r[:, None] + 1
    z_re, z_im = _power(log_radius[None, :], turns[None, :], lag)
    dc_re += tl.sum(out_re * z_re + out_im * z_im, 0)
    dc_im += tl.sum(out_im * z_re - out_re * z_im, 0)
    g_re, g_im = out_re * c_re + out_im * c_im, out_im * c_re - out_re * c_im
    radial += tl.sum(lag * (g_re * z_re + g_im * z_im), 0)
    angular += tl.sum(lag * (g_im * z_re - g_re * z_im), 0)

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
