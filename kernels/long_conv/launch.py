"""Launches of the long convolution's kernels. Nothing here looks at a value, so every call can go into a CUDA graph."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from chela_plugin.kernels.backend import ceil_div, precision
from chela_plugin.kernels.launching import Launcher

from . import triton as kernels
from .configs import CHUNK_BYTES, algorithm, blocks_for, lag_blocks_for, slab_bytes
from .reference import fast_length

TILE_T, TILE_D = 64, 64  # of the copies between layouts, which run at a plain copy's speed
LINE = 512

launch_to_chunks, launch_from_chunks = Launcher(kernels.to_chunks), Launcher(kernels.from_chunks)
launch_shifted_taps, launch_toeplitz = Launcher(kernels.shifted_taps), Launcher(kernels.toeplitz)
launch_lag_products, launch_sum_diagonals = Launcher(kernels.lag_products), Launcher(kernels.sum_diagonals)
launch_weigh, launch_real_part = Launcher(kernels.weigh), Launcher(kernels.real_part)
launch_correlate = Launcher(kernels.correlate)


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


class Epilogue(NamedTuple):
    """bias `[D]` or None; silu: whether y = SiLU(u); u: where to leave u, laid out as y, or None."""

    bias: Tensor | None = None
    silu: bool = False
    u: Tensor | None = None

    def of(self, part: slice) -> Epilogue:
        bias, silu, u = self
        return Epilogue(None if bias is None else bias[part], silu, None if u is None else u[..., part])

    def options(self) -> dict[str, bool]:
        return {"BIAS": self.bias is not None, "SILU": self.silu, "SAVE": self.u is not None}


def forward(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool,
    how: str | None = None,
    *,
    silu: bool = False,
    u: Tensor | None = None,
) -> Tensor:
    """`[B, T, D]`, as `long_conv`. `how` is "toeplitz" or "fft" (not for packed sequences), or None for the table.

    u: with `silu` filled with what SiLU is taken of; an `empty_like(x)`."""
    first, last, centre = lags_of(x.shape[1], taps, causal)
    end = Epilogue(None if bias is None else bias.contiguous(), silu, u)
    y = empty_like(x)
    if x.numel() == 0:
        return y
    if _algorithm(x, cu_seqlens, first, last, False, how) == "toeplitz":
        M = blocks_for(x.shape[0], x.shape[1], x.dtype).chunk
        places = places_of(cu_seqlens, x.shape[1], M)
        for part in _slabs(x, x.shape[1] * x.element_size(), CHUNK_BYTES):
            chunks = to_chunks(x[..., part], M, places)
            _toeplitz(chunks, taps[part], end.of(part), first, last, centre, 1, y[..., part])
        return y
    n = fast_length(x.shape[1])
    for part in _slabs(x, 8 * n, slab_bytes(n)):
        spectrum = _spectrum(x[..., part], 0, x.shape[1] - 1, n)
        spectrum.mul_(_spectrum(_as_tokens(taps[part], first, last, centre), first, last, n))
        _from_spectrum(spectrum, y[..., part], end.of(part))
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    taps: Tensor,
    cu_seqlens: Tensor | None,
    causal: bool,
    want_x: bool,
    want_taps: bool,
    how: str | None = None,
    *,
    want_bias: bool = False,
    u: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and taps, in their dtypes, and of bias, in fp32; `[0]` for what is not wanted.

    u: what the forward pass took SiLU of; None without SiLU."""
    batch, tokens, channels = x.shape
    first, last, centre = lags_of(tokens, taps, causal)
    dx, dtaps, dbias = (taps.new_empty(0) for _ in range(3))  # an operator's outputs may not be one tensor
    if x.numel() == 0:
        return torch.zeros_like(x), torch.zeros_like(taps), taps.new_zeros(channels if want_bias else 0)
    if want_x:
        dx = empty_like(x)
    if want_taps:
        dtaps = torch.empty(taps.shape, dtype=taps.dtype, device=x.device)
    if _algorithm(x, cu_seqlens, first, last, True, how) == "toeplitz":
        M = blocks_for(batch, tokens, x.dtype).chunk
        places = places_of(cu_seqlens, tokens, M)
        sums = _sums_of(dy, ceil_div(_slots(tokens, M, places) * M, TILE_T)) if want_bias else None
        for part in _slabs(x, tokens * x.element_size(), CHUNK_BYTES):
            before, share = (None if t is None else t[..., part] for t in (u, sums))
            dy_chunks = to_chunks(dy[..., part], M, places, before, share)
            if want_x:
                _toeplitz(dy_chunks, taps[part], Epilogue(), first, last, centre, -1, dx[..., part])
            if want_taps:
                _lag_sums(dy_chunks, to_chunks(x[..., part], M, places), dtaps[part], first, last, centre)
        return dx, dtaps, dbias if sums is None else sums.sum(0)
    n = fast_length(tokens)
    sums = _sums_of(dy, ceil_div(n, TILE_T)) if want_bias else None
    if want_taps:
        dtaps.zero_()  # lags that no two tokens have
    for part in _slabs(x, 8 * n, slab_bytes(n)):
        h = _spectrum(_as_tokens(taps[part], first, last, centre), first, last, n)
        behind_silu = None if u is None else u[..., part]
        g = _spectrum(dy[..., part], 0, tokens - 1, n, behind_silu, None if sums is None else sums[:, part])
        if want_taps:
            c = torch.empty_like(h)
            spectra = (g, _spectrum(x[..., part], 0, tokens - 1, n), h, c)
            grid = (h.shape[0], ceil_div(n, LINE))
            launch_correlate(grid, [torch.view_as_real(z) for z in spectra], (batch, n), BLOCK=LINE)
            del spectra
            c = torch.fft.ifft(c, norm="forward")
            _read_real(c, _as_tokens(dtaps[part], 0, last, centre), Epilogue())
            if first < 0:  # -i c[n - p] is the sum at lag -p
                turn = torch.arange(n + first, n, device=x.device) * (-math.pi / 2 / n)
                behind = c[:, 0, n + first :] * torch.polar(torch.ones_like(turn), turn)
                dtaps[part, centre + first : centre] = behind.imag * (-1 / n)
        else:
            g.mul_(h.conj())
        if want_x:
            _from_spectrum(g, dx[..., part], Epilogue())
    return dx, dtaps, dbias if sums is None else sums.sum(0)


