"""Launches of the modal filters' kernels. Nothing here looks at a value, so every call can go into a CUDA graph."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from chela_plugin.kernels.backend import ceil_div, next_power_of_2, precision
from chela_plugin.kernels.launching import Launcher

from . import configs
from . import triton_modal as kernels
from .configs import ModalBlocks, modal_blocks_for, modal_segment_size

launch_matrices, launch_ends, launch_carry = (
    Launcher(kernel) for kernel in (kernels.modal_matrices, kernels.modal_ends, kernels.modal_carry)
)
launch_scan, launch_sums = Launcher(kernels.modal_scan), Launcher(kernels.modal_sums)
launch_gradient, launch_short_sums = Launcher(kernels.modal_gradient), Launcher(kernels.short_sums)


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
        chunk = modal_blocks_for(x.dtype, "scan").chunk
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


class View(NamedTuple):
    """A tensor's first token in the order of a scan, and its strides; those of time are negative in reverse order."""

    start: Tensor
    strides: tuple[int, ...]


def view_of(x: Tensor, flipped: bool) -> View:
    if not flipped:
        return View(x, x.stride())
    batch, tokens, channels = x.stride()
    return View(x[:, -1:], (batch, -tokens, channels))


def matrices(f: Filter, dtype: torch.dtype, plan: Plan, strict: bool = False) -> Matrices:
    log_time, frequency, residue = (t.contiguous() for t in f[:3])
    groups, modes = log_time.shape
    C = modal_blocks_for(dtype, "scan").chunk
    wide: Any = {"dtype": torch.float32, "device": log_time.device}
    made = Matrices(
        torch.empty(groups, C, **wide),
        torch.empty(groups, 2, C, plan.SP, dtype=dtype, device=log_time.device),
        torch.empty(groups, 2, C, plan.SP, dtype=dtype, device=log_time.device),
        torch.empty(groups, 2, 2, plan.SP, **wide),
    )
    launch_matrices(
        (groups,), (log_time, frequency, residue, *made), (modes, plan.size), C=C, SP=plan.SP, STRICT=strict,
        num_warps=8,
    )  # fmt: skip
    return made


def _common(x: Tensor, plan: Plan) -> tuple[int, ...]:
    """T, D, R, Q, segments, per_row, size, blocks, as every kernel over the tokens takes them."""
    return x.shape[1], x.shape[2], plan.group, plan.Q, plan.segments, plan.per_row, plan.size, plan.blocks


def _row(strides: tuple[int, ...], x: Tensor) -> int:
    """The stride of time where it is the width, forwards or backwards, to be compiled in; otherwise 0."""
    return strides[1] if abs(strides[1]) == x.shape[2] else 0


def _options(blocks: ModalBlocks, x: Tensor, plan: Plan) -> dict[str, Any]:
    return {
        "C": blocks.chunk, "SP": plan.SP, "CB": plan.channels, "N": blocks.columns, "PACKED": plan.places is not None,
        "PRECISION": precision(x.dtype), "STAGES": blocks.stages, "num_warps": blocks.warps,
    }  # fmt: skip


