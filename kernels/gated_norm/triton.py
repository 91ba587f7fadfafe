"""Triton kernels of norm and gate: one pass over o, v and the gate forward, one over them and dy backward.

For a token and a head of width V, with SiLU(z) = z s, s = 1 / (1 + exp(-z)):

    u = o + d v        r = (mean(u^2) + eps)^-1/2        n = u r w        y = n SiLU(z)
    dz = dy n (s + SiLU(z) (1 - s))
    p = dy SiLU(z) w        du = r (p - u r^2 mean(p u))        do = du        dv = d du
    dw = sum dy SiLU(z) u r        dd = sum du v        (over tokens; here one partial sum a program)
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def forward(
    o, v, skip, weight, gate, y, rows, stride_o, stride_v, stride_g, eps,
    V: tl.constexpr, H: tl.constexpr, SKIP: tl.constexpr, GATE: tl.constexpr,
    BR: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1)
    row = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    column = tl.arange(0, BV)
    there = (row < rows)[:, None] & (column < V)[None, :]
    at = h * V + column[None, :]
    u = tl.load(o + row[:, None] * stride_o + at, mask=there, other=0.0).to(tl.float32)
    if SKIP:
        d = tl.load(skip + h).to(tl.float32)
        u += d * tl.load(v + row[:, None] * stride_v + at, mask=there, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(u * u, axis=1) / V + eps)
    w = tl.load(weight + h * V + column, mask=column < V, other=0.0).to(tl.float32)
    out = u * r[:, None] * w[None, :]
    if GATE:
        z = tl.load(gate + row[:, None] * stride_g + at, mask=there, other=0.0).to(tl.float32)
        out *= z * tl.sigmoid(z)
    tl.store(y + row[:, None] * (H * V) + at, out, mask=there)


@triton.jit
def backward(
    dy, o, v, skip, weight, gate, y, activated, do, dv, dgate, dweight, dskip, rows, stride_dy, stride_o, stride_v,
    stride_g, stride_dg, eps, blocks, V: tl.constexpr, H: tl.constexpr, SKIP: tl.constexpr, DV: tl.constexpr,
    GATE: tl.constexpr, Y: tl.constexpr, SILU: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Program (i, h) walks `blocks` blocks of BR rows; dweight `[programs, H, V]` and dskip `[programs, H]` partial.

    Y: writes y once more. SILU: v comes before its SiLU, and v itself is written to `activated`."""
    h = tl.program_id(1)
    column = tl.arange(0, BV)
    at = h * V + column[None, :]
    w = tl.load(weight + h * V + column, mask=column < V, other=0.0).to(tl.float32)
    d = 0.0
    if SKIP:
        d = tl.load(skip + h).to(tl.float32)
    sum_w = tl.zeros([BR, BV], tl.float32)  # summed over its rows once, at the end: that takes all warps
    sum_d = tl.zeros([BR], tl.float32)
    for i in range(blocks):
        row = ((tl.program_id(0).to(tl.int64) * blocks + i) * BR + tl.arange(0, BR)).to(tl.int64)
        there = (row < rows)[:, None] & (column < V)[None, :]
        # All loads stand before the first store, which they may not pass.
        u = tl.load(o + row[:, None] * stride_o + at, mask=there, other=0.0).to(tl.float32)
        p = tl.load(dy + row[:, None] * stride_dy + at, mask=there, other=0.0).to(tl.float32)
        if GATE:
            z = tl.load(gate + row[:, None] * stride_g + at, mask=there, other=0.0).to(tl.float32)
        if SKIP:
            value = tl.load(v + row[:, None] * stride_v + at, mask=there, other=0.0).to(tl.float32)
            if SILU:
                rounded = (value * tl.sigmoid(value)).to(activated.dtype.element_ty)
                tl.store(activated + row[:, None] * (H * V) + at, rounded, mask=there)
                value = rounded.to(tl.float32)
            u += d * value
        r = tl.rsqrt(tl.sum(u * u, axis=1) / V + eps)[:, None]
        out = u * r * w[None, :]
        if GATE:
            s = tl.sigmoid(z)
            tl.store(dgate + row[:, None] * stride_dg + at, p * out * (s + z * s * (1 - s)), mask=there)
            p *= z * s
            out *= z * s
        if Y:
            tl.store(y + row[:, None] * (H * V) + at, out, mask=there)
        sum_w += p * u * r
        p *= w[None, :]
        du = r * (p - u * (r * r * (tl.sum(p * u, axis=1) / V)[:, None]))
        tl.store(do + row[:, None] * (H * V) + at, du, mask=there)
        if SKIP:
            if DV:
                tl.store(dv + row[:, None] * (H * V) + at, d * du, mask=there)
            sum_d += tl.sum(du * value, axis=1)
    tl.store(dweight + (tl.program_id(0) * H + h) * V + column, tl.sum(sum_w, axis=0), mask=column < V)
    if SKIP:
        tl.store(dskip + tl.program_id(0) * H + h, tl.sum(sum_d, axis=0))
