"""Blocks and algorithm of the long convolution by shape: fixed, measured on one H100, never searched for at run time.

The trials behind each choice are in `benchmarks/NOTES-long_conv.md`, the outcome is in
`benchmarks/results/long_conv_h100.json`; `benchmarks/long_conv.py` measures it again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from chela_plugin.kernels.backend import precision

# Taps that meet a token, on average, from which an FFT is the faster. A Toeplitz product's time grows with them, an
# FFT's does not. (forward, backward): the backward pass has two Toeplitz products, of which the taps' is the slower,
# against three transforms and two back.
FFT_FROM = {"16 bits": (4600, 2300), "tf32": (880, 350), "ieee": (80, 60)}

# Channels are transformed in slabs whose spectra take this much, so that memory does not grow with the batch. From
# 32,768 points on half as much is faster (it stays in the L2 cache); below, its many launches keep the host busy.
SLAB_BYTES = 1 << 26
# The same for the Toeplitz product's copies of x, of which it holds two at a time.
CHUNK_BYTES = 1 << 25


def slab_bytes(points: int) -> int:
    return SLAB_BYTES if points < 32768 else SLAB_BYTES // 2


class Blocks(NamedTuple):
    """chunk: tokens a chunk. columns: chunks a program. step: tokens a step. warps and stages: as Triton has them."""

    chunk: int
    columns: int
    step: int
    warps: int
    stages: int


class LagBlocks(NamedTuple):
    """block: lags a block, at most a chunk. rows: chunks a step. registers: at most, for each thread, or None."""

    block: int
    rows: int
    warps: int
    stages: int
    registers: int | None


def arithmetic(dtype: torch.dtype) -> str:
    return precision(dtype) if dtype == torch.float32 else "16 bits"


def blocks_for(batch: int, tokens: int, dtype: torch.dtype) -> Blocks:
    """Blocks of `toeplitz`. fp32 without tf32 runs on the ordinary cores, from shared memory: one stage.

    Where the chunks of all sequences are few, they are made smaller and fewer go to a program: a tile that is not full
    is computed all the same, and tiles that end early in a sequence have shorter sums.
    """
    kind = arithmetic(dtype)
    large = tokens > 128 and batch * tokens >= 128 * 128 and kind != "ieee"
    chunk = 128 if large else 64
    columns = 1 << (batch * -(-tokens // chunk) // 4).bit_length()
    if kind == "ieee":
        return Blocks(chunk, min(max(columns, 32), 64), 32, 4, 1)
    if kind == "tf32":
        return Blocks(chunk, min(max(columns, 32), 64), 32, 4, 3)
    return Blocks(chunk, min(max(columns, 32), 128), 64, 4, 3)


def lag_blocks_for(dtype: torch.dtype) -> LagBlocks:
    """Blocks of `lag_products`. At 128 registers a fourth program fits on a multiprocessor."""
    return {
        "ieee": LagBlocks(32, 32, 4, 1, None),
        "tf32": LagBlocks(64, 32, 4, 2, None),
        "16 bits": LagBlocks(64, 64, 4, 2, 128),
    }[arithmetic(dtype)]


def average_lags(tokens: int, first_lag: int, last_lag: int) -> float:
    """Taps that meet a token, averaged over all tokens: a lag of m finds T - |m| of the T tokens."""
    ahead, behind = last_lag + 1, -first_lag
    return ahead + behind - (ahead * (ahead - 1) + behind * (behind + 1)) / (2 * tokens)


def algorithm(tokens: int, first_lag: int, last_lag: int, dtype: torch.dtype, *, backward: bool) -> str:
    """'toeplitz' or 'fft'."""
    lags = average_lags(tokens, first_lag, last_lag)
    return "fft" if lags >= FFT_FROM[arithmetic(dtype)][backward] else "toeplitz"


class ModalBlocks(NamedTuple):
    """chunk: tokens a chunk. columns: segments times channels a program. warps and stages: as Triton has them. fetch:
    whether a chunk is loaded while the one before it is multiplied. registers: at most, for each thread, or None."""

    chunk: int
    columns: int
    warps: int
    stages: int
    fetch: bool = False
    registers: int | None = None


def modal_blocks_for(dtype: torch.dtype, part: str, short: bool = False, places: int = 16) -> ModalBlocks:
    """Blocks of the kernels in `triton_modal.py`; part: 'ends', 'scan' or 'sums'; short: with short taps; places: of a
    state, two a mode.

    All share one chunk. The larger a state, the fewer registers are left to fetch ahead, or to a fourth program on a
    multiprocessor: with more than 8 modes both would spill."""
    if arithmetic(dtype) == "ieee":  # the ordinary cores multiply from shared memory
        return ModalBlocks(64, 64, 4 if part == "ends" else 8, 1)
    if part == "ends":
        return ModalBlocks(64, 64, 4, 2)
    # In tf32 a scan of 64 columns read shared memory before it was fenced, as compiled by Triton 3.6.
    narrow = part == "scan" and arithmetic(dtype) == "tf32"
    if part == "scan" and not short:
        return ModalBlocks(64, 32 if narrow else 64, 4, 1, False, 128 if places <= 16 and not narrow else None)
    return ModalBlocks(64, 32 if narrow else 64, 4, 1, places <= (16 if part == "scan" else 32))


# Of `short_sums`: channels and warps a program, parts that a segment is cut into.
SHORT_CHANNELS, SHORT_WARPS, SHORT_PARTS = 64, 4, 4
# Of `modal_gradient`: shares on their way, warps, and columns of the short taps' shares that a program sums up.
GRADIENT_STAGES, GRADIENT_WARPS, SHORT_COLUMNS = 3, 8, 128


def modal_segment_size(batch: int, tokens: int, filters: int) -> int:
    """Tokens of a segment, a multiple of the chunk: whole rows where these fill the device, else as many as do.

    Segments cost one more pass over x for the states between them."""
    wanted = 2048 // max(filters, 1)  # programs of 4 segments each: 512, almost four on each of an H100's processors
    rows = max(batch, 1)
    if rows >= wanted // 2:
        return max(-(-tokens // 64) * 64, 64)
    size = tokens * rows // max(wanted, 1)
    return max(1 << max(size - 1, 0).bit_length(), 256)
