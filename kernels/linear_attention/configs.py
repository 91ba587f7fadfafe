"""Blocks of the Triton kernels by shape: a small table measured on an H100 (`h100.json`), never a search at run time.

`benchmarks/linear_attention_blocks.py` measures it again. Widths between the table's take the next larger entry.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

# Programs that keep an H100 (132 multiprocessors) busy: with fewer, sequences are cut into segments until there are
# about as many as the table's "programs" says. Cutting costs one more pass over two inputs, so it must gain more than a
# quarter.
ENOUGH_PROGRAMS = 96
TARGET_PROGRAMS = 256
SHORTEST_SEGMENT = 1024
SEGMENT_MULTIPLE = 256


NONE, STATIC, PER_TOKEN = 0, 1, 2  # kinds of decay
DECAYS = ("none", "static", "token")

# Kinds of calls whose arguments were found right, to their launch (`launch.Whole`), which depends on the table below.
passed: dict[tuple, Any] = {}
LARGEST_PASSED = 1024


class Blocks(NamedTuple):
    """chunk: tokens a step. columns: of the output, for each program. warps and stages: as Triton has them. registers:
    of a thread at most, where more programs on a multiprocessor are worth it."""

    chunk: int
    columns: int
    warps: int
    stages: int
    registers: int | None = None


class Row(NamedTuple):
    """Blocks of one pass and width, for calls with at least this many (segment, head) pairs."""

    least: int
    blocks: Blocks


@functools.cache
def _file() -> dict:
    return json.loads((Path(__file__).parent / "h100.json").read_text())


@functools.cache
def _table() -> dict[tuple[str, int, int], list[Row]]:
    table: dict[tuple[str, int, int], list[Row]] = {}
    for row in _file()["blocks"]:
        blocks = Blocks(row["chunk"], row["columns"], row["warps"], row["stages"], row.get("registers"))
        table.setdefault((row["pass"], row["width"], DECAYS.index(row["decay"])), []).append(Row(row["least"], blocks))
    return table


def width_entry(width: int) -> int:
    """The width of the table that serves `width`."""
    return min(w for w in (32, 64, 128, 256) if w >= width)


@functools.cache
def _rows(kernel: str, width: int, element_size: int, decay: int) -> list[Row]:
    """fp32 products run on the ordinary cores, from shared memory: small chunks, one stage."""
    if element_size == 4:
        return [Row(0, Blocks(32 if width <= 128 else 16, 32, 4, 1))]
    return sorted(_table()[kernel, width_entry(width), decay])


def blocks_for(kernel: str, key_width: int, value_width: int, element_size: int, decay: int, pairs: int = 0) -> Blocks:
    """Blocks of `kernel` (a pass in the table) for these widths and this many (segment, head) pairs.

    `pairs` may be symbolic, as when `torch.compile` traces with dynamic shapes: it is only compared.
    """
    rows = _rows(kernel, max(key_width, value_width), element_size, decay)
    for row in reversed(rows):
        if row.least <= pairs:
            return row.blocks
    raise LookupError(f"no blocks of {kernel} for {pairs} pairs")


@functools.cache
def target_programs(width: int, decay: int) -> int:
    """Programs that the cut into segments aims at: 128 walk as fast as 256 where a program's bandwidth suffices."""
    return _file()["programs"].get(f"{width_entry(width)} {DECAYS[decay]}", TARGET_PROGRAMS)


def segment_size(rows: int, heads: int, time: int, columns: int, target: int = TARGET_PROGRAMS) -> int:
    """Tokens a segment; `time` where the sequences are enough to fill the card, or too short to be cut."""
    programs = rows * heads * columns
    if programs >= ENOUGH_PROGRAMS or time < 2 * SHORTEST_SEGMENT:
        return time
    pieces = min(-(-target // programs), time // SHORTEST_SEGMENT)
    size = -(-time // pieces)
    return -(-size // SEGMENT_MULTIPLE) * SEGMENT_MULTIPLE


def fits_one_program(width: int, dtype: torch.dtype) -> bool:
    """Whether one program can do both passes of a bidirectional sequence: its states must fit the shared memory.

    bf16 states are read in bf16, fp16 and fp32 ones in fp32.
    """
    return width <= (128 if dtype == torch.bfloat16 else 64)


def bidirectional_segment_size(rows: int, heads: int, time: int, width: int) -> int:
    """As `segment_size`: here cutting costs no second look at an input, only two more launches."""
    programs = rows * heads
    target = TARGET_PROGRAMS if width <= 64 else TARGET_PROGRAMS // 2
    if programs >= target or time < 2 * SHORTEST_SEGMENT:
        return time
    size = -(-time // min(-(-target // programs), time // SHORTEST_SEGMENT))
    return -(-size // SEGMENT_MULTIPLE) * SEGMENT_MULTIPLE
