"""Launches of the long convolution's kernels. Nothing here looks at a value, so every call can go into a CUDA graph."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from chela_plugin.kernels.backend import precision

from . import triton as kernels
from .configs import algorithm, blocks_for, lag_blocks_for
from .reference import fast_length

TILE_T, TILE_D = 64, 64  # of the copies between layouts: within 5 % of a plain copy's speed
FFT_TILE_T, FFT_TILE_D = 32, 32
LINE = 512


def lags_of(tokens: int, taps: Tensor, causal: bool) -> tuple[int, int, int]:
    """First and last lag that can meet a token, and the column of lag 0."""
    count = taps.shape[1] if causal else (taps.shape[1] + 1) // 2
    last = min(count, tokens) - 1
    return 0 if causal else -last, last, 0 if causal else count - 1


def time_first(x: Tensor) -> bool:
    """Whether neighbours in memory are neighbours in time, as after a product that wrote `[D, B T]`."""
    return x.stride(1) == 1 and x.stride(2) != 1


def empty_like(x: Tensor) -> Tensor:
    """`[B, T, D]` in x's order: contiguous, or as a view of `[D, B, T]` with T rounded up to whole 16 bytes."""
    batch, tokens, channels = x.shape
    if not time_first(x):
        return x.new_empty(batch, tokens, channels)
    return x.new_empty(channels, batch, (tokens + 7) // 8 * 8).permute(1, 2, 0)[:, :tokens]


def forward(x: Tensor, taps: Tensor, bias: Tensor | None, causal: bool, how: str | None = None) -> Tensor:
    """`[B, T, D]`, as `long_conv`. `how` is "toeplitz" or "fft", or None for the table."""
    first, last, centre = lags_of(x.shape[1], taps, causal)
    bias = None if bias is None else bias.contiguous()
    if x.numel() == 0:
        return empty_like(x)
    if (how or algorithm(x.shape[1], first, last, x.dtype, backward=False)) == "toeplitz":
        return _toeplitz(x, taps, bias, first, last, centre, 1)
    n = fast_length(x.shape[1])
    spectrum = _spectrum(x, 0, x.shape[1] - 1, n)
    spectrum.mul_(_spectrum(_as_tokens(taps, first, last, centre), first, last, n))
    return _from_spectrum(spectrum, empty_like(x), bias)


def backward(
    dy: Tensor, x: Tensor, taps: Tensor, causal: bool, want_x: bool, want_taps: bool, how: str | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of x and taps, in their dtypes; `[0]` for what is not wanted."""
    batch, tokens, channels = x.shape
    first, last, centre = lags_of(tokens, taps, causal)
    dx = dtaps = taps.new_empty(0)
    if x.numel() == 0:
        return torch.zeros_like(x), torch.zeros_like(taps)
    if (how or algorithm(tokens, first, last, x.dtype, backward=True)) == "toeplitz":
        if want_x:
            dx = _toeplitz(dy, taps, None, first, last, centre, -1, like=x)
        if want_taps:
            dtaps = _lag_sums(dy, x, taps, first, last, centre)
        return dx, dtaps
    n = fast_length(tokens)
    h = _spectrum(_as_tokens(taps, first, last, centre), first, last, n)
    g = _spectrum(dy, 0, tokens - 1, n)
    if want_taps:
        c = torch.empty_like(h)
        grid = (channels, triton.cdiv(n, LINE))
        kernels.correlate[grid](
            *(torch.view_as_real(z) for z in (g, _spectrum(x, 0, tokens - 1, n), h, c)), batch, n, BLOCK=LINE
        )
        dtaps = torch.zeros(channels, taps.shape[1], dtype=torch.float32, device=x.device)
        c = torch.fft.ifft(c, norm="forward")
        _read_real(c, _as_tokens(dtaps, 0, last, centre), None)
        if first < 0:  # -i c[n - p] is the sum at lag -p
            turn = torch.arange(n + first, n, device=x.device) * (-math.pi / 2 / n)
            behind = c[:, 0, n + first :] * torch.polar(torch.ones_like(turn), turn)
            dtaps[:, centre + first : centre] = behind.imag * (-1 / n)
        dtaps = dtaps.to(taps.dtype)
    else:
        g.mul_(h.conj())
    if want_x:
        dx = _from_spectrum(g, empty_like(x), None)
    return dx, dtaps


# Toeplitz products ---------------------------------------------------------------------------------------------------


def _toeplitz(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    first: int,
    last: int,
    centre: int,
    sign: int,
    like: Tensor | None = None,
) -> Tensor:
    """The convolution, or with sign = -1 the one with time reversed taps, which is its transpose."""
    batch, tokens, channels = x.shape
    blocks = blocks_for(tokens, x.dtype)
    M, step = blocks.chunk, blocks.step
    if sign == -1:
        first, last = -last, -first
    low, high = -((last + step - 1) // step), (M - 1 - first) // step
    copies = kernels.COPIES.value
    P = triton.cdiv((high - low + 1) * step + M - copies, 16) * 16
    table = torch.empty(channels, copies, P, dtype=x.dtype, device=x.device)
    kernels.shifted_taps[(channels, triton.cdiv(P, LINE))](
        taps, table, centre, first, last, M - copies - low * step, P, *taps.stride(), SIGN=sign, BLOCK=LINE
    )
    chunks = to_chunks(x, M)
    count = chunks.shape[1]
    out = empty_like(x if like is None else like)
    direct = time_first(out)
    y = out if direct else torch.empty_like(chunks)
    rows = (tokens + 7) // 8 * 8 if direct else count * M
    y_b, y_i, y_d = (out.stride(0), M, out.stride(2)) if direct else (y.stride(2), y.stride(1), y.stride(0))
    tiles = triton.cdiv(count * batch, blocks.columns)
    kernels.toeplitz[(tiles * channels,)](
        chunks, table, table if bias is None else bias, y, batch, count, rows // 8, tiles, low, high, P // 8,
        chunks.stride(0) // 8, y_b // 8, y_i // 8, y_d // 8,
        M=M, N=blocks.columns, BK=step, BIAS=bias is not None, PRECISION=precision(x.dtype), STAGES=blocks.stages,
        num_warps=blocks.warps,
    )  # fmt: skip
    if not direct:
        grid, sizes = _tiles(out.shape, tokens, TILE_T, TILE_D)
        kernels.from_chunks[grid](
            y, out, tokens, channels, *sizes, y_b, y_i, y_d, *out.stride(), M=M, BT=TILE_T, BD=TILE_D, num_warps=4
        )
    return out


def _lag_sums(dy: Tensor, x: Tensor, taps: Tensor, first: int, last: int, centre: int) -> Tensor:
    """sum over b and t of dy[t] x[t - lag], for the lag of each column of taps."""
    batch, tokens, channels = x.shape
    chunk, block = blocks_for(tokens, x.dtype).chunk, lag_blocks_for(x.dtype)
    M = block.block
    xs, dys = to_chunks(x, chunk), to_chunks(dy, chunk)
    low, high = -triton.cdiv(-first, M), triton.cdiv(last, M)
    count = high - low + 1
    part = torch.empty(channels, count, 2, M, dtype=torch.float32, device=x.device)
    kernels.lag_products[(triton.cdiv(count, 2) * channels,)](
        xs, dys, part, batch, tokens, count, low, xs.stride(0) // 8, dys.stride(0) // 8, CHUNK=chunk, M=M, N=block.rows,
        PRECISION=precision(x.dtype), STAGES=block.stages, num_warps=block.warps,
    )  # fmt: skip
    dtaps = torch.empty(taps.shape, dtype=taps.dtype, device=x.device)
    kernels.sum_diagonals[(channels, triton.cdiv(taps.shape[1], LINE))](
        part, dtaps, count, low, centre, first, last, taps.shape[1], M=M, BLOCK=LINE
    )
    return dtaps


def to_chunks(x: Tensor, M: int) -> Tensor:
    """x `[B, T, D]` as `[D, chunks, B, M]`, zero behind the last token; a view where x lies so already."""
    batch, tokens, channels = x.shape
    count = triton.cdiv(tokens, M)
    if batch == 1 and tokens == count * M and _reads_as_rows(x):
        return x[0].t().unflatten(1, (count, 1, M))
    out = torch.empty(channels, count, batch, M, dtype=x.dtype, device=x.device)
    grid, sizes = _tiles(x.shape, count * M, TILE_T, TILE_D)
    kernels.to_chunks[grid](
        x, out, tokens, channels, *sizes, *x.stride(), out.stride(2), out.stride(1), out.stride(0), M=M, BT=TILE_T,
        BD=TILE_D, num_warps=4,
    )  # fmt: skip
    return out


def _reads_as_rows(x: Tensor) -> bool:
    """Whether a tensor descriptor can address the channels of `[1, T, D]` as rows: dense, on 16-byte boundaries."""
    return time_first(x) and x.stride(2) % 8 == 0 and x.data_ptr() % 16 == 0


def _tiles(shape: torch.Size, tokens: int, BT: int, BD: int) -> tuple[tuple[int], tuple[int, int]]:
    t_tiles, d_tiles = triton.cdiv(tokens, BT), triton.cdiv(shape[2], BD)
    return (t_tiles * d_tiles * shape[0],), (t_tiles, d_tiles)


# FFT -----------------------------------------------------------------------------------------------------------------


def _as_tokens(taps: Tensor, first: int, last: int, centre: int) -> Tensor:
    """The taps of lags first..last as a sequence `[1, lags, D]`."""
    return taps[:, centre + first : centre + last + 1].t()[None]


def _spectrum(x: Tensor, first: int, last: int, n: int) -> Tensor:
    """`[D, B, n]`, complex: the transform of x `[B, last - first + 1, D]` times w^p, p = first..last."""
    batch, _, channels = x.shape
    z = torch.empty(channels, batch, n, dtype=torch.complex64, device=x.device)
    pairs = torch.view_as_real(z)
    grid, sizes = _tiles(x.shape, n, FFT_TILE_T, FFT_TILE_D)
    kernels.weigh[grid](
        x, pairs, first, last, channels, n, *sizes, math.pi / 2 / n, *x.stride(), pairs.stride(1), pairs.stride(0),
        TWO_SIDED=first < 0, BT=FFT_TILE_T, BD=FFT_TILE_D, num_warps=4,
    )  # fmt: skip
    return torch.fft.fft(z)


def _from_spectrum(spectrum: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    return _read_real(torch.fft.ifft(spectrum, norm="forward"), y, bias)


def _read_real(z: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    """y `[B, T, D]` from the unscaled inverse transform z `[D, B, n]`."""
    n = z.shape[2]
    pairs = torch.view_as_real(z)
    grid, sizes = _tiles(y.shape, y.shape[1], FFT_TILE_T, FFT_TILE_D)
    kernels.real_part[grid](
        pairs, y, pairs if bias is None else bias, y.shape[1], y.shape[2], n, *sizes, math.pi / 2 / n, 1 / n,
        pairs.stride(1), pairs.stride(0), *y.stride(), BIAS=bias is not None, BT=FFT_TILE_T, BD=FFT_TILE_D, num_warps=4,
    )  # fmt: skip
    return y
