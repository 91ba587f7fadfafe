"""One token of a short-long convolution with a modal long kernel, as one launch.

For a channel d of group r, with modes p_m = exp(-exp(-log_time)) (cos f, sin f) and residues c_m:

    state_m = p_m state_m + x
    y = bias + sum_lag short[lag] x[lag] + long_scale Re sum_m c_m (1 - |p_m|) state_m
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def step(
    x, history, state, short, bias, long_scale, log_time, frequency, residue, y, channels, stride_x,
    TAPS: tl.constexpr, SILU: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Program (row, block of BD channels). history `[B, TAPS - 1, D]`, its last row the newest, and states
    `[B, D, M, 2]` are overwritten: each element is read and written by one program alone."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    there = d < channels
    now = tl.load(x + row * stride_x + d, mask=there, other=0.0)
    total = tl.load(bias + d, mask=there, other=0.0).to(tl.float32)
    past = history + row * (TAPS - 1) * channels + d
    # From the oldest input on: the place that an input moves to held the one before it, which has been read.
    for i in tl.static_range(TAPS):
        value = now
        if i < TAPS - 1:
            value = tl.load(past + i * channels, mask=there, other=0.0)
        tap = tl.load(short + d * TAPS + (TAPS - 1 - i), mask=there, other=0.0).to(tl.float32)
        total += tap * value.to(tl.float32)
        if i > 0:
            tl.store(past + (i - 1) * channels, value, mask=there)
    m = tl.arange(0, BM)
    mode = (d // GROUP)[:, None] * M + m[None, :]
    live = there[:, None] & (m < M)[None, :]
    log_radius = -tl.exp(-tl.load(log_time + mode, mask=live, other=0.0).to(tl.float32))
    angle = tl.load(frequency + mode, mask=live, other=0.0).to(tl.float32)
    radius = tl.exp(log_radius)
    # 1 - |p| without cancellation where |p| is close to 1.
    gap = tl.where(log_radius > -0.03, -log_radius * (1 + log_radius * (0.5 + log_radius / 6)), 1 - radius)
    re, im = radius * tl.cos(angle), radius * tl.sin(angle)
    at = ((row * channels + d[:, None]) * M + m[None, :]) * 2
    s_re, s_im = tl.load(state + at, mask=live, other=0.0), tl.load(state + at + 1, mask=live, other=0.0)
    n_re = s_re * re - s_im * im + now.to(tl.float32)[:, None]
    n_im = s_re * im + s_im * re
    tl.store(state + at, n_re, mask=live)
    tl.store(state + at + 1, n_im, mask=live)
    c_re = tl.load(residue + mode * 2, mask=live, other=0.0).to(tl.float32)
    c_im = tl.load(residue + mode * 2 + 1, mask=live, other=0.0).to(tl.float32)
    far = tl.sum(tl.where(live, gap * (c_re * n_re - c_im * n_im), 0.0), axis=1)
    total += tl.load(long_scale + d, mask=there, other=0.0).to(tl.float32) * far
    if SILU:
        total = total * tl.sigmoid(total)
    tl.store(y + row * channels + d, total, mask=there)
