"""Triton kernel of the gradient of GELU (arXiv:1606.08415), exact.

    a = h Phi(h)        dh = da (Phi(h) + h phi(h))        db = sum dh

with the normal distribution Phi and its density phi. A program leaves the sum of its rows of dh, so that the bias costs
no pass of its own and sums stay in a fixed order.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["per_program"])
def gradient(h, da, dh, sums, rows, per_program, M, BR: tl.constexpr, BC: tl.constexpr):
    """h, da, dh `[rows, M]`, dh may be da; sums `[programs, M]`. Program: `per_program` rows of BC columns."""
    m = tl.program_id(1) * BC + tl.arange(0, BC)
    start = tl.program_id(0) * per_program
    total = tl.zeros((BR, BC), tl.float32)
    for first in range(start, tl.minimum(start + per_program, rows), BR):
        row = first + tl.arange(0, BR)
        live = (row < tl.minimum(start + per_program, rows))[:, None] & (m < M)[None, :]
        at = row.to(tl.int64)[:, None] * M + m[None, :]
        x = tl.load(h + at, mask=live, other=0.0).to(tl.float32)
        given = tl.load(da + at, mask=live, other=0.0).to(tl.float32)
        below = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        found = given * (below + x * 0.3989422804014327 * tl.exp(-0.5 * x * x))
        tl.store(dh + at, found, mask=live)
        total += found
    tl.store(sums + tl.program_id(0) * M + m, tl.sum(total, 0), mask=m < M)
