"""Triton kernels of a residual sum and its layer or RMS norm: one pass each way.

    s = x + b        n = (s - mean(s)) rstd(s)        y = w n + c

    g = w dy         dx = ds + rstd (g - mean(g) - n mean(n g))        dw = sum dy n        dc = sum dy

The RMS norm leaves out both means of s and g (arXiv:1910.07467) and c. A program takes whole rows of D numbers;
backward it takes every so many blocks of rows, and leaves one partial sum of dw and dc, so that results do not depend
on the order in which programs end.
"""

import triton
import triton.language as tl


@triton.jit
def forward(x, branch, weight, bias, total, y, statistics, rows, D, eps,
            BRANCH: tl.constexpr, RMS: tl.constexpr, SAVE: tl.constexpr,
            BR: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """statistics `[2, rows]`: rstd and, but for RMS, mean."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    d = tl.arange(0, BD)
    at = row[:, None] * D + d[None, :]
    live = (row < rows)[:, None] & (d < D)[None, :]
    s = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
    if BRANCH:
        s += tl.load(branch + at, mask=live, other=0.0).to(tl.float32)
        tl.store(total + at, s, mask=live)
        s = s.to(total.dtype.element_ty).to(tl.float32)  # the norm is of what is stored, as torch's would be
    if not RMS:
        mean = tl.sum(s, 1) / D
        s = tl.where(live, s - mean[:, None], 0.0)
        if SAVE:
            tl.store(statistics + rows + row, mean, mask=row < rows)
    rstd = 1 / tl.sqrt(tl.sum(s * s, 1) / D + eps)
    w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    out = s * rstd[:, None] * w[None, :]
    if not RMS:
        out += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, out, mask=live)
    if SAVE:
        tl.store(statistics + row, rstd, mask=row < rows)


@triton.jit
def backward(total, statistics, weight, dtotal, dy, dx, dbranch, sums, rows, D,
             TOTAL: tl.constexpr, BRANCH: tl.constexpr, RMS: tl.constexpr,
             BR: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """TOTAL: whether the sum itself has a gradient. BRANCH: write dx in the branch's dtype too. sums: of dw and, but
    for RMS, dc, `[programs, 2 or 1, D]`."""
    d = tl.arange(0, BD)
    w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    dw = tl.zeros((BR, BD), tl.float32)
    dc = tl.zeros((BR, BD), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, BR), tl.num_programs(0)):
        row = tl.cast(block, tl.int64) * BR + tl.arange(0, BR)
        at = row[:, None] * D + d[None, :]
        live = (row < rows)[:, None] & (d < D)[None, :]
        rstd = tl.load(statistics + row, mask=row < rows, other=0.0)
        s = tl.load(total + at, mask=live, other=0.0).to(tl.float32)
        given = tl.load(dy + at, mask=live, other=0.0).to(tl.float32)
        found = tl.zeros((BR, BD), tl.float32)
        if TOTAL:  # before the sums over rows: a load behind them would wait alone
            found = tl.load(dtotal + at, mask=live, other=0.0).to(tl.float32)
        if not RMS:
            mean = tl.load(statistics + rows + row, mask=row < rows, other=0.0)
            s = tl.where(live, s - mean[:, None], 0.0)
            dc += given
        n = s * rstd[:, None]
        dw += given * n
        g = given * w[None, :]
        inner = g - n * (tl.sum(g * n, 1) / D)[:, None]
        if not RMS:
            inner -= (tl.sum(g, 1) / D)[:, None]
        found += rstd[:, None] * inner
        tl.store(dx + at, found, mask=live)
        if BRANCH:
            tl.store(dbranch + at, found, mask=live)
    parts: tl.constexpr = 1 if RMS else 2
    tl.store(sums + tl.program_id(0) * parts * D + d, tl.sum(dw, 0), mask=d < D)
    if not RMS:
        tl.store(sums + tl.program_id(0) * 2 * D + D + d, tl.sum(dc, 0), mask=d < D)
