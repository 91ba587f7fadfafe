"""One token of a short-long convolution whose long kernel is a list of taps, as one launch.

y = bias + sum_{lag < K} short[d, lag] x[p - lag] + scale far
far = ahead[p] + sum_{lag <= p mod BLOCK} long[g, lag] x[p - lag]
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def step(
    x, inputs, ahead, position, short, long, scale, bias, y, channels, long_taps,
    stride_x, stride_i, stride_a, stride_l,
    TAPS: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr, SILU: tl.constexpr, GROUP: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """Program (row, block of BD channels). inputs and ahead `[B, capacity, D]`, short `[D, TAPS]`, long `[groups,
    long_taps]`; x is written to its place in inputs."""
    row = tl.program_id(0).to(tl.int64)
    p = tl.load(position + row)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    there = d < channels
    now = tl.load(x + row * stride_x + d, mask=there, other=0.0)
    factor = tl.load(scale + d, mask=there, other=0.0).to(tl.float32)
    lag = tl.arange(0, WINDOW)
    near = (lag < TAPS)[:, None] & there[None, :]
    far = ((lag <= p % BLOCK) & (lag < long_taps))[:, None] & there[None, :]
    taps = tl.load(short + d[None, :] * TAPS + lag[:, None], mask=near, other=0.0).to(tl.float32)
    taps += factor[None, :] * tl.load(long + (d // GROUP)[None, :] * stride_l + lag[:, None], mask=far, other=0.0).to(
        tl.float32
    )
    # The newest input comes from x: its place in `inputs` is written below, by other threads.
    past = (near | far) & ((lag > 0) & (lag <= p))[:, None]
    seen = tl.load(inputs + row * stride_i + (p - lag)[:, None] * channels + d[None, :], mask=past, other=0.0)
    seen = tl.where((lag == 0)[:, None], now[None, :], seen)
    before = tl.load(ahead + row * stride_a + p * channels + d, mask=there, other=0.0).to(tl.float32)
    total = tl.load(bias + d, mask=there, other=0.0).to(tl.float32) + factor * before
    total += tl.sum(taps * seen.to(tl.float32), axis=0)
    tl.store(inputs + row * stride_i + p * channels + d, now, mask=there)
    if SILU:
        total = total * tl.sigmoid(total)
    tl.store(y + row * channels + d, total, mask=there)