def _sums_of(dy: Tensor, tiles: int) -> Tensor:
    """Room for the sums over a tile's tokens, a row for each tile of each sequence."""
    return torch.empty(dy.shape[0] * tiles, dy.shape[2], dtype=torch.float32, device=dy.device)


def _algorithm(x: Tensor, cu_seqlens: Tensor | None, first: int, last: int, backward: bool, how: str | None) -> str:
    if cu_seqlens is not None:
        return "toeplitz"
    return how or algorithm(x.shape[1], first, last, x.dtype, backward=backward)


def _slabs(x: Tensor, a_row: int, most: int) -> list[slice]:
    """Cuts of the channels of `most` bytes each, if that allows 8; `a_row` bytes a sequence of one channel.

    Whole tiles of 64 where there are as many: with another number Triton finds no aligned accesses."""
    channels = most // (a_row * x.shape[0])
    channels = channels // 64 * 64 if channels >= 64 else max(channels // 8 * 8, 8)
    return [slice(d, d + channels) for d in range(0, x.shape[2], channels)]


# Toeplitz products ---------------------------------------------------------------------------------------------------


class Chunks(NamedTuple):
    """data `[D, slots, B, M]`; places (`triton.py`) where sequences are packed."""

    data: Tensor
    places: Tensor | None


def places_of(cu_seqlens: Tensor | None, tokens: int, M: int) -> Tensor | None:
    """Where packed sequences stand in chunks of M. Their lengths are on the device: slots are as many as can be."""
    if cu_seqlens is None:
        return None
    cuts = cu_seqlens.to(torch.int64)
    begin, length = cuts[:-1], cuts[1:] - cuts[:-1]
    count = (length + M - 1) // M
    end = count.cumsum(0)
    slots = tokens // M + length.shape[0]
    slot = torch.arange(slots, device=cuts.device)
    owner = torch.searchsorted(end, slot, right=True).clamp_max(length.shape[0] - 1)
    within = slot - (end - count)[owner]
    left = (length[owner] - within * M).clamp(0, M)
    rows = (within, count[owner], begin[owner] + within * M, left)
    # A slot behind the last sequence is a sequence of no chunks.
    return torch.cat([*(torch.where(left > 0, row, 0) for row in rows), count.max()[None]])


