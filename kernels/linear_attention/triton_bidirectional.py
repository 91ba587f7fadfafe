"""Triton kernels of bidirectional linear attention: o_t = scale * q_t S with one state S = S_0 + sum_s k_s^T v_s.

Two passes: the state from k and v, then q through it. Where sequences are many, one program does both for its
sequence and head (`forward`, `backward`); else segments `gather` their parts of the state, `scan` adds them, and
`read_forward` and `read_backward` read the sum.

    dq_t = scale * dO_t S^T      R = sum_t q_t^T dO_t + dS / scale      dk_s = scale * v_s R^T      dv_s = scale * k_s R

Masked tokens stand in no sum, and get no dk and dv.
"""

import triton
import triton.language as tl

from .triton import _add, _read, _segment, _tiles


@triton.jit
def _kept(x, mask, t0, n, BT: tl.constexpr):
    """The rows of x whose mask is set, the others 0."""
    t = t0 + tl.arange(0, BT)
    return tl.where((tl.load(mask + t, t < n, other=0) != 0)[:, None], x, 0.0).to(x.dtype)


@triton.jit
def _sum(S, a, b, a_stride, b_stride, mask, n, W: tl.constexpr, X: tl.constexpr, BW: tl.constexpr, BX: tl.constexpr,
         BT: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """S + sum_t a_t^T b_t over n tokens."""
    a_tiles = _tiles(a, n, a_stride, W, BT, BW)
    b_tiles = _tiles(b, n, b_stride, X, BT, BX)
    for t0 in tl.range(0, n, BT, num_stages=STAGES):
        a_t = a_tiles.load([t0, 0])
        if MASK:
            a_t = _kept(a_t, mask, t0, n, BT)
        S = _add(S, a_t, b_tiles.load([t0, 0]), 1.0, 1.0, 0, PRECISION)
    return S


@triton.jit
def _load_state(S, W: tl.constexpr, X: tl.constexpr, BW: tl.constexpr, BX: tl.constexpr):
    w, x = tl.arange(0, BW)[:, None], tl.arange(0, BX)[None, :]
    return tl.load(S + w * X + x, (w < W) & (x < X), other=0.0)


@triton.jit
def _store_state(pointer, S, W: tl.constexpr, X: tl.constexpr, BW: tl.constexpr, BX: tl.constexpr):
    w, x = tl.arange(0, BW)[:, None], tl.arange(0, BX)[None, :]
    tl.store(pointer + w * X + x, S, (w < W) & (x < X))


@triton.jit
def _gradients(q, k, v, do, dq, dk, dv, q_t, k_t, v_t, do_t, dq_t, dv_t, S, R, mask, n, scale,
               K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
               MASK: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """dq, dk and dv of n tokens, given S and R."""
    k_tiles = _tiles(k, n, k_t, K, BT, BK)
    v_tiles = _tiles(v, n, v_t, V, BT, BV)
    do_tiles = _tiles(do, n, do_t, V, BT, BV)
    dq_tiles = _tiles(dq, n, dq_t, K, BT, BK)
    dk_tiles = _tiles(dk, n, dq_t, K, BT, BK)
    dv_tiles = _tiles(dv, n, dv_t, V, BT, BV)
    for t0 in tl.range(0, n, BT, num_stages=STAGES):
        dq_tile = _read(do_tiles.load([t0, 0]), tl.trans(S), PRECISION) * scale
        dq_tiles.store([t0, 0], dq_tile.to(dq.dtype.element_ty))
        dk_tile = _read(v_tiles.load([t0, 0]), tl.trans(R), PRECISION) * scale
        dv_tile = _read(k_tiles.load([t0, 0]), R, PRECISION) * scale
        if MASK:
            dk_tile = _kept(dk_tile, mask, t0, n, BT)
            dv_tile = _kept(dv_tile, mask, t0, n, BT)
        dk_tiles.store([t0, 0], dk_tile.to(dk.dtype.element_ty))
        dv_tiles.store([t0, 0], dv_tile.to(dv.dtype.element_ty))


@triton.jit
def _outputs(q, o, q_t, o_t, S, n, scale, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
             BT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """o of n tokens, given S."""
    q_tiles = _tiles(q, n, q_t, K, BT, BK)
    o_tiles = _tiles(o, n, o_t, V, BT, BV)
    for t0 in tl.range(0, n, BT, num_stages=STAGES):
        o_tiles.store([t0, 0], (_read(q_tiles.load([t0, 0]), S, PRECISION) * scale).to(o.dtype.element_ty))


@triton.jit
def forward(q, k, v, o, state, initial, mask, cuts, scale, T, H, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
            K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
            INITIAL: tl.constexpr, END: tl.constexpr, MASK: tl.constexpr, VARLEN: tl.constexpr,
            PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Both passes of a whole sequence and head in one program. END: S goes to `state`."""
    pid = tl.program_id(0)
    p, h = pid // H, (pid % H).to(tl.int64)
    row, start, n = _segment(p, cuts, T, T, 1, VARLEN, False)
    at = (p.to(tl.int64) * H + h) * (K * V)
    S = _load_state(initial + at, K, V, BK, BV) if INITIAL else tl.zeros((BK, BV), tl.float32)
    S = _sum(S, k + row * k_b + start * k_t + h * k_h, v + row * v_b + start * v_t + h * v_h, k_t, v_t,
             mask + row * T + start, n, K, V, BK, BV, BT, MASK, PRECISION, STAGES)  # fmt: skip
    if END:
        _store_state(state + at, S, K, V, BK, BV)
    _outputs(q + row * q_b + start * q_t + h * q_h, o + ((row * T + start) * H + h) * V, q_t, H * V, S, n, scale,
             K, V, BK, BV, BT, PRECISION, STAGES)  # fmt: skip


@triton.jit
def backward(q, k, v, do, dq, dk, dv, state, dstate, dinitial, mask, cuts, scale, T, H,
             q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h,
             K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
             DSTATE: tl.constexpr, END: tl.constexpr, MASK: tl.constexpr, VARLEN: tl.constexpr,
             PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Both passes of a whole sequence and head in one program; S comes from `state`. END: dS_0 goes to `dinitial`."""
    pid = tl.program_id(0)
    p, h = pid // H, (pid % H).to(tl.int64)
    row, start, n = _segment(p, cuts, T, T, 1, VARLEN, False)
    at = (p.to(tl.int64) * H + h) * (K * V)
    q += row * q_b + start * q_t + h * q_h
    do += row * do_b + start * do_t + h * do_h
    R = _load_state(dstate + at, K, V, BK, BV) / scale if DSTATE else tl.zeros((BK, BV), tl.float32)
    R = _sum(R, q, do, q_t, do_t, mask, n, K, V, BK, BV, BT, False, PRECISION, STAGES)
    if END:
        _store_state(dinitial + at, R * scale, K, V, BK, BV)
    S = _load_state(state + at, K, V, BK, BV)
    token = (row * T + start) * H + h
    _gradients(q, k + row * k_b + start * k_t + h * k_h, v + row * v_b + start * v_t + h * v_h, do,
               dq + token * K, dk + token * K, dv + token * V, q_t, k_t, v_t, do_t, H * K, H * V, S, R,
               mask + row * T + start, n, scale, K, V, BK, BV, BT, MASK, PRECISION, STAGES)  # fmt: skip


@triton.jit
def _through(a, out, S, S_w, S_x, x0, a_stride, out_stride, mask, n, scale, W: tl.constexpr, X: tl.constexpr,
             BW: tl.constexpr, BX: tl.constexpr, BT: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
             STAGES: tl.constexpr):  # fmt: skip
    """out_t = scale * a_t S for n tokens and columns x0 to x0 + BX of S, which stands at `S[w * S_w + x * S_x]`."""
    a_tiles = _tiles(a, n, a_stride, W, BT, BW)
    out_tiles = _tiles(out, n, out_stride, X, BT, BX)
    w, x = tl.arange(0, BW)[:, None], x0 + tl.arange(0, BX)[None, :]
    S = tl.load(S + w * S_w + x * S_x, (w < W) & (x < X), other=0.0)
    for t0 in tl.range(0, n, BT, num_stages=STAGES):
        tile = _read(a_tiles.load([t0, 0]), S, PRECISION) * scale
        if MASK:
            tile = _kept(tile, mask, t0, n, BT)
        out_tiles.store([t0, x0], tile.to(out.dtype.element_ty))


@triton.jit
def read_forward(q, o, state, cuts, owner, scale, T, H, SEG, SEGMENTS, q_b, q_t, q_h,
                 K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BX: tl.constexpr, BT: tl.constexpr,
                 VARLEN: tl.constexpr, TABLE: tl.constexpr, PRECISION: tl.constexpr,
                 STAGES: tl.constexpr):  # fmt: skip
    """The second pass over long sequences: o of one segment and head, BX columns."""
    columns: tl.constexpr = (V + BX - 1) // BX
    pid = tl.program_id(0)
    x0, h, p = (pid % columns) * BX, (pid // columns % H).to(tl.int64), pid // columns // H
    row, start, n = _segment(p, cuts, T, SEG, SEGMENTS, VARLEN, TABLE)
    sequence = tl.load(owner + p) if TABLE else (p if VARLEN else p // SEGMENTS)
    _through(q + row * q_b + start * q_t + h * q_h, o + ((row * T + start) * H + h) * V,
             state + (sequence.to(tl.int64) * H + h) * (K * V), V, 1, x0, q_t, H * V, q, n, scale,
             K, V, BK, BX, BT, False, PRECISION, STAGES)  # fmt: skip


@triton.jit
def read_backward(k, v, do, dq, dk, dv, state, R, mask, cuts, owner, scale, T, H, SEG, SEGMENTS,
                  k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h,
                  K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, XK: tl.constexpr,
                  XV: tl.constexpr, BT: tl.constexpr, MASK: tl.constexpr, VARLEN: tl.constexpr, TABLE: tl.constexpr,
                  PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """The second pass over long sequences: dq, dk or dv of one segment and head, one block of columns."""
    k_columns: tl.constexpr = (K + XK - 1) // XK
    v_columns: tl.constexpr = (V + XV - 1) // XV
    roles: tl.constexpr = 2 * k_columns + v_columns
    pid = tl.program_id(0)
    role, h, p = pid % roles, (pid // roles % H).to(tl.int64), pid // roles // H
    row, start, n = _segment(p, cuts, T, SEG, SEGMENTS, VARLEN, TABLE)
    sequence = tl.load(owner + p) if TABLE else (p if VARLEN else p // SEGMENTS)
    at = (sequence.to(tl.int64) * H + h) * (K * V)
    token = (row * T + start) * H + h
    k += row * k_b + start * k_t + h * k_h
    v += row * v_b + start * v_t + h * v_h
    do += row * do_b + start * do_t + h * do_h
    mask += row * T + start
    if role < k_columns:
        _through(do, dq + token * K, state + at, 1, V, role * XK, do_t, H * K, mask, n, scale,
                 V, K, BV, XK, BT, False, PRECISION, STAGES)  # fmt: skip
    elif role < 2 * k_columns:
        _through(v, dk + token * K, R + at, 1, V, (role - k_columns) * XK, v_t, H * K, mask, n, scale,
                 V, K, BV, XK, BT, MASK, PRECISION, STAGES)  # fmt: skip
    else:
        _through(k, dv + token * V, R + at, V, 1, (role - 2 * k_columns) * XV, k_t, H * V, mask, n, scale,
                 K, V, BK, XV, BT, MASK, PRECISION, STAGES)  # fmt: skip
