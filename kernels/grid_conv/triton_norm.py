"""Triton kernels of batch norms over the branches of a convolution, summed, and SiLU behind them.

    mean_i, var_i = over all places of y_i        a_i = weight_i / sqrt(var_i + eps)
    u = sum_i a_i (y_i - mean_i) + bias_i         z = SiLU(u)

and backward, with g = dz SiLU'(u) and n_i = (y_i - mean_i) / sqrt(var_i + eps),

    dbias_i = sum g        dweight_i = sum g n_i        dy_i = a_i (g - dbias_i / N - n_i dweight_i / N)

The gradient reaches every branch through the same g, so one pass makes all sums and another all dy_i.
"""

# ruff: noqa: RUF005  # Triton joins tuples, which grow so; it has no starred ones.
# mypy: disable-error-code="assignment"
import triton
import triton.language as tl

from .triton import _slope


@triton.jit
def _outputs(program, tile_rows, tile_columns, R, W, h, w):
    """How many places a program of `convolve` made."""
    rows = tl.minimum(h - program // tile_columns % tile_rows * R, R)
    return (rows * tl.minimum(w - program % tile_columns * W, W)).to(tl.float32)


@triton.jit(do_not_specialize=["programs", "tile_rows", "tile_columns", "R", "W"])
def statistics(sums, weight, bias, running_mean, running_var, state, programs, tile_rows, tile_columns, R, W, h, w,
               places, D, eps, momentum, BRANCH: tl.constexpr, N: tl.constexpr, TRACK: tl.constexpr, BP: tl.constexpr,
               BC: tl.constexpr):  # fmt: skip
    """Of one of N branches, from the partial sums that `convolve` left: state `[4, N, D]` in fp32, of mean, rstd, scale
    a and bias, and the running statistics (variance unbiased, as torch keeps it)."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    there = c < D
    seen = tl.zeros((BP, 1), tl.float32)  # places behind the mean and the spread of each lane
    mean = tl.zeros((BP, BC), tl.float32)
    spread = tl.zeros((BP, BC), tl.float32)
    for first in range(0, programs, BP):
        p = first + tl.arange(0, BP)
        live = (p < programs)[:, None] & there[None, :]
        at = sums + p.to(tl.int64)[:, None] * 2 * D + c[None, :]
        total = tl.load(at, mask=live, other=0.0)
        own = tl.load(at + D, mask=live, other=0.0)
        count = tl.where(p < programs, _outputs(p, tile_rows, tile_columns, R, W, h, w), 0.0)[:, None]
        share = count / tl.maximum(seen + count, 1.0)
        away = total / tl.maximum(count, 1.0) - mean
        spread += own + away * away * seen * share
        mean += away * share
        seen += count
    average = tl.sum(seen * mean, 0) / places
    spread = tl.sum(spread + seen * (mean - average[None, :]) * (mean - average[None, :]), 0)
    inverse = 1 / tl.sqrt(spread / places + eps)
    state += BRANCH * D + c
    tl.store(state, average, mask=there)
    tl.store(state + N * D, inverse, mask=there)
    tl.store(state + 2 * N * D, inverse * tl.load(weight + c, mask=there, other=0.0).to(tl.float32), mask=there)
    tl.store(state + 3 * N * D, tl.load(bias + c, mask=there, other=0.0).to(tl.float32), mask=there)
    if TRACK:
        old = tl.load(running_mean + c, mask=there, other=0.0).to(tl.float32)
        tl.store(running_mean + c, old + momentum * (average - old), mask=there)
        old = tl.load(running_var + c, mask=there, other=0.0).to(tl.float32)
        tl.store(running_var + c, old + momentum * (spread / tl.maximum(places - 1, 1) - old), mask=there)


@triton.jit
def _sum(y, state, at, c, live, there, stride, D, N: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """u of a block."""
    u = tl.zeros((BR, BC), tl.float32)
    for i in tl.static_range(N):
        value = tl.load(y + i * stride + at, mask=live, other=0.0).to(tl.float32)
        a = tl.load(state + (2 * N + i) * D + c, mask=there, other=0.0)
        shift = tl.load(state + (3 * N + i) * D + c, mask=there, other=0.0)
        u += (value - tl.load(state + i * D + c, mask=there, other=0.0)[None, :]) * a[None, :] + shift[None, :]
    return u


@triton.jit
def apply(y, state, z, rows, stride, D, N: tl.constexpr, SILU: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """y `[N, rows, D]`, `stride` between branches; z `[rows, D]`; state: see `statistics`."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    there = c < D
    live = (row < rows)[:, None] & there[None, :]
    at = row[:, None] * D + c[None, :]
    u = _sum(y, state, at, c, live, there, stride, D, N, BR, BC)
    if SILU:
        u *= tl.sigmoid(u)
    tl.store(z + at, u, mask=live)


@triton.jit(do_not_specialize=["per_program"])
def gradient_sums(y, dz, state, sums, rows, per_program, stride, D, N: tl.constexpr, SILU: tl.constexpr,
                  BR: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """sums `[programs, N + 1, D]`: of g n_i for each branch, then of g."""
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    there = c < D
    start = tl.program_id(0).to(tl.int64) * per_program
    weights = ()
    for _ in tl.static_range(N):
        weights = weights + (tl.zeros((BR, BC), tl.float32),)
    total = tl.zeros((BR, BC), tl.float32)
    for first in range(0, per_program, BR):
        row = start + first + tl.arange(0, BR)
        live = (row < rows)[:, None] & there[None, :]
        at = row[:, None] * D + c[None, :]
        g = tl.load(dz + at, mask=live, other=0.0).to(tl.float32)
        if SILU:
            g *= _slope(_sum(y, state, at, c, live, there, stride, D, N, BR, BC))
        updated = ()
        for i in tl.static_range(N):
            value = tl.load(y + i * stride + at, mask=live, other=0.0).to(tl.float32)
            value = (value - tl.load(state + i * D + c, mask=there, other=0.0)[None, :]) * tl.load(
                state + (N + i) * D + c, mask=there, other=0.0
            )[None, :]
            updated = updated + (weights[i] + g * value,)
        weights = updated
        total += g
    at = sums + tl.program_id(0) * (N + 1) * D + c
    for i in tl.static_range(N):
        tl.store(at + i * D, tl.sum(weights[i], 0), mask=there)
    tl.store(at + N * D, tl.sum(total, 0), mask=there)


@triton.jit
def gradient(y, dz, state, sums, dy, rows, stride, D, N: tl.constexpr, SILU: tl.constexpr, BR: tl.constexpr,
             BC: tl.constexpr):  # fmt: skip
    """dy `[N, rows, D]`, as y; sums `[N + 1, D]`, summed."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    there = c < D
    live = (row < rows)[:, None] & there[None, :]
    at = row[:, None] * D + c[None, :]
    g = tl.load(dz + at, mask=live, other=0.0).to(tl.float32)
    if SILU:
        g *= _slope(_sum(y, state, at, c, live, there, stride, D, N, BR, BC))
    g -= (tl.load(sums + N * D + c, mask=there, other=0.0) / rows)[None, :]
    for i in tl.static_range(N):
        value = tl.load(y + i * stride + at, mask=live, other=0.0).to(tl.float32)
        inverse = tl.load(state + (N + i) * D + c, mask=there, other=0.0)
        value = (value - tl.load(state + i * D + c, mask=there, other=0.0)[None, :]) * inverse[None, :]
        share = tl.load(sums + i * D + c, mask=there, other=0.0) / rows
        a = tl.load(state + (2 * N + i) * D + c, mask=there, other=0.0)
        tl.store(dy + i * stride + at, a[None, :] * (g - value * share[None, :]), mask=live)
