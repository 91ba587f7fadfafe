"""Depthwise long convolution in plain PyTorch: the definition, and the same sum through an FFT.

    causal:     y[b, t, d] = bias[d] + sum_{j = 0}^{L-1} taps[d, j] x[b, t - j, d]
    two-sided:  y[b, t, d] = bias[d] + sum_{j = -(L-1)}^{L-1} taps[d, L - 1 + j] x[b, t - j, d]

with x zero outside 0..T-1. `direct` is the definition: a Toeplitz matrix per channel times the sequence, O(T^2), exact
in every dtype and without influence of the future, bit for bit. `fft` is the same sum in O(T log T); it pads by the
largest lag, so that nothing that wraps around is read, and is causal up to its own rounding.
"""

from __future__ import annotations

import math

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


def long_conv_reference(x: Tensor, taps: Tensor, bias: Tensor | None, *, causal: bool, silu: bool = False) -> Tensor:
    """`direct` for short sequences, `fft` for long ones, and SiLU; fp32 inside (fp64 for fp64), x's dtype outside."""
    inner = torch.float64 if x.dtype == torch.float64 else torch.float32
    form = direct if x.shape[1] <= DIRECT_MAX_TOKENS else fft
    with without_autocast(x):
        y = form(x.to(inner), taps.to(inner), causal=causal)
        if bias is not None:
            y = y + bias.to(inner)
        if silu:
            y = torch.nn.functional.silu(y)
    return y.to(x.dtype)


# Modal filters -------------------------------------------------------------------------------------------------------

MODAL_CHUNK = 64


def modal_powers(log_time: Tensor, frequency: Tensor, lags: Tensor) -> Tensor:
    """p^lag, complex `[*log_time.shape, lags]`, with p = exp(-exp(-log_time) + i frequency).

    The angle is reduced in fp64, for it grows with the lag.
    """
    lags = lags.to(torch.float64)
    turned = torch.remainder(frequency.double()[..., None] * lags, 2 * math.pi).to(frequency.dtype)
    log_radius = -torch.exp(-log_time)
    return torch.polar(torch.exp(log_radius[..., None] * lags.to(log_radius.dtype)), turned)


def modal_residues(log_time: Tensor, residue: Tensor) -> Tensor:
    """c (1 - |p|), complex `[G, M]`: the factor keeps the l1 norm below sum |c|, whatever the time constants are."""
    return torch.view_as_complex(residue.contiguous()) * -torch.expm1(-torch.exp(-log_time))


def modal_taps(log_time: Tensor, frequency: Tensor, residue: Tensor, length: int) -> Tensor:
    """The filter itself, `[G, length]`: tap_j = Re sum_m c_m (1 - |p_m|) p_m^j."""
    powers = modal_powers(log_time, frequency, torch.arange(length, device=log_time.device))
    return torch.einsum("gm,gmj->gj", modal_residues(log_time, residue), powers).real


def modal_scan(
    x: Tensor, log_time: Tensor, frequency: Tensor, residue: Tensor, chunk: int = MODAL_CHUNK
) -> tuple[Tensor, Tensor]:
    """x `[B, T, D]` convolved with modal filters, chunk by chunk, at a cost a token that does not grow with T.

    With S_n the modes' states before chunk n, r the place in a chunk, C its size, and c the residues:

        y[n C + r] = sum_{s <= r} tap_(r - s) x[n C + s]  +  Re sum_m c_m p_m^(r + 1) S_n[m]
        S_(n+1) = p^C S_n + sum_s p^(C - 1 - s) x[n C + s]

    The near part is one triangular matrix for all channels that share a filter. Returns y and the states behind the
    last token, complex `[B, D, M]`.
    """
    batch, tokens, channels = x.shape
    groups, modes = log_time.shape
    powers = modal_powers(log_time, frequency, torch.arange(chunk + 1, device=x.device))
    c = modal_residues(log_time, residue)
    place = torch.arange(chunk, device=x.device)
    lag = place[:, None] - place
    near = torch.einsum("gm,gmj->gj", c, powers[..., :chunk]).real[:, lag.clamp(min=0)] * (lag >= 0)
    count = max(-(-tokens // chunk), 1)
    filled = torch.nn.functional.pad(x, (0, 0, 0, count * chunk - tokens))
    xs = filled.reshape(batch, count, chunk, groups, channels // groups)
    y = torch.einsum("grs,bnsgd->bnrgd", near, xs)
    found = torch.einsum("gms,bnsgd->nbgdm", powers[..., :chunk].flip(-1), xs.to(powers.dtype))
    turn, state = powers[:, None, :, chunk], found.new_zeros(batch, groups, channels // groups, modes)
    states = []
    for added in found:
        states.append(state)
        state = turn * state + added
    y = y + torch.einsum("gm,gmr,nbgdm->bnrgd", c, powers[..., 1:], torch.stack(states)).real
    if behind := tokens % chunk:  # the last chunk was filled up with zeros, which only turned its state
        state = powers[:, None, :, behind] * states[-1] + torch.einsum(
            "gms,bsgd->bgdm", powers[..., :behind].flip(-1), xs[:, -1, :behind].to(powers.dtype)
        )
    return y.flatten(3).flatten(1, 2)[:, :tokens], state.flatten(1, 2)


def modal_conv_reference(
    x: Tensor,
    log_time: Tensor,
    frequency: Tensor,
    residue: Tensor,
    short: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    silu: bool,
    causal: bool = True,
) -> Tensor:
    """`modal_conv`'s definition: u = bias + short * x + scale (modal * x), and SiLU(u) or u."""
    inner = torch.float64 if x.dtype == torch.float64 else torch.float32
    with without_autocast(x):
        wide = x.to(inner)
        time, turn, c = (t.to(inner) for t in (log_time, frequency, residue))
        if causal:
            u, _ = modal_scan(wide, time, turn, c)
        else:
            (time, time_behind), (turn, turn_behind), (c, c_behind) = (t.chunk(2) for t in (time, turn, c))
            u, _ = modal_scan(wide, time, turn, c)
            back, _ = modal_scan(wide.flip(1), time_behind, turn_behind, c_behind)
            at_lag_0 = modal_taps(time_behind, turn_behind, c_behind, 1)[:, 0]
            u = u + back.flip(1) - at_lag_0.repeat_interleave(x.shape[2] // len(time)) * wide
        if scale is not None:
            u = u * scale.to(inner)
        for k in range(0 if short is None else short.shape[1]):
            assert short is not None
            lag = k if causal else k - short.shape[1] // 2
            if abs(lag) < x.shape[1]:
                u = u + short[:, k].to(inner) * torch.nn.functional.pad(wide, (0, 0, lag, -lag))
        if bias is not None:
            u = u + bias.to(inner)
        return (torch.nn.functional.silu(u) if silu else u).to(x.dtype)
