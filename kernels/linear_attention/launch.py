"""Launches of the Triton kernels: how a call is cut into segments, which blocks it takes, what it allocates.

Nothing here looks at a tensor's values or waits for the device, so every launch can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from chela_plugin.kernels.backend import precision
from chela_plugin.kernels.launching import Launcher, Prepared

from . import triton as causal
from . import triton_bidirectional as both
from .configs import (
    NONE,
    PER_TOKEN,
    STATIC,
    Blocks,
    bidirectional_segment_size,
    blocks_for,
    fits_one_program,
    passed,
    segment_size,
    target_programs,
)

segment_table, cumulative_decay = Launcher(causal.segment_table), Launcher(causal.cumulative_decay)
forward_walk, backward_walk = Launcher(causal.forward), Launcher(causal.backward)
gather, scan = Launcher(causal.gather), Launcher(causal.scan)
decay_gradient, step_kernel = Launcher(causal.decay_gradient), Launcher(causal.step)
both_forward, both_backward = Launcher(both.forward), Launcher(both.backward)
read_forward, read_backward = Launcher(both.read_forward), Launcher(both.read_backward)

SCAN_BLOCK = 1024
DECAY_TILE = 1024
STEP_COLUMNS = 32


class Cut(NamedTuple):
    """How the tokens of a call fall into segments.

    rows: sequences. segments: in all. size: tokens of the longest segment allowed. per_row: segments of one row, where
    all rows are equally long. cuts: what tells the kernels (cu_seqlens, or the table of segments), or None.
    owner: `[segments]` the sequence of each. first: `[rows + 1]` the first segment of each sequence.
    """

    rows: int
    segments: int
    size: int
    per_row: int
    cuts: Tensor | None
    owner: Tensor | None
    first: Tensor | None

    @property
    def two_levels(self) -> bool:
        return self.segments != self.rows

    @property
    def table(self) -> bool:
        return self.owner is not None


def count_segments(q: Tensor, cu_seqlens: Tensor | None, size: int) -> int:
    """Segments in all. Packed sequences have their lengths on the device: there it is as many as there can be."""
    batch, time = q.shape[:2]
    if cu_seqlens is None:
        return batch * _blocks(time, size)
    rows = cu_seqlens.shape[0] - 1
    return rows if size >= time else time // size + rows


def cut(q: Tensor, cu_seqlens: Tensor | None, size: int) -> Cut:
    """Cut every sequence into segments of `size` tokens; `size >= T` leaves them whole."""
    batch, time = q.shape[:2]
    segments = count_segments(q, cu_seqlens, size)
    size = min(size, time)
    if cu_seqlens is None:
        return Cut(batch, segments, size, segments // batch, None, None, None)
    rows = cu_seqlens.shape[0] - 1
    if segments == rows:
        return Cut(rows, rows, size, 1, cu_seqlens.contiguous(), None, None)
    table = torch.zeros(segments, 2, dtype=torch.int64, device=q.device)
    owner = torch.zeros(segments, dtype=torch.int32, device=q.device)
    first = torch.empty(rows + 1, dtype=torch.int64, device=q.device)
    segment_table(
        (rows,), (cu_seqlens.contiguous(), table, owner, first), (rows, time, size, segments), BLOCK=256
    )  # fmt: skip
    return Cut(rows, segments, size, 1, table, owner, first)


def causal_segment_size(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, decay: int) -> int:
    """Segment size of the causal kernels, one for both passes: backward starts from the states of forward."""
    batch, time, heads = q.shape[:3]
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    # The sizes may be symbolic here, which a cache can't take.
    plain = _forward_blocks.__wrapped__
    return plain(rows, time, heads, int(q.shape[3]), int(v.shape[3]), q.element_size(), decay)[2]


@functools.lru_cache(4096)
def _forward_blocks(
    rows: int, time: int, heads: int, K: int, V: int, element_size: int, decay: int
) -> tuple[Blocks, int, int]:
    """Blocks of the forward pass, its columns a program, and the segment size. Cached: a third of a small call."""
    blocks = blocks_for("forward", K, V, element_size, decay, rows * heads)
    columns = min(blocks.columns, width_block(V))
    target = target_programs(max(K, V), decay)
    return blocks, columns, segment_size(rows, heads, time, _blocks(V, columns), target)


def addressable(stride: tuple[int, ...], element_size: int) -> bool:
    b, t, h, w = stride
    row = 16 // element_size
    return w == 1 and t > 0 and t % row == 0 and h % row == 0 and b % row == 0


def tiled(x: Tensor) -> Tensor:
    """`x` if a tensor descriptor can address it as it lies, else a copy that it can.

    The last dim must be dense, and the address and every other stride multiples of 16 bytes.
    """
    if addressable(x.stride(), x.element_size()) and x.data_ptr() % 16 == 0:
        return x
    return x.clone() if x.is_contiguous() else x.contiguous()


@functools.cache
def width_block(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


class Decay(NamedTuple):
    """The decay as kernels take it. kind: none, static, per token. g: running sums by chunk, `[H, stride]`, base 2."""

    kind: int
    log_decay: Tensor
    g: Tensor
    stride: int


def kind_of(log_decay: Tensor | None) -> int:
    return NONE if log_decay is None else STATIC if log_decay.dim() == 1 else PER_TOKEN


def decay_of(log_decay: Tensor | None, q: Tensor, plan: Cut, chunk: int) -> Decay:
    if log_decay is None:
        return Decay(NONE, q, q, 0)
    if log_decay.dim() == 1:
        return Decay(STATIC, log_decay.contiguous(), q, 0)
    batch, time, heads = log_decay.shape
    stride = (_blocks(batch * time, chunk) + plan.segments) * chunk
    g = torch.empty(heads, stride, dtype=torch.float32, device=q.device)
    cumulative_decay(
        (plan.segments * _blocks(plan.size, chunk),), (log_decay, g, _or(plan.cuts, q)),
        (time, heads, plan.size, plan.per_row, *log_decay.stride(), stride),
        VARLEN=plan.cuts is not None, TABLE=plan.table, BT=chunk, BH=min(16, width_block(heads)), num_warps=4,
    )  # fmt: skip
    return Decay(PER_TOKEN, log_decay, g, stride)


class Whole(NamedTuple):
    """A forward pass over whole sequences of one kind. run: `(q, k, v, log_decay, initial_state)` to `(o, final state
    or None)`, or to None where a tensor doesn't lie as a launch expects it. cuda: the device's number, -1 for a CPU."""

    run: Callable[..., tuple[Tensor, Tensor | None] | None]
    scale: float
    cuda: int


def whole(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    want_state: bool,
) -> Whole | None:
    """What is remembered of such calls, or None where their sequences are cut or lie as a descriptor can't address
    them. Tensors whose dtype is computed with, none of them packed."""
    return _whole(
        q.device, q.dtype, q.shape, v.shape[3], q.stride(), k.stride(), v.stride(),
        None if log_decay is None else (log_decay.dtype, log_decay.stride()),
        initial_state is not None, want_state, scale, precision(q.dtype),
    )  # fmt: skip


@functools.lru_cache(1024)
def _whole(
    device: torch.device,
    dtype: torch.dtype,
    shape: torch.Size,
    V: int,
    q_stride: tuple[int, ...],
    k_stride: tuple[int, ...],
    v_stride: tuple[int, ...],
    decays: tuple[torch.dtype, tuple[int, ...]] | None,
    carry: bool,
    ends: bool,
    scale: float,
    product: str,
) -> Whole | None:
    """Remembered: to find all this again is most of the host's time in a small call."""
    batch, time, heads, K = shape
    kind = NONE if decays is None else STATIC if len(decays[1]) == 1 else PER_TOKEN
    blocks, columns, size = _forward_blocks(batch, time, heads, K, V, dtype.itemsize, kind)
    if size < time or not all(addressable(stride, dtype.itemsize) for stride in (q_stride, k_stride, v_stride)):
        return None
    if kind == STATIC and decays is not None and decays[1] != (1,):
        return None
    chunks = _blocks(time, blocks.chunk)
    stride = 0 if kind != PER_TOKEN else (_blocks(batch * time, blocks.chunk) + batch) * blocks.chunk
    walk = forward_walk.prepared(
        (batch * heads * _blocks(V, columns),),
        (stride, scale, time, heads, time, 1, *q_stride[:3], *k_stride[:3], *v_stride[:3]),
        K=K, V=V, BK=width_block(K), BX=columns, BT=blocks.chunk, DECAY=kind, CARRY=carry, END=ends, VARLEN=False,
        TABLE=False, PRECISION=product, STAGES=blocks.stages, num_warps=blocks.warps, maxnreg=blocks.registers,
    )  # fmt: skip
    sums: Prepared | None = None
    if decays is not None and kind == PER_TOKEN:
        sums = cumulative_decay.prepared(
            (batch * chunks,), (time, heads, time, 1, *decays[1], stride),
            VARLEN=False, TABLE=False, BT=blocks.chunk, BH=min(16, width_block(heads)), num_warps=4,
        )  # fmt: skip

    def run(
        q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None
    ) -> tuple[Tensor, Tensor | None] | None:
        at_q, at_k, at_v = q.data_ptr(), k.data_ptr(), v.data_ptr()
        at_decay = at_q if log_decay is None else log_decay.data_ptr()
        at_first = at_q
        if initial_state is not None:
            if not initial_state.is_contiguous():
                return None
            at_first = initial_state.data_ptr()
        if (at_q | at_k | at_v | at_decay | at_first) & 15:
            return None
        # Sizes one by one: a torch.Size takes torch.empty a microsecond more.
        o = torch.empty(batch, time, heads, V, dtype=dtype, device=device)
        final = torch.empty(batch, heads, K, V, dtype=torch.float32, device=device) if ends else None
        decay = q if log_decay is None else log_decay
        g, at_g = q, at_q
        if sums is not None:
            g = torch.empty(heads, stride, dtype=torch.float32, device=device)
            at_g = g.data_ptr()
            if sums.form is None:
                sums((decay, g, q))
            else:
                sums.form((at_decay, at_g, at_q))
        if walk.form is None:
            walk((q, k, v, o, decay, g, _or(initial_state, q), _or(final, q), q))
        else:
            at_final = at_q if final is None else final.data_ptr()
            walk.form((at_q, at_k, at_v, o.data_ptr(), at_decay, at_g, at_first, at_final, at_q))
        return o, final

    return Whole(run, scale, -1 if device.index is None else device.index)


