"""Triton kernels of bidirectional linear attention: o_t = scale * q_t S with one state S = S_0 + sum_s k_s^T v_s.

Two passes: the state from k and v, then q through it. Where sequences are many, one program does both for its
sequence and head (`fused_*`); else segments gather their parts of the state, `scan` adds them, and `read_*` reads it.

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
def forward(q, k, v, o, state, initial, mask, cuts, owner, scale, T, H, SEG, SEGMENTS,
            q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
            K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
            FUSED: tl.constexpr, INITIAL: tl.constexpr, END: tl.constexpr, MASK: tl.constexpr, VARLEN: tl.constexpr,
            TABLE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """FUSED: a program is (sequence, head) and does both passes. Else it is (segment, head) and reads `state`."""
    pid = tl.program_id(0)
    p, h = pid // H, (pid % H).to(tl.int64)
    row, start, n = _segment(p, cuts, T, SEG, SEGMENTS, VARLEN, TABLE)
    sequence = tl.load(owner + p) if TABLE else (p if FUSED or VARLEN else p // SEGMENTS)
    at = (sequence.to(tl.int64) * H + h) * (K * V)
    if FUSED:
        S = _load_state(initial + at, K, V, BK, BV) if INITIAL else tl.zeros((BK, BV), tl.float32)
        S = _sum(S, k + row * k_b + start * k_t + h * k_h, v + row * v_b + start * v_t + h * v_h, k_t, v_t,
                 mask + row * T + start, n, K, V, BK, BV, BT, MASK, PRECISION, STAGES)  # fmt: skip
        if END:
            _store_state(state + at, S, K, V, BK, BV)
    else:
        S = _load_state(state + at, K, V, BK, BV)
    _outputs(q + row * q_b + start * q_t + h * q_h, o + ((row * T + start) * H + h) * V, q_t, H * V, S, n, scale,
             K, V, BK, BV, BT, PRECISION, STAGES)  # fmt: skip


@triton.jit
def backward(q, k, v, do, dq, dk, dv, state, dstate, dinitial, mask, cuts, owner, scale, T, H, SEG, SEGMENTS,
             q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h,
             K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
             FUSED: tl.constexpr, DSTATE: tl.constexpr, END: tl.constexpr, MASK: tl.constexpr, VARLEN: tl.constexpr,
             TABLE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """FUSED: a program is (sequence, head), sums R (from dS where DSTATE) and writes scale * R where END.

    Else it is (segment, head) and finds R in `dstate`."""
    pid = tl.program_id(0)
    p, h = pid // H, (pid % H).to(tl.int64)
    row, start, n = _segment(p, cuts, T, SEG, SEGMENTS, VARLEN, TABLE)
    sequence = tl.load(owner + p) if TABLE else (p if FUSED or VARLEN else p // SEGMENTS)
    at = (sequence.to(tl.int64) * H + h) * (K * V)
    q += row * q_b + start * q_t + h * q_h
    do += row * do_b + start * do_t + h * do_h
    mask += row * T + start
    if FUSED:
        R = _load_state(dstate + at, K, V, BK, BV) / scale if DSTATE else tl.zeros((BK, BV), tl.float32)
        R = _sum(R, q, do, q_t, do_t, mask, n, K, V, BK, BV, BT, False, PRECISION, STAGES)
        if END:
            _store_state(dinitial + at, R * scale, K, V, BK, BV)
    else:
        R = _load_state(dstate + at, K, V, BK, BV)
    S = _load_state(state + at, K, V, BK, BV)
    token = (row * T + start) * H + h
    _gradients(q, k + row * k_b + start * k_t + h * k_h, v + row * v_b + start * v_t + h * v_h, do,
               dq + token * K, dk + token * K, dv + token * V, q_t, k_t, v_t, do_t, H * K, H * V, S, R, mask, n, scale,
               K, V, BK, BV, BT, MASK, PRECISION, STAGES)  # fmt: skip
