"""Launches of the modal filters' kernels. Nothing here looks at a value, so every call can go into a CUDA graph."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from chela_plugin.kernels.backend import ceil_div, next_power_of_2, precision

from . import triton_modal as kernels
from .configs import ModalBlocks, modal_blocks_for, modal_segment_size


class Plan(NamedTuple):
    """How tokens and channels fall to programs.

    rows: sequences. segments: in all, `per_row` a row where rows are equally long. size: tokens of a segment. places:
    where segments of packed sequences stand, `[4, segments]`: first token, tokens before it, tokens from it on,
    first slot of its chunks' states; or None.
    group: channels that share a filter. channels: channels a program (CB). blocks: programs side by side for a group.
    """

    rows: int
    segments: int
    per_row: int
    size: int
    places: Tensor | None
    group: int
    channels: int
    blocks: int
    Q: int
    SP: int

    @property
    def carries(self) -> bool:
        return self.segments != self.rows


def count_segments(batch: int, tokens: int, packed: int | None, groups: int, channels: int) -> tuple[int, int]:
    """(tokens a segment, segments); packed: how many sequences lie in the one row, or None."""
    size = modal_segment_size(batch if packed is None else 1, tokens, groups * channels_of(groups, channels)[1])
    if packed is None:
        return size, batch * ceil_div(tokens, size)
    return size, tokens // size + packed


def channels_of(groups: int, channels: int) -> tuple[int, int]:
    """Channels that a program takes of a group, and programs a group."""
    group = channels // groups
    width = min(16, next_power_of_2(group))
    return width, ceil_div(group, width)


def state_places(modes: int) -> int:
    return max(16, next_power_of_2(2 * modes))


def plan_for(x: Tensor, groups: int, modes: int, cu_seqlens: Tensor | None) -> Plan:
    batch, tokens, channels = x.shape
    packed = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    size, segments = count_segments(batch, tokens, packed, groups, channels)
    width, blocks = channels_of(groups, channels)
    per_row = ceil_div(tokens, size)
    places = None
    if cu_seqlens is not None:
        cuts = cu_seqlens.to(torch.int64)
        begin, length = cuts[:-1], cuts[1:] - cuts[:-1]
        count = (length + size - 1) // size
        end = count.cumsum(0)
        slot = torch.arange(segments, device=cuts.device)
        owner = torch.searchsorted(end, slot, right=True).clamp_max(length.shape[0] - 1)
        before = (slot - (end - count)[owner]) * size
        left = length[owner] - before
        # A slot behind the last sequence is a sequence of no tokens.
        # Slots of a sequence start at begin / chunk + its number: as many as its chunks need, whatever the lengths.
        chunk = modal_blocks_for(x.dtype, "forward").chunk
        states = begin[owner] // chunk + owner + before // chunk
        places = torch.stack([torch.where(left > 0, row, 0) for row in (begin[owner] + before, before, left, states)])
        per_row = segments
    rows = batch if packed is None else packed
    if packed is not None and size >= tokens:  # every sequence is one segment: slots beyond them stay empty
        rows = segments
    return Plan(
        rows, segments, per_row, size, places, channels // groups, width, blocks, groups * blocks, state_places(modes)
    )


class Filter(NamedTuple):
    """A modal filter and what stands around it, as `modal_conv` takes them."""

    log_time: Tensor
    frequency: Tensor
    residue: Tensor
    short: Tensor | None
    scale: Tensor | None
    bias: Tensor | None


class Matrices(NamedTuple):
    """taps `[G, C]` fp32, into and out `[G, 2, C, SP]` in x's dtype, turn `[G, 2, 2, SP]` fp32 (`triton_modal.py`)."""

    taps: Tensor
    into: Tensor
    out: Tensor
    turn: Tensor


def matrices(log_time: Tensor, frequency: Tensor, residue: Tensor, dtype: torch.dtype, plan: Plan, C: int) -> Matrices:
    groups, modes = log_time.shape
    wide: Any = {"dtype": torch.float32, "device": log_time.device}
    made = Matrices(
        torch.empty(groups, C, **wide),
        torch.empty(groups, 2, C, plan.SP, dtype=dtype, device=log_time.device),
        torch.empty(groups, 2, C, plan.SP, dtype=dtype, device=log_time.device),
        torch.empty(groups, 2, 2, plan.SP, **wide),
    )
    kernels.modal_matrices[(groups,)](log_time, frequency, residue, *made, modes, plan.size, C=C, SP=plan.SP)
    return made


def _common(x: Tensor, plan: Plan) -> tuple[int, ...]:
    """T, D, R, Q, segments, per_row, size, blocks, as every kernel over the tokens takes them."""
    return x.shape[1], x.shape[2], plan.group, plan.Q, plan.segments, plan.per_row, plan.size, plan.blocks


def _options(blocks: ModalBlocks, x: Tensor, plan: Plan) -> dict[str, Any]:
    return {
        "C": blocks.chunk, "SP": plan.SP, "CB": plan.channels, "N": blocks.columns, "PACKED": plan.places is not None,
        "PRECISION": precision(x.dtype), "STAGES": blocks.stages, "num_warps": blocks.warps,
    }  # fmt: skip