def forget_blocks() -> None:
    """For whoever changes the table or the cut: what was found by them is looked up again."""
    _forward_blocks.cache_clear()
    _whole.cache_clear()
    passed.clear()


def causal_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    want_state: bool,
    save: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`(o, final state or None, states at the segments' bounds for the backward pass or None)`."""
    if cu_seqlens is None:
        remembered = whole(q, k, v, log_decay, initial_state, scale, want_state)
        found = None if remembered is None else remembered.run(q, k, v, log_decay, initial_state)
        if found is not None:
            return *found, None
    kind = kind_of(log_decay)
    q, k, v = tiled(q), tiled(k), tiled(v)
    batch, time, heads, K = q.shape
    V = v.shape[3]
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    blocks, columns, size = _forward_blocks(rows, time, heads, K, V, q.element_size(), kind)
    plan = cut(q, cu_seqlens, size)
    decay = decay_of(log_decay, q, plan, blocks.chunk)
    initial_state = None if initial_state is None else initial_state.contiguous()
    final = _states(q, rows, heads, K, V) if want_state else None
    carry, ends, saved = initial_state, final, None
    if plan.two_levels:
        carry, _ = _segment_starts(k, v, plan, decay, blocks.chunk, initial_state, 1.0, final, 1.0, reverse=False)
        ends = _states(q, plan.segments, heads, K, V) if save and log_decay is None else None
        if save:
            saved = carry if ends is None else ends
    o = torch.empty(batch, time, heads, V, dtype=q.dtype, device=q.device)
    forward_walk(
        (plan.segments * heads * _blocks(V, columns),),
        (q, k, v, o, decay.log_decay, decay.g, _or(carry, q), _or(ends, q), _or(plan.cuts, q)),
        (decay.stride, scale, time, heads, plan.size, plan.per_row, *_strides(q, k, v)),
        K=K, V=V, BK=width_block(K), BX=columns, BT=blocks.chunk, DECAY=decay.kind, CARRY=carry is not None,
        END=ends is not None, VARLEN=plan.cuts is not None, TABLE=plan.table, PRECISION=precision(q.dtype),
        STAGES=blocks.stages, num_warps=blocks.warps, maxnreg=blocks.registers,
    )  # fmt: skip
    return o, final, saved


def causal_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    final: Tensor | None,
    saved: Tensor | None,
    do: Tensor,
    dfinal: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, log_decay and initial_state; None for what was not given."""
    q, k, v, do = tiled(q), tiled(k), tiled(v), tiled(do)
    batch, time, heads, K = q.shape
    V = v.shape[3]
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    plan = cut(q, cu_seqlens, _forward_blocks(rows, time, heads, K, V, q.element_size(), kind_of(log_decay))[2])
    blocks = blocks_for("backward", K, V, q.element_size(), kind_of(log_decay), plan.segments * heads)
    XK, XV = min(blocks.columns, width_block(K)), min(blocks.columns, width_block(V))
    decay = decay_of(log_decay, q, plan, blocks.chunk)
    initial_state = None if initial_state is None else initial_state.contiguous()
    dfinal = None if dfinal is None else dfinal.contiguous()
    dinitial = None if initial_state is None else _states(q, rows, heads, K, V)
    k_columns = _blocks(K, XK)
    per_token = decay.kind == PER_TOKEN
    inner = None  # <S, dS> at the segments' ends, `[parts, segments, H]`
    before: Tensor | None
    after: Tensor | None
    if plan.two_levels:
        before = saved
        after, inner = _segment_starts(
            q, do, plan, decay, blocks.chunk, dfinal, 1.0 / scale, dinitial, scale,
            reverse=True, before=saved if per_token else None, last=final,
        )  # fmt: skip
    else:
        before, after = (final if log_decay is None else initial_state), dfinal
        if dfinal is not None and per_token:
            assert final is not None
            inner = (final * dfinal).sum((-1, -2))[None]
    dq, dk = (torch.empty(batch, time, heads, K, dtype=q.dtype, device=q.device) for _ in "qk")
    dv = torch.empty(batch, time, heads, V, dtype=q.dtype, device=q.device)
    roles = 2 * k_columns if decay.kind else 0
    shape = (roles, heads, batch * time) if per_token else (plan.segments, roles, heads)
    dots = torch.empty(shape, dtype=torch.float32, device=q.device)
    grid = (plan.segments * heads * (2 * k_columns + _blocks(V, XV)),)
    backward_walk(
        grid,
        (q, k, v, do, dq, dk, dv, dots, decay.log_decay, decay.g, _or(before, dots), _or(after, dots),
         _or(dinitial, dots), _or(plan.cuts, q)),
        (batch * time, decay.stride, scale, time, heads, plan.size, plan.per_row, *_strides(q, k, v, do)),
        K=K, V=V, BK=width_block(K), BV=width_block(V), XK=XK, XV=XV, BT=blocks.chunk, DECAY=decay.kind,
        BEFORE=before is not None, AFTER=after is not None, END=initial_state is not None and not plan.two_levels,
        AFTER_SCALED=not plan.two_levels, VARLEN=plan.cuts is not None, TABLE=plan.table,
        PRECISION=precision(q.dtype), STAGES=blocks.stages, num_warps=blocks.warps, maxnreg=blocks.registers,
    )  # fmt: skip
    if log_decay is None:
        return dq, dk, dv, None, dinitial
    if not per_token:
        return dq, dk, dv, dots.sum((0, 1)).to(log_decay.dtype), dinitial
    ddecay = torch.empty(batch, time, heads, dtype=log_decay.dtype, device=q.device)
    decay_gradient(
        (plan.segments * heads,), (dots, _or(inner, dots), log_decay, ddecay, _or(plan.cuts, q)),
        (time, heads, plan.size, plan.per_row, batch * time, plan.segments, *log_decay.stride()),
        K_COLUMNS=k_columns, PARTS=0 if inner is None else inner.shape[0], BLOCK=DECAY_TILE,
        VARLEN=plan.cuts is not None, TABLE=plan.table, num_warps=4,
    )  # fmt: skip
    return dq, dk, dv, ddecay, dinitial