def _grid(blocks: ModalBlocks, plan: Plan) -> tuple[int]:
    return (plan.Q * ceil_div(plan.segments, blocks.columns // plan.channels),)


def _starts(x: Tensor, flipped: bool, into: Tensor, turn: Tensor, plan: Plan, reverse: bool) -> Tensor:
    """The states that segments start from, or with `reverse` the adjoint ones that they end with."""
    blocks = modal_blocks_for(x.dtype, "ends")
    ends = torch.empty(plan.segments, plan.Q, plan.channels, plan.SP, dtype=torch.float32, device=x.device)
    starts = torch.empty_like(ends)
    places = x if plan.places is None else plan.places
    start, strides = view_of(x, flipped)
    launch_ends(
        _grid(blocks, plan), (start, ends, into, turn, places), (*_common(x, plan), *strides), REVERSE=reverse,
        **_options(blocks, x, plan),
    )  # fmt: skip
    rows = 1 if plan.places is not None else plan.rows
    launch_carry(
        (plan.Q * rows,), (ends, starts, turn, places), (plan.Q, plan.segments, plan.per_row, plan.blocks),
        SP=plan.SP, CB=plan.channels, REVERSE=reverse, PACKED=plan.places is not None, SIDE=min(plan.per_row, 4),
        num_warps=1,
    )  # fmt: skip
    return starts


def _scan(
    x: Tensor, y: Tensor, u: Tensor, states: Tensor, m: Matrices, f: Filter, plan: Plan, *, silu: bool, save: bool,
    reverse: bool = False, flipped: bool = False, ahead: int = 0, add: Tensor | None = None,
    dscale: Tensor | None = None,
) -> None:  # fmt: skip
    """Fills y, and with `save` u and states; with `reverse` the transpose of the filter, without bias and SiLU, and
    where there is a scale `dscale` `[D, segments]` from u, what the filter met.

    flipped: over the tokens in reverse order. ahead: short taps in front of lag 0. add: a summand of u, laid out as y.
    """
    blocks = modal_blocks_for(x.dtype, "scan", f.short is not None, plan.SP)
    into, out = (m.out, m.into) if reverse else (m.into, m.out)
    starts = _starts(x, flipped, into, m.turn, plan, reverse) if plan.carries else None
    x_start, x_strides = view_of(x, flipped)
    y_start, y_strides = view_of(y, flipped)
    others = (view_of(t, flipped).start if t is not None and t.numel() else y_start for t in (u, add))
    launch_scan(
        _grid(blocks, plan),
        (x_start, y_start, *others, states, x if starts is None else starts, m.taps, into, out, m.turn,
         *(x if t is None else t.contiguous() for t in (f.short, f.scale, f.bias)),
         states if dscale is None else dscale, x if plan.places is None else plan.places),
        (*_common(x, plan), *x_strides, *y_strides),
        K=0 if f.short is None else f.short.shape[1], AHEAD=ahead, ADD=add is not None, SCALE=f.scale is not None,
        BIAS=f.bias is not None and not reverse, SILU=silu, SAVE=save, CARRY=starts is not None, REVERSE=reverse,
        FETCH=blocks.fetch, X_T=_row(x_strides, x), Y_T=_row(y_strides, x), maxnreg=blocks.registers,
        **_options(blocks, x, plan),
    )  # fmt: skip


class Side(NamedTuple):
    """One scan: over lags from 0 on, or, flipped, over those below 0."""

    filter: Filter
    plan: Plan
    matrices: Matrices
    flipped: bool


def sides_of(x: Tensor, f: Filter, cu_seqlens: Tensor | None, causal: bool) -> list[Side]:
    """The scans of a filter. Of a two-sided one the first has the short taps, the last the bias."""
    modes = f.log_time.shape[1]
    sides: list[Side] = []
    for flipped in (False,) if causal else (False, True):
        time, turn, c = (t if causal else t.chunk(2)[flipped] for t in f[:3])
        cuts = x.shape[1] - cu_seqlens.flip(0) if flipped and cu_seqlens is not None else cu_seqlens
        plan = sides[0].plan if sides and cuts is None else plan_for(x, time.shape[0], modes, cuts)
        part = Filter(time, turn, c, None if flipped else f.short, f.scale, f.bias if causal or flipped else None)
        sides.append(Side(part, plan, matrices(part, x.dtype, plan, strict=flipped), flipped))
    return sides


def taps_ahead(f: Filter, causal: bool) -> int:
    return 0 if causal or f.short is None else f.short.shape[1] // 2


def forward(
    x: Tensor, f: Filter, cu_seqlens: Tensor | None, silu: bool, causal: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor, list[Side]]:
    """`(y, u, states, what the backward pass need not find again)`; u and states are `[0]` unless saved."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    u = torch.empty(x.shape if save and silu else (0,), dtype=x.dtype, device=x.device)
    states = saved_states(x, f.log_time, cu_seqlens, causal) if save else x.new_empty(0)
    if x.numel() == 0:
        return y, u, states, []
    sides = sides_of(x, f, cu_seqlens, causal)
    before: Tensor | None = None
    for side, kept in zip(sides, states.chunk(len(sides)) if save else sides, strict=True):
        last = side is sides[-1]
        found = y if last else torch.empty(x.shape, dtype=torch.float32, device=x.device)
        _scan(
            x, found, u if last else found, kept if isinstance(kept, Tensor) else states, side.matrices, side.filter,
            side.plan, silu=silu and last, save=save, flipped=side.flipped, ahead=taps_ahead(f, causal), add=before,
        )  # fmt: skip
        before = found
    return y, u, states, sides


def saved_states(x: Tensor, log_time: Tensor, cu_seqlens: Tensor | None, causal: bool) -> Tensor:
    """Room for the state at each chunk's start, in x's dtype. No branch on a size: a graph may leave T open."""
    batch, tokens, channels = x.shape
    rows, modes = log_time.shape
    sides = 1 if causal else 2
    chunk = modal_blocks_for(x.dtype, "scan").chunk
    slots = batch * ceil_div(tokens, chunk) if cu_seqlens is None else tokens // chunk + cu_seqlens.shape[0]
    width, blocks = channels_of(rows // sides, channels)
    return x.new_empty(sides * slots, rows // sides * blocks, width, state_places(modes))


def backward(
    dy: Tensor,
    x: Tensor,
    u: Tensor,
    states: Tensor,
    f: Filter,
    cu_seqlens: Tensor | None,
    silu: bool,
    causal: bool,
    sides: list[Side] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x and of each tensor of the filter, in their dtypes; None for what was not given.

    But the scale's in shares `[D, n]`, fp32, still to be summed; short taps' and bias' are views of one tensor."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        zeros = [None if t is None else torch.zeros_like(t) for t in (f.short, f.bias)]
        poles = torch.zeros_like(f.log_time), torch.zeros_like(f.frequency), torch.zeros_like(f.residue)
        return dx, *poles, zeros[0], None if f.scale is None else x.new_zeros(x.shape[2], 1), zeros[1]
    sides = sides or sides_of(x, f, cu_seqlens, causal)
    ahead = taps_ahead(f, causal)
    du, short_shares = _short_sums(dy, x, u, f, sides[0].plan, silu, ahead)
    short_sums = x.new_empty(short_shares.shape[1], dtype=torch.float32)
    like: Any = {"memory_format": torch.contiguous_format}
    dtime, dturn, dc = (torch.empty_like(t, **like) for t in f[:3])
    before: Tensor | None = None
    met = x.contiguous()
    segments = sides[0].plan.segments
    shares = (
        None if f.scale is None else torch.empty(len(sides), x.shape[2], segments, dtype=torch.float32, device=x.device)
    )
    for i, (side, kept) in enumerate(zip(sides, states.chunk(len(sides)), strict=True)):
        found = dx if side is sides[-1] else torch.empty(x.shape, dtype=torch.float32, device=x.device)
        adjoints = torch.empty_like(kept)
        _scan(
            du, found, met, adjoints, side.matrices, side.filter, side.plan, silu=False, save=True, reverse=True,
            flipped=side.flipped, ahead=ahead, add=before, dscale=None if shares is None else shares[i],
        )  # fmt: skip
        before = found
        of_side = [t.chunk(len(sides))[i] for t in (dtime, dturn, dc)]
        _filter_sums(du, met, kept, adjoints, side, of_side, short_shares[: 0 if i else None], short_sums)
    taps = 0 if f.short is None else f.short.numel()
    dshort = None if f.short is None else short_sums[:taps].view(f.short.shape).to(f.short.dtype)
    dbias = None if f.bias is None else short_sums[taps:].to(f.bias.dtype)
    dscale = None if shares is None else shares[0] if causal else torch.cat(list(shares), 1)
    return dx, dtime, dturn, dc, dshort, dscale, dbias


def _filter_sums(
    du: Tensor,
    x: Tensor,
    states: Tensor,
    adjoints: Tensor,
    side: Side,
    poles: list[Tensor],
    short_shares: Tensor,
    short_sums: Tensor,
) -> None:
    """Fills `poles` with the gradients of log_time, frequency and residue, and `short_sums`, if there are shares."""
    f, plan, _, flipped = side
    blocks = modal_blocks_for(x.dtype, "sums", False, plan.SP)
    grid = _grid(blocks, plan)
    wide: Any = {"dtype": torch.float32, "device": x.device}
    C = blocks.chunk
    shares = [torch.empty(grid[0], *shape, **wide) for shape in ((C, C), (C, plan.SP), (C, plan.SP), (2, plan.SP))]
    (du_start, du_strides), (x_start, x_strides) = view_of(du, flipped), view_of(x, flipped)
    launch_sums(
        grid,
        (du_start, x_start, states, adjoints, x if f.scale is None else f.scale.contiguous(),
         x if plan.places is None else plan.places, *shares),
        (*_common(x, plan), *du_strides, *x_strides),
        SCALE=f.scale is not None, FETCH=blocks.fetch, X_T=_row(x_strides, x), G_T=_row(du_strides, x),
        maxnreg=blocks.registers, **_options(blocks, x, plan),
    )  # fmt: skip
    groups, modes = f.log_time.shape
    rows, columns = short_shares.shape
    launch_gradient(
        (groups + (ceil_div(columns, configs.SHORT_COLUMNS) if rows else 0),),
        (*shares, *(t.contiguous() for t in f[:3]), *poles, short_shares, short_sums),
        (modes, plan.Q, grid[0] // plan.Q, plan.blocks, groups, rows, columns), C=C, SP=plan.SP, STRICT=flipped,
        STAGES=configs.GRADIENT_STAGES, BLOCK=configs.SHORT_COLUMNS, num_warps=configs.GRADIENT_WARPS,
    )  # fmt: skip


def _short_sums(
    dy: Tensor, x: Tensor, u: Tensor, f: Filter, plan: Plan, silu: bool, ahead: int = 0
) -> tuple[Tensor, Tensor]:
    """dy behind SiLU(u), and shares `[n, D K + D]` of the gradients of the short taps and the bias; n may be 0."""
    if not silu and f.short is None and f.bias is None:
        return dy, x.new_empty(0, 0, dtype=torch.float32)
    channels, K = x.shape[2], 0 if f.short is None else f.short.shape[1]
    before = u if silu else dy
    du = torch.empty_like(u) if silu else dy
    d_blocks = ceil_div(channels, configs.SHORT_CHANNELS)
    shares = torch.empty(plan.segments * configs.SHORT_PARTS, channels * (K + 1), dtype=torch.float32, device=x.device)
    launch_short_sums(
        (plan.segments * configs.SHORT_PARTS * d_blocks,),
        (dy, before, x, du, x if plan.places is None else plan.places, shares),
        (x.shape[1], channels, plan.segments, plan.per_row, plan.size, d_blocks, *dy.stride(), *before.stride(),
         *x.stride()),
        C=64, K=K, AHEAD=ahead, PARTS=configs.SHORT_PARTS, SILU=silu, PACKED=plan.places is not None,
        BD=configs.SHORT_CHANNELS, X_T=_row(x.stride(), x), G_T=_row(dy.stride(), x), U_T=_row(before.stride(), x),
        num_warps=configs.SHORT_WARPS,
    )  # fmt: skip
    return du, shares