def _slots(tokens: int, M: int, places: Tensor | None) -> int:
    return ceil_div(tokens, M) if places is None else places.shape[0] // 4


def to_chunks(
    x: Tensor, M: int, places: Tensor | None = None, u: Tensor | None = None, sums: Tensor | None = None
) -> Chunks:
    """x `[B, T, D]` in chunks of M tokens, zero behind the last token; a view where x lies so already.

    u: x is a gradient behind SiLU(u), and taken back through it. sums: filled as `_sums_of` says."""
    batch, tokens, channels = x.shape
    slots = _slots(tokens, M, places)
    as_it_is = places is None and u is None and sums is None
    if as_it_is and batch == 1 and tokens == slots * M and _reads_as_rows(x):
        return Chunks(x[0].t().unflatten(1, (slots, 1, M)), None)
    out = torch.empty(channels, slots, batch, M, dtype=x.dtype, device=x.device)
    grid, sizes = _tiles(x.shape, slots * M, TILE_T, TILE_D)
    before = x if u is None else u
    rows = out if sums is None else sums
    launch_to_chunks(
        grid, (x, before, out, rows, x if places is None else places),
        (slots, tokens, channels, *sizes, *x.stride(), *before.stride(), out.stride(2), out.stride(1), out.stride(0),
         rows.stride(0)),
        M=M, PACKED=places is not None, SILU=u is not None, SUM=sums is not None, BT=TILE_T, BD=TILE_D, num_warps=4,
    )  # fmt: skip
    return Chunks(out, places)


