"""Depthwise long convolution in plain PyTorch: the definition, and the same sum through an FFT.

    causal:     y[b, t, d] = bias[d] + sum_{j = 0}^{L-1} taps[d, j] x[b, t - j, d]
    two-sided:  y[b, t, d] = bias[d] + sum_{j = -(L-1)}^{L-1} taps[d, L - 1 + j] x[b, t - j, d]

with x zero outside 0..T-1. `direct` is the definition: a Toeplitz matrix per channel times the sequence, O(T^2), exact
in every dtype and without influence of the future, bit for bit. `fft` is the same sum in O(T log T); it pads by the
largest lag, so that nothing that wraps around is read, and is causal up to its own rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chela_plugin.kernels.precision import without_autocast

# Up to this many tokens the Toeplitz product is taken, which is also causal bit for bit. One CPU core, fp32, forward
# and backward (benchmarks/results/plain_forms_cpu.json): for rows of images (batch 128 to 512, T = 8 to 32) it is 1.4
# to 1.5 times as fast as the FFT, on a par at batch 64 and T = 64; at batch 8 it loses, 3 to 4 times at T = 16 and 64
# and 8 times at 128.
DIRECT_MAX_TOKENS = 64


def lag_window(taps: Tensor, tokens: int, *, causal: bool) -> Tensor:
    """The taps at lags -(T-1) .. T-1, zero where there are none: `[D, 2T - 1]`."""
    last = taps.shape[-1] - 1 if causal else (taps.shape[-1] - 1) // 2
    first = 0 if causal else -last
    low, high = max(first, 1 - tokens), min(last, tokens - 1)
    kept = taps[:, low - first : high - first + 1]
    return torch.nn.functional.pad(kept, (low + tokens - 1, tokens - 1 - high))


def direct(x: Tensor, taps: Tensor, *, causal: bool) -> Tensor:
    """The definition, by one Toeplitz matrix a channel. x `[B, T, D]`, taps `[D, L]` or `[D, 2L - 1]`; same dtypes."""
    tokens = x.shape[1]
    window = lag_window(taps, tokens, causal=causal)  # [D, 2T-1], lag j at column T-1+j
    # Row i, column s of the Toeplitz matrix holds lag i - s: windows of the reversed taps, last window first.
    if torch.compiler.is_compiling():  # unfold's size is a plain int: a graph for each T
        shifted = torch.nn.functional.pad(window.flip(-1), (1, 0)).repeat(1, tokens)[:, tokens:]
        toeplitz = shifted.unflatten(1, (tokens, 2 * tokens - 1))[..., :tokens]
    else:
        toeplitz = window.flip(-1).unfold(-1, tokens, 1).flip(1)
    return torch.bmm(toeplitz, x.permute(2, 1, 0)).permute(2, 1, 0)


def fft(x: Tensor, taps: Tensor, *, causal: bool) -> Tensor:
    """The same sum through a real FFT. x `[B, T, D]`, taps `[D, L]` or `[D, 2L - 1]`; fp32 or fp64."""
    tokens = x.shape[1]
    if causal:
        taps = taps[:, :tokens]
        behind, ahead = 0, taps.shape[1] - 1
    else:
        centre = taps.shape[1] // 2
        ahead = behind = min(centre, tokens - 1)
        taps = taps[:, centre - behind : centre + ahead + 1]
    # Lag 0 stands at `behind`, so places behind .. behind + T - 1 are read; what wraps around stays out of them.
    points = fast_length(tokens + ahead)
    x_f = torch.fft.rfft(x.transpose(1, 2), n=points)
    y = torch.fft.irfft(x_f * torch.fft.rfft(taps, n=points), n=points)
    return y[..., behind : behind + tokens].transpose(1, 2)


def fast_length(points: int) -> int:
    """The smallest n >= points of the form 2^a, 3 * 2^a or 5 * 2^a, which FFT libraries are quick at."""
    if torch.compiler.is_compiling():  # a form that stays symbolic, lest there be a graph for each T
        return (points + 127) // 128 * 128
    power = 1 << max(points - 1, 0).bit_length()
    return min(n for n in (power, power // 4 * 3, power // 8 * 5) if n >= points)


def long_conv_reference(x: Tensor, taps: Tensor, bias: Tensor | None, *, causal: bool) -> Tensor:
    """`direct` for short sequences and `fft` for long ones; fp32 inside (fp64 for fp64), x's dtype outside."""
    inner = torch.float64 if x.dtype == torch.float64 else torch.float32
    form = direct if x.shape[1] <= DIRECT_MAX_TOKENS else fft
    with without_autocast(x):
        y = form(x.to(inner), taps.to(inner), causal=causal)
        if bias is not None:
            y = y + bias.to(inner)
    return y.to(x.dtype)
