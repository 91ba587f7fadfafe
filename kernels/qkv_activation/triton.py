"""Triton kernels around the projections of a gated linear attention: one pass forward, one backward.

    q = SiLU(q')    k = SiLU(k')    v = SiLU(v')    log_decay = -softplus(t' + b)
    dq' = dq SiLU'(q')    dk' = dk SiLU'(k')    dv' = (dv + d do) SiLU'(v')    dt' = -dlog_decay sigmoid(t' + b)

with SiLU'(x) = s + x s (1 - s), s = sigmoid(x), and d the skip of each head: what follows the attention adds d v to its
output, so that do is that sum's gradient too. A program takes BR rows and a block of columns of one of q, k, v or t.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _silu_block(source, target, row, column, rows, stride_source, stride_target, width):
    there = (row < rows)[:, None] & (column < width)[None, :]
    x = tl.load(source + row[:, None] * stride_source + column[None, :], mask=there, other=0.0).to(tl.float32)
    tl.store(target + row[:, None] * stride_target + column[None, :], x * tl.sigmoid(x), mask=there)


@triton.jit
def activate(
    from_z, from_x, bias, qk, v, log_decay, rows, stride_z, stride_x, stride_qk,
    QK: tl.constexpr, VALUES: tl.constexpr, H: tl.constexpr, DECAY: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """QK: columns of q and k together. v is dense, log_decay `[rows, H]` too."""
    qk_blocks: tl.constexpr = (QK + BC - 1) // BC
    v_blocks: tl.constexpr = (VALUES + BC - 1) // BC
    block = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    if block < qk_blocks:
        _silu_block(from_z, qk, row, block * BC + tl.arange(0, BC), rows, stride_z, stride_qk, QK)
    elif block < qk_blocks + v_blocks:
        column = (block - qk_blocks) * BC + tl.arange(0, BC)
        _silu_block(from_x, v, row, column, rows, stride_x, VALUES, VALUES)
    elif DECAY:
        head = tl.arange(0, BH)
        there = (row < rows)[:, None] & (head < H)[None, :]
        t = tl.load(from_x + row[:, None] * stride_x + VALUES + head[None, :], mask=there, other=0.0).to(tl.float32)
        t += tl.load(bias + head, mask=head < H, other=0.0).to(tl.float32)[None, :]
        softplus = tl.maximum(t, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(t)))
        tl.store(log_decay + row[:, None] * H + head[None, :], -softplus, mask=there)


@triton.jit
def _slope(x):
    s = tl.sigmoid(x)
    return s + x * s * (1 - s)


@triton.jit
def _silu_gradient(g, source, target, row, column, there, stride_source, stride_target):
    x = tl.load(source + row[:, None] * stride_source + column[None, :], mask=there, other=0.0).to(tl.float32)
    tl.store(target + row[:, None] * stride_target + column[None, :], g * _slope(x), mask=there)


@triton.jit
def gradient(
    dq, dk, dv, do, dlog_decay, from_z, from_x, bias, skip, dfrom_z, dfrom_x, dbias, rows, stride_z, stride_x,
    stride_dz, stride_dx,
    KEYS: tl.constexpr, VALUES: tl.constexpr, V: tl.constexpr, H: tl.constexpr, PAD: tl.constexpr,
    DECAY: tl.constexpr, SKIP: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """KEYS, VALUES: columns of q (or k) and of v; dq, dk, dv, do and dlog_decay are dense. PAD: columns behind v in
    dfrom_x, of which H are the decay's and the rest become 0. dbias: `[programs along the rows, H]`, partial sums."""
    k_blocks: tl.constexpr = (KEYS + BC - 1) // BC
    v_blocks: tl.constexpr = (VALUES + BC - 1) // BC
    block = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    if block < 2 * k_blocks:
        is_k = block >= k_blocks
        key = (block % k_blocks) * BC + tl.arange(0, BC)
        inside = (row < rows)[:, None] & (key < KEYS)[None, :]
        dkey = tl.load((dk if is_k else dq) + row[:, None] * KEYS + key[None, :], mask=inside, other=0.0)
        place = key + (KEYS if is_k else 0)
        _silu_gradient(dkey.to(tl.float32), from_z, dfrom_z, row, place, inside, stride_z, stride_dz)
    elif block < 2 * k_blocks + v_blocks:
        column = (block - 2 * k_blocks) * BC + tl.arange(0, BC)
        there = (row < rows)[:, None] & (column < VALUES)[None, :]
        at = row[:, None] * VALUES + column[None, :]
        dvalue = tl.load(dv + at, mask=there, other=0.0).to(tl.float32)
        if SKIP:
            d = tl.load(skip + column // V, mask=column < VALUES, other=0.0).to(tl.float32)
            dvalue += d[None, :] * tl.load(do + at, mask=there, other=0.0).to(tl.float32)
        _silu_gradient(dvalue, from_x, dfrom_x, row, column, there, stride_x, stride_dx)
    elif DECAY:
        head = tl.arange(0, BH)
        live = (row < rows)[:, None] & (head < H)[None, :]
        t = tl.load(from_x + row[:, None] * stride_x + VALUES + head[None, :], mask=live, other=0.0).to(tl.float32)
        t += tl.load(bias + head, mask=head < H, other=0.0).to(tl.float32)[None, :]
        ddecay = tl.load(dlog_decay + row[:, None] * H + head[None, :], mask=live, other=0.0).to(tl.float32)
        dt = tl.where(live, -ddecay * tl.sigmoid(t), 0.0)
        behind = dfrom_x + row[:, None] * stride_dx + VALUES + head[None, :]
        tl.store(behind, dt, mask=(row < rows)[:, None] & (head < PAD)[None, :])
        tl.store(dbias + tl.program_id(0) * H + head, tl.sum(dt, axis=0), mask=head < H)