def _toeplitz(
    chunks: Chunks, taps: Tensor, end: Epilogue, first: int, last: int, centre: int, sign: int, out: Tensor
) -> None:
    """Fills `out` with the convolution, or with sign = -1 the one with time reversed taps, its transpose."""
    x, places = chunks
    channels, slots, batch, M = x.shape
    tokens = out.shape[1]
    blocks = blocks_for(batch, tokens, x.dtype)
    step = blocks.step
    if sign == -1:
        first, last = -last, -first
    low, high = -((last + step - 1) // step), (M - 1 - first) // step
    copies = kernels.COPIES.value
    P = ceil_div((high - low + 1) * step + M - copies, 16) * 16
    table = torch.empty(channels, copies, P, dtype=x.dtype, device=x.device)
    launch_shifted_taps(
        (channels, ceil_div(P, LINE)), (taps, table),
        (centre, first, last, M - copies - low * step, P, *taps.stride()), SIGN=sign, BLOCK=LINE,
    )  # fmt: skip
    direct = places is None and time_first(out)
    y = out if direct else torch.empty_like(x)
    rows = (tokens + 7) // 8 * 8 if direct else slots * M
    y_b, y_i, y_d = (out.stride(0), M, out.stride(2)) if direct else (y.stride(2), y.stride(1), y.stride(0))
    tiles = ceil_div(slots * batch, blocks.columns)
    last_pass = {"SILU": end.silu, "SAVE": end.u is not None}
    here = last_pass if direct else {"SILU": False, "SAVE": False}
    u = out if end.u is None else end.u
    launch_toeplitz(
        (tiles * channels,),
        (x, table, table if end.bias is None else end.bias, y, u, x if places is None else places),
        (batch, slots, rows // 8, tiles, low, high, P // 8, x.stride(0) // 8, y_b // 8, y_i // 8, y_d // 8),
        M=M, N=blocks.columns, BK=step, BIAS=end.bias is not None, PACKED=places is not None,
        PRECISION=precision(x.dtype), STAGES=blocks.stages, num_warps=blocks.warps, **here,
    )  # fmt: skip
    if not direct:
        grid, sizes = _tiles(out.shape, slots * M, TILE_T, TILE_D)
        launch_from_chunks(
            grid, (y, out, u, x if places is None else places),
            (slots, tokens, channels, *sizes, y_b, y_i, y_d, *out.stride()),
            M=M, PACKED=places is not None, BT=TILE_T, BD=TILE_D, num_warps=4, **last_pass,
        )  # fmt: skip


def _lag_sums(dy: Chunks, x: Chunks, dtaps: Tensor, first: int, last: int, centre: int) -> None:
    """Fills dtaps with the sum over b and t of dy[t] x[t - lag], for the lag of each column."""
    channels, slots, batch, chunk = x.data.shape
    dtype, places = x.data.dtype, x.places
    block = lag_blocks_for(dtype)
    M = block.block
    low, high = -ceil_div(-first, M), ceil_div(last, M)
    count = high - low + 1
    part = torch.empty(channels, count, 2, M, dtype=torch.float32, device=dtaps.device)
    launch_lag_products(
        (ceil_div(count, 2) * channels,), (x.data, dy.data, part, x.data if places is None else places),
        (batch, slots, count, low, x.data.stride(0) // 8, dy.data.stride(0) // 8),
        CHUNK=chunk, M=M, N=block.rows, PACKED=places is not None, PRECISION=precision(dtype),
        STAGES=block.stages, num_warps=block.warps, maxnreg=block.registers,
    )  # fmt: skip
    launch_sum_diagonals(
        (channels, ceil_div(dtaps.shape[1], LINE)), (part, dtaps),
        (count, low, centre, first, last, dtaps.shape[1]), M=M, BLOCK=LINE,
    )  # fmt: skip


def _reads_as_rows(x: Tensor) -> bool:
    """Whether a tensor descriptor can address the channels of `[1, T, D]` as rows: dense, on 16-byte boundaries."""
    return time_first(x) and x.stride(2) % 8 == 0 and x.data_ptr() % 16 == 0


def _tiles(shape: torch.Size, tokens: int, BT: int, BD: int) -> tuple[tuple[int], tuple[int, int]]:
    t_tiles, d_tiles = ceil_div(tokens, BT), ceil_div(shape[2], BD)
    return (t_tiles * d_tiles * shape[0],), (t_tiles, d_tiles)


# FFT -----------------------------------------------------------------------------------------------------------------


def _as_tokens(taps: Tensor, first: int, last: int, centre: int) -> Tensor:
    """The taps of lags first..last as a sequence `[1, lags, D]`."""
    return taps[:, centre + first : centre + last + 1].t()[None]


def _spectrum(x: Tensor, first: int, last: int, n: int, u: Tensor | None = None, sums: Tensor | None = None) -> Tensor:
    """`[D, B, n]`, complex: the transform of x `[B, last - first + 1, D]` times w^p, p = first..last.

    u and sums as in `to_chunks`."""
    batch, _, channels = x.shape
    z = torch.empty(channels, batch, n, dtype=torch.complex64, device=x.device)
    pairs = torch.view_as_real(z)
    grid, sizes = _tiles(x.shape, n, TILE_T, TILE_D)
    before, rows = x if u is None else u, pairs if sums is None else sums
    launch_weigh(
        grid, (x, before, pairs, rows),
        (first, last, channels, n, *sizes, math.pi / 2 / n, *x.stride(), *before.stride(), pairs.stride(1),
         pairs.stride(0), rows.stride(0)),
        TWO_SIDED=first < 0, SILU=u is not None,
        SUM=sums is not None, BT=TILE_T, BD=TILE_D, num_warps=4,
    )  # fmt: skip
    return torch.fft.fft(z)


def _from_spectrum(spectrum: Tensor, y: Tensor, end: Epilogue) -> None:
    _read_real(torch.fft.ifft(spectrum, norm="forward"), y, end)


def _read_real(z: Tensor, y: Tensor, end: Epilogue) -> None:
    """Fills y `[B, T, D]` from the unscaled inverse transform z `[D, B, n]`."""
    n = z.shape[2]
    pairs = torch.view_as_real(z)
    grid, sizes = _tiles(y.shape, y.shape[1], TILE_T, TILE_D)
    launch_real_part(
        grid, (pairs, y, y if end.u is None else end.u, pairs if end.bias is None else end.bias),
        (y.shape[1], y.shape[2], n, *sizes, math.pi / 2 / n, 1 / n, pairs.stride(1), pairs.stride(0), *y.stride()),
        **end.options(), BT=TILE_T,
        BD=TILE_D, num_warps=4,
    )  # fmt: skip