def _grid(blocks: ModalBlocks, plan: Plan) -> tuple[int]:
    return (plan.Q * ceil_div(plan.segments, blocks.columns // plan.channels),)


def _starts(x: Tensor, u: Tensor | None, into: Tensor, turn: Tensor, plan: Plan, reverse: bool) -> Tensor:
    """The states that segments start from, or with `reverse` the adjoint ones that they end with."""
    blocks = modal_blocks_for(x.dtype, "ends")
    ends = torch.empty(plan.segments, plan.Q, plan.channels, plan.SP, dtype=torch.float32, device=x.device)
    starts = torch.empty_like(ends)
    places = x if plan.places is None else plan.places
    other = x if u is None else u
    kernels.modal_ends[_grid(blocks, plan)](
        x, other, ends, into, turn, places, *_common(x, plan), *x.stride(), *other.stride(), SILU=u is not None,
        REVERSE=reverse, **_options(blocks, x, plan),
    )  # fmt: skip
    rows = 1 if plan.places is not None else plan.rows
    kernels.modal_carry[(plan.Q * rows,)](
        ends, starts, turn, places, plan.Q, plan.segments, plan.per_row, plan.blocks, SP=plan.SP, CB=plan.channels,
        REVERSE=reverse, PACKED=plan.places is not None, num_warps=1,
    )  # fmt: skip
    return starts


def forward(x: Tensor, f: Filter, cu_seqlens: Tensor | None, silu: bool, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, u, states)`; u is `[0]` unless saved with SiLU, states are unless saved."""
    log_time, frequency, residue, short, scale, bias = f
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    u = torch.empty(x.shape if save and silu else (0,), dtype=x.dtype, device=x.device)
    plan = plan_for(x, log_time.shape[0], log_time.shape[1], cu_seqlens)
    blocks = modal_blocks_for(x.dtype, "forward")
    states = saved_states(x, log_time, cu_seqlens) if save else x.new_empty(0)
    if x.numel() == 0:
        return y, u, states
    log_time, frequency, residue = log_time.contiguous(), frequency.contiguous(), residue.contiguous()
    m = matrices(log_time, frequency, residue, x.dtype, plan, blocks.chunk)
    starts = _starts(x, None, m.into, m.turn, plan, False) if plan.carries else None
    kernels.modal_forward[_grid(blocks, plan)](
        x, y, u, states, x if starts is None else starts, *m,
        *(x if t is None else t.contiguous() for t in (short, scale, bias)),
        x if plan.places is None else plan.places, *_common(x, plan), *x.stride(), *y.stride(),
        K=0 if short is None else short.shape[1], SCALE=scale is not None, BIAS=bias is not None, SILU=silu, SAVE=save,
        CARRY=starts is not None, **_options(blocks, x, plan),
    )  # fmt: skip
    return y, u, states


def saved_states(x: Tensor, log_time: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Room for the state at each chunk's start, in x's dtype. No branch on a size: a graph may leave T open."""
    batch, tokens, channels = x.shape
    groups, modes = log_time.shape
    chunk = modal_blocks_for(x.dtype, "forward").chunk
    slots = batch * ceil_div(tokens, chunk) if cu_seqlens is None else tokens // chunk + cu_seqlens.shape[0]
    width, blocks = channels_of(groups, channels)
    return x.new_empty(slots, groups * blocks, width, state_places(modes))


def backward(
    dy: Tensor,
    x: Tensor,
    u: Tensor,
    states: Tensor,
    f: Filter,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x and of each tensor of the filter; None for what was not given."""
    log_time, frequency, residue, short, scale, bias = f
    groups, modes = log_time.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        zeros = [None if t is None else torch.zeros_like(t) for t in (short, scale, bias)]
        poles = torch.zeros_like(log_time), torch.zeros_like(frequency), torch.zeros_like(residue)
        return dx, *poles, zeros[0], zeros[1], zeros[2]
    plan = plan_for(x, groups, modes, cu_seqlens)
    blocks = modal_blocks_for(x.dtype, "backward")
    log_time, frequency, residue = log_time.contiguous(), frequency.contiguous(), residue.contiguous()
    m = matrices(log_time, frequency, residue, x.dtype, plan, blocks.chunk)
    before = u if silu else None
    starts = _starts(dy, before, m.out, m.turn, plan, True) if plan.carries else None
    grid = _grid(blocks, plan)
    wide: Any = {"dtype": torch.float32, "device": x.device}
    C, K = blocks.chunk, 0 if short is None else short.shape[1]
    shares = [torch.empty(grid[0], *shape, **wide) for shape in ((C, C), (C, plan.SP), (C, plan.SP), (2, plan.SP))]
    channel = torch.empty((K + 2) * plan.segments, x.shape[2], **wide)
    other = x if before is None else before
    kernels.modal_backward[grid](
        dy, x, other, states, x if starts is None else starts, dx, *m,
        *(x if t is None else t.contiguous() for t in (short, scale)), x if plan.places is None else plan.places,
        *shares, channel, *_common(x, plan), *dy.stride(), *x.stride(), *other.stride(), *dx.stride(), K=K,
        SCALE=scale is not None, SILU=silu, CARRY=starts is not None, **_options(blocks, x, plan),
    )  # fmt: skip
    poles = torch.empty_like(log_time), torch.empty_like(frequency), torch.empty_like(residue)
    kernels.modal_gradient[(groups,)](
        *shares, log_time, frequency, residue, *poles, modes, plan.Q, grid[0] // plan.Q, plan.blocks, C=C, SP=plan.SP
    )
    per_tap, per_channel = channel[: K * plan.segments], channel[K * plan.segments :].view(2, plan.segments, -1)
    dshort = None if short is None else per_tap.view(plan.segments, -1, K).sum(0).to(short.dtype)
    dscale = None if scale is None else per_channel[0].sum(0).to(scale.dtype)
    return dx, *poles, dshort, dscale, None if bias is None else per_channel[1].sum(0).to(bias.dtype)