def _segment_starts(
    a: Tensor,
    b: Tensor,
    plan: Cut,
    decay: Decay,
    chunk: int,
    initial: Tensor | None,
    initial_scale: float,
    final: Tensor | None,
    final_scale: float,
    *,
    reverse: bool,
    before: Tensor | None = None,
    last: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The first two levels: the state that each segment starts from, `[segments, H, W, X]`, in time or against it.

    Writes the state behind the last segment, times final_scale, to `final`. With `before` (states of the forward pass
    at the segments' starts; `last` at the sequences' ends) also `<S, dS>` at the segments' ends,
    `[parts, segments, H]`.
    """
    time, heads, W = a.shape[1:]
    X = b.shape[3]
    blocks = blocks_for("gather", W, X, a.element_size(), decay.kind)
    columns = min(blocks.columns, width_block(X))
    states = _states(a, plan.segments, heads, W, X)
    totals = torch.empty(plan.segments, heads, dtype=torch.float32, device=a.device)
    gather(
        (plan.segments * heads * _blocks(X, columns),),
        (a, b, states, totals, decay.log_decay, decay.g, a, _or(plan.cuts, a)),
        (decay.stride, time, heads, plan.size, plan.per_row, *_strides(a, b)),
        W=W, X=X, BW=width_block(W), BX=columns, BT=chunk,
        DECAY=decay.kind, REVERSE=reverse, MASK=False, SKIP=final is None and not plan.table,
        VARLEN=plan.cuts is not None, TABLE=plan.table, PRECISION=precision(a.dtype), STAGES=blocks.stages,
        num_warps=blocks.warps,
    )  # fmt: skip
    parts = _blocks(W * X, SCAN_BLOCK)
    inner = None if before is None else totals.new_zeros(parts, plan.segments, heads)
    scan(
        (plan.rows * heads * parts,),
        (states, totals, _or(initial, states), _or(final, states), _or(plan.first, states), _or(before, states),
         _or(last, states), _or(inner, states)),
        (initial_scale, final_scale, 1.0 / initial_scale, heads, plan.per_row, plan.segments),
        SIZE=W * X, BLOCK=SCAN_BLOCK, DECAY=decay.kind != NONE, REVERSE=reverse,
        INITIAL=initial is not None, FINAL=final is not None, INNER=before is not None, TABLE=plan.table, num_warps=4,
    )  # fmt: skip
    return states, inner


def bidirectional_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    scale: float,
    want_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """`(o, state or None)`."""
    q, k, v = tiled(q), tiled(k), tiled(v)
    batch, time, heads, K = q.shape
    V = v.shape[3]
    blocks, plan, fused = _bidirectional_plan(q, v, cu_seqlens)
    initial_state = None if initial_state is None else initial_state.contiguous()
    state = _states(q, plan.rows, heads, K, V) if want_state or not fused else None
    o = torch.empty(batch, time, heads, V, dtype=q.dtype, device=q.device)
    if fused:
        both_forward(
            (plan.rows * heads,),
            (q, k, v, o, _or(state, q), _or(initial_state, q), _bytes(mask, q), _or(plan.cuts, q)),
            (scale, time, heads, *_strides(q, k, v)), K=K, V=V, BK=width_block(K), BV=width_block(V),
            BT=blocks.chunk, INITIAL=initial_state is not None, END=want_state, MASK=mask is not None,
            VARLEN=plan.cuts is not None, PRECISION=precision(q.dtype), STAGES=blocks.stages, num_warps=blocks.warps,
        )  # fmt: skip
        return o, state
    assert state is not None
    _sum_segments(k, v, plan, blocks.chunk, mask, initial_state, 1.0, [(state, 1.0)])
    blocks = blocks_for("read", K, V, q.element_size(), NONE)
    columns = min(blocks.columns, width_block(V))
    read_forward(
        (plan.segments * heads * _blocks(V, columns),), (q, o, state, _or(plan.cuts, q), _or(plan.owner, q)),
        (scale, time, heads, plan.size, plan.per_row, *_strides(q)),
        K=K, V=V, BK=width_block(K), BX=columns, BT=blocks.chunk, VARLEN=plan.cuts is not None,
        TABLE=plan.table, PRECISION=precision(q.dtype), STAGES=blocks.stages, num_warps=blocks.warps,
    )  # fmt: skip
    return o, state if want_state else None


def bidirectional_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    state: Tensor,
    do: Tensor,
    dstate: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and initial_state; None for the last where it was not given."""
    q, k, v, do = tiled(q), tiled(k), tiled(v), tiled(do)
    batch, time, heads, K = q.shape
    V = v.shape[3]
    blocks, plan, fused = _bidirectional_plan(q, v, cu_seqlens)
    dstate = None if dstate is None else dstate.contiguous()
    dinitial = None if initial_state is None else _states(q, plan.rows, heads, K, V)
    dq, dk = (torch.empty(batch, time, heads, K, dtype=q.dtype, device=q.device) for _ in "qk")
    dv = torch.empty(batch, time, heads, V, dtype=q.dtype, device=q.device)
    if fused:
        both_backward(
            (plan.rows * heads,),
            (q, k, v, do, dq, dk, dv, state, _or(dstate, state), _or(dinitial, q), _bytes(mask, q), _or(plan.cuts, q)),
            (scale, time, heads, *_strides(q, k, v, do)),
            K=K, V=V, BK=width_block(K), BV=width_block(V), BT=blocks.chunk, DSTATE=dstate is not None,
            END=initial_state is not None, MASK=mask is not None, VARLEN=plan.cuts is not None,
            PRECISION=precision(q.dtype), STAGES=min(blocks.stages, 2), num_warps=blocks.warps,
        )  # fmt: skip
        return dq, dk, dv, dinitial
    R = _states(q, plan.rows, heads, K, V)
    outs = [(R, 1.0)] + ([] if dinitial is None else [(dinitial, scale)])
    _sum_segments(q, do, plan, blocks.chunk, None, dstate, 1.0 / scale, outs)
    blocks = blocks_for("read", K, V, q.element_size(), NONE)
    XK, XV = min(blocks.columns, width_block(K)), min(blocks.columns, width_block(V))
    read_backward(
        (plan.segments * heads * (2 * _blocks(K, XK) + _blocks(V, XV)),),
        (k, v, do, dq, dk, dv, state, R, _bytes(mask, q), _or(plan.cuts, q), _or(plan.owner, q)),
        (scale, time, heads, plan.size, plan.per_row, *_strides(k, v, do)),
        K=K, V=V, BK=width_block(K), BV=width_block(V), XK=XK, XV=XV, BT=blocks.chunk, MASK=mask is not None,
        VARLEN=plan.cuts is not None, TABLE=plan.table, PRECISION=precision(q.dtype), STAGES=blocks.stages,
        num_warps=blocks.warps,
    )  # fmt: skip
    return dq, dk, dv, dinitial


def _bidirectional_plan(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[Blocks, Cut, bool]:
    """Blocks, segments, and whether one program does a whole sequence and head."""
    batch, time, heads, K = q.shape
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    width = max(K, v.shape[3])
    fits = fits_one_program(width, q.dtype)
    plan = cut(q, cu_seqlens, bidirectional_segment_size(rows, heads, time, width))
    fused = not plan.two_levels and fits
    return blocks_for("bidirectional", K, v.shape[3], q.element_size(), NONE), plan, fused


def _sum_segments(
    a: Tensor,
    b: Tensor,
    plan: Cut,
    chunk: int,
    mask: Tensor | None,
    initial: Tensor | None,
    initial_scale: float,
    outs: list[tuple[Tensor, float]],
) -> None:
    """sum_t a_t^T b_t of every sequence, plus initial_scale * initial; each of `outs` gets it times its factor."""
    time, heads, W = a.shape[1:]
    X = b.shape[3]
    blocks = blocks_for("gather", W, X, a.element_size(), NONE)
    columns = min(blocks.columns, width_block(X))
    states = _states(a, plan.segments, heads, W, X)
    gather(
        (plan.segments * heads * _blocks(X, columns),),
        (a, b, states, states, a, a, _bytes(mask, a), _or(plan.cuts, a)),
        (0, time, heads, plan.size, plan.per_row, *_strides(a, b)),
        W=W, X=X, BW=width_block(W), BX=columns, BT=chunk, DECAY=NONE,
        REVERSE=False, MASK=mask is not None, SKIP=False, VARLEN=plan.cuts is not None, TABLE=plan.table,
        PRECISION=precision(a.dtype), STAGES=blocks.stages, num_warps=blocks.warps,
    )  # fmt: skip
    first, factor = outs[0]
    scan(
        (plan.rows * heads * _blocks(W * X, SCAN_BLOCK),),
        (states, states, _or(initial, states), first, _or(plan.first, states), states, states, states),
        (initial_scale, factor, 1.0, heads, plan.per_row, plan.segments),
        SIZE=W * X, BLOCK=SCAN_BLOCK, DECAY=False, REVERSE=False,
        INITIAL=initial is not None, FINAL=True, INNER=False, TABLE=plan.table, num_warps=4,
    )  # fmt: skip
    for other, other_factor in outs[1:]:
        torch.mul(first, other_factor / factor, out=other)


def step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor | None, scale: float, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """One token: q, k `[B, H, K]`, v `[B, H, V]`, state `[B, H, K, V]`, log_decay `[H]` or `[B, H]`.

    `in_place`: the state is overwritten; each element is read and written by one thread of one program.
    """
    batch, heads, K = q.shape
    V = v.shape[2]
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    state = state.contiguous()
    o = torch.empty(batch, heads, V, dtype=q.dtype, device=q.device)
    new_state = state if in_place else torch.empty_like(state)
    columns = min(STEP_COLUMNS, width_block(V))
    d_b, d_h = (0, 0) if log_decay is None else (0, *log_decay.stride())[-2:]
    step_kernel(
        (batch * heads * _blocks(V, columns),), (q, k, v, state, _or(log_decay, q), o, new_state),
        (scale, heads, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], d_b, d_h),
        K=K, V=V, BK=width_block(K), BX=columns, DECAY=log_decay is not None, num_warps=4,
    )  # fmt: skip
    return o, new_state


def _blocks(total: int, size: int) -> int:
    """Blocks of `size` that hold `total`; `triton.cdiv` takes microseconds on the host."""
    return -(-total // size)


def _states(q: Tensor, count: int, heads: int, K: int, V: int) -> Tensor:
    """Room for `count` fp32 states."""
    return torch.empty(count, heads, K, V, dtype=torch.float32, device=q.device)


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    """`x`, or for a kernel that won't touch it any tensor at all."""
    return other if x is None else x


def _bytes(mask: Tensor | None, other: Tensor) -> Tensor:
    return other if mask is None else mask.contiguous().view(torch.uint8)


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """Batch, time and head strides of each `[B, T, H, width]`."""
    strides: list[int] = []
    for x in tensors:
        strides += x.stride()[:3]
    return tuple(strides)
