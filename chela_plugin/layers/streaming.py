"""Streaming of a causal short-long convolution: chunks and single tokens after a cache, equal to one long call.

| long kernel | kept for a row | a token costs | a chunk of T tokens after S costs |
|---|---|---|---|
| none | the last K - 1 inputs | O(K) | O(T K) |
| modal | those, and the modes' states | O(K + modes) | O(T), as without a cache |
| the others | all inputs, and room for a look-ahead | O(log^2 S) amortised | O((S + T) log(S + T)) |

(for each channel, K the taps of the widest short kernel). Look-ahead, for kernels that are lists of taps (multiscale,
explicit, implicit): the places of a row are cut into blocks of 64. Inside its block an output meets the inputs tap by
tap; what earlier blocks add to it was summed before, into `conv_ahead`. When n blocks have been stepped through since
the last chunk and 2^i is the largest power of two that divides n, the last 2^i blocks are convolved into the next 2^i
(Flash Inference, arXiv:2410.12982, section 3; FutureFill, arXiv:2410.03766): each pair of blocks meets once. A step
itself has static shapes and takes its place from memory, so that one CUDA graph serves every step; `advance`, between
steps, does what depends on the place. Where a gradient is asked for, or under torch.compile, a step is a chunk of one.

The cache is a dict of tensors, batch first. Padding is zero and stands on the left of a row: to a convolution it is the
silence before the first token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chela_plugin.kernels.conv_step import conv_step
from chela_plugin.kernels.folded_taps import folded_taps
from chela_plugin.kernels.long_conv import long_conv
from chela_plugin.kernels.long_conv.reference import modal_powers, modal_residues
from chela_plugin.kernels.modal_step import modal_step
from chela_plugin.kernels.precision import precise

from .long_kernel import ModalKernel
from .mixer import Cache

if TYPE_CHECKING:
    from .short_long_conv import ShortLongConv

BLOCK = 64


def init_cache(conv: ShortLongConv, batch_size: int, device, dtype: torch.dtype, max_tokens: int | None) -> Cache:
    """An empty history. `max_tokens`: room for so many tokens at once; None lets it grow as they come.

    Two entries have no elements, only a shape: numbers that the host must know without reading a device, in a form
    that follows every reordering, copy and move of a cache. `conv_begun` `[B, n, 0]`: whether there was an input;
    `conv_counts` `[B, inputs, base, 0]`: how many there were, and from which place on `conv_ahead` holds.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if looks_ahead(conv):
        rows = (batch_size, max_tokens or 0, conv.dim)
        return {
            "conv_inputs": torch.zeros(rows, device=device, dtype=dtype),
            "conv_ahead": torch.zeros(rows if max_tokens else (batch_size, 0, conv.dim), device=device, dtype=wide),
            "conv_position": torch.zeros(batch_size, device=device, dtype=torch.long),
            "conv_counts": torch.zeros(batch_size, 0, 0, 0, device=device, dtype=dtype),
        }
    past = max(conv.short, default=1) - 1
    cache = {
        "conv_inputs": torch.zeros(batch_size, past, conv.dim, device=device, dtype=dtype),
        "conv_begun": torch.zeros(batch_size, 0, 0, device=device, dtype=dtype),
    }
    if isinstance(conv.long_kernel, ModalKernel):
        states = (batch_size, conv.dim, conv.long_kernel.log_time.shape[1])
        complex_dtype = torch.complex128 if wide == torch.float64 else torch.complex64
        cache["conv_modes"] = torch.zeros(states, device=device, dtype=complex_dtype)
    return cache


def looks_ahead(conv: ShortLongConv) -> bool:
    """Whether the long kernel is a list of taps, with no state that stands for the past."""
    return conv.long_kernel is not None and not isinstance(conv.long_kernel, ModalKernel)


def continued(conv: ShortLongConv, x: Tensor, mask: Tensor | None, cache: Cache, silu: bool) -> Tensor:
    """The tokens of x `[B, T, D]` after those in the cache, which is updated.

    x is zero where `mask` is False. Where a row has history already, its padding goes before that, so that real tokens
    stay neighbours.
    """
    if conv.norm == "batch" and conv.training and not conv.folded:
        raise RuntimeError("a cache goes with eval mode: batch norms take statistics over all tokens while training")
    cache["conv_inputs"] = cache["conv_inputs"].to(x.dtype)
    one = x.shape[1] == 1 and mask is None
    if looks_ahead(conv):
        # No gradient flows through the look-ahead, and compiled it would be a graph for each place.
        if one and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return step_ahead(conv, x, cache, silu)
        return chunk_ahead(conv, x, mask, cache, silu)
    return step(conv, x, cache, silu) if one else chunk(conv, x, mask, cache, silu)


class Constants(NamedTuple):
    """What steps need of the weights, in fp32 at least; see `constants`."""

    short: Tensor  # [D, K], all short kernels under their scales
    scale: Tensor | None  # [D], of the long part
    bias: Tensor  # [D]
    taps: Tensor | None  # [groups, length], long taps before their scale
    modes: tuple[Tensor, Tensor, Tensor] | None  # of a modal kernel: log_time, frequency, residue


def constants(conv: ShortLongConv, length: int = 0) -> Constants:
    """Computed once for many steps: kept with the module until a weight changes, or more taps are asked for."""
    keeps = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    versions = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors_of(conv)) if keeps else ()
    held = conv.__dict__.get("_step_constants")
    if keeps and held is not None and held[0] == (versions, conv.folded):
        found = held[1]
        if not length or (found.taps is not None and found.taps.shape[1] >= length):
            return found
    scale = None if conv.long_kernel is None else conv.folded_long_scale()
    taps = None
    if length:
        conv.check_length(length)
        assert conv.long_kernel is not None
        taps = folded_taps(*conv.long_kernel.source(length), length=length)
    modes = modes_of(conv) if isinstance(conv.long_kernel, ModalKernel) else None
    found = Constants(conv.folded_short().contiguous(), scale, conv.folded_bias(), taps, modes)
    if keeps:
        conv.__dict__["_step_constants"] = ((versions, conv.folded), found)
    return found


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Its parameters and buffers, one that is shared more than once. `parameters()` and `buffers()` take a sixth of a
    step's time on the host to leave the second ones out."""
    found = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    for child in module._modules.values():
        if child is not None:
            found += tensors_of(child)
    return found


# A state that stands for the past: short taps alone, and modal kernels ------------------------------------------------


def step(conv: ShortLongConv, x: Tensor, cache: Cache, silu: bool) -> Tensor:
    """One token, `[B, 1, D]`; in the cache's own tensors where a kernel takes it."""
    found, history = constants(conv), cache["conv_inputs"]
    begin(cache)
    if found.modes is not None:
        assert found.scale is not None
        y, cache["conv_inputs"], cache["conv_modes"] = modal_step(
            x[:, 0], history, cache["conv_modes"], found.short, found.scale, found.bias, found.modes, silu=silu
        )
        return y[:, None]
    window = torch.cat([history, x], dim=1)  # [B, K, D]
    cache["conv_inputs"] = window[:, 1:]
    y = torch.einsum("bkd,dk->bd", window.to(found.short.dtype), found.short.flip(-1)) + found.bias
    return (F.silu(y) if silu else y).to(x.dtype)[:, None]


def begin(cache: Cache) -> bool:
    """Whether there was an input before; from now on there was."""
    begun = cache["conv_begun"]
    if begun.shape[1] == 0:
        cache["conv_begun"] = begun.new_zeros(len(begun), 1, 0)
        return False
    return True


def chunk(conv: ShortLongConv, x: Tensor, mask: Tensor | None, cache: Cache, silu: bool) -> Tensor:
    """Many tokens: the form without a cache, and what the history adds to it."""
    history, state = cache["conv_inputs"], cache.get("conv_modes")
    if not begin(cache):
        cache["conv_inputs"] = last_inputs(history, x, None)
        if state is not None:
            cache["conv_modes"] = modal_state(conv, x)
        return conv(x, mask=mask, silu=silu)
    first = x
    if mask is not None:
        # Tokens before padding for the outputs, which then continue the history without a gap.
        order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[..., None].expand_as(x)
        first = x.gather(1, order)
    y = precise(conv(first)) + after_history(conv, history, first.shape[1])
    if state is not None:
        y = y + carried(conv, state, first.shape[1])
        cache["conv_modes"] = modal_state(conv, x) + decayed(conv, state, x, mask)
    cache["conv_inputs"] = last_inputs(history, x, mask)
    y = (F.silu(y) if silu else y).to(x.dtype)
    return y if mask is None else torch.empty_like(y).scatter(1, order, y)


def last_inputs(history: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """The last K - 1 inputs of each row, `history` `[B, K - 1, D]` included, without padding in between."""
    past, tokens = history.shape[1], x.shape[1]
    inputs = torch.cat([history, x[:, max(tokens - past, 0) :]], dim=1) if mask is None else torch.cat([history, x], 1)
    if mask is not None:
        inputs = inputs.gather(1, padding_first(mask, past)[..., None].expand_as(inputs))
    return inputs[:, inputs.shape[1] - past :].contiguous()


def padding_first(mask: Tensor, before: int) -> Tensor:
    """`[B, before + T]`: the order in which padding comes first, then `before` places of history, then the tokens."""
    return F.pad(mask, (before, 0), value=True).to(torch.uint8).argsort(dim=1, stable=True)


def after_history(conv: ShortLongConv, history: Tensor, tokens: int) -> Tensor:
    """What the short taps find in the history, `[B, T, D]`: nothing beyond the first K - 1 outputs."""
    past = history.shape[1]
    heard = min(past, tokens)
    if not heard:
        return precise(history.new_zeros(len(history), tokens, conv.dim))
    longer = F.pad(precise(history), (0, 0, 0, heard))
    return F.pad(long_conv(longer, constants(conv).short)[:, past:], (0, 0, 0, tokens - heard))


def modes_of(conv: ShortLongConv) -> tuple[Tensor, Tensor, Tensor]:
    modal = conv.long_kernel
    assert isinstance(modal, ModalKernel)
    return precise(modal.log_time), precise(modal.frequency), precise(modal.residue)


def modal_state(conv: ShortLongConv, x: Tensor) -> Tensor:
    """The modes' states behind x after silence, `[B, D, M]`: sum over its tokens of p^(distance to the last) x.

    First within blocks, then over them: no power is formed for each token.
    """
    log_time, frequency, _ = modes_of(conv)
    groups = len(log_time)
    count = -(-x.shape[1] // BLOCK)
    xs = F.pad(precise(x), (0, 0, count * BLOCK - x.shape[1], 0)).view(len(x), count, BLOCK, groups, -1)
    near = modal_powers(log_time, frequency, torch.arange(BLOCK - 1, -1, -1, device=x.device))  # [G, M, BLOCK]
    far = modal_powers(log_time, frequency, BLOCK * torch.arange(count - 1, -1, -1, device=x.device))
    parts = torch.einsum("gmsz,bnsgc->bngcmz", torch.view_as_real(near), xs)
    return torch.einsum("gmn,bngcm->bgcm", far, torch.view_as_complex(parts.contiguous())).flatten(1, 2)


def carried(conv: ShortLongConv, state: Tensor, tokens: int) -> Tensor:
    """What the states before it add to a chunk of `tokens`, under the long part's scale: `[B, T, D]`."""
    log_time, frequency, residue = modes_of(conv)
    scale, groups = constants(conv).scale, len(log_time)
    assert scale is not None
    count = -(-tokens // BLOCK)
    near = modal_powers(log_time, frequency, torch.arange(1, BLOCK + 1, device=state.device))
    near = modal_residues(log_time, residue)[..., None] * near  # [G, M, BLOCK]
    far = modal_powers(log_time, frequency, BLOCK * torch.arange(count, device=state.device))  # [G, M, count]
    states = torch.einsum("gmn,bgcm->bngcm", far, state.unflatten(1, (groups, -1)))
    y = torch.einsum("gmr,bngcm->bnrgc", near.real, states.real) - torch.einsum(
        "gmr,bngcm->bnrgc", near.imag, states.imag
    )
    return y.flatten(3).flatten(1, 2)[:, :tokens] * scale


def decayed(conv: ShortLongConv, state: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """The states before a chunk as they are behind its real tokens."""
    log_time, frequency, _ = modes_of(conv)
    group = conv.dim // len(log_time)
    age = torch.full((1,), x.shape[1], device=x.device) if mask is None else mask.sum(1)
    powers = modal_powers(log_time, frequency, age).movedim(-1, 0)  # [B or 1, G, M]
    return state * powers.repeat_interleave(group, dim=1)


# Lists of taps: all inputs, and a look-ahead -------------------------------------------------------------------------


def counts(cache: Cache) -> tuple[int, int]:
    """Inputs so far, and the place from which on `conv_ahead` holds (0: it doesn't)."""
    _, inputs, base, _ = cache["conv_counts"].shape
    return inputs, base


def count(cache: Cache, inputs: int, base: int) -> None:
    held = cache["conv_counts"]
    cache["conv_counts"] = held.new_zeros(len(held), inputs, base, 0)


def chunk_ahead(conv: ShortLongConv, x: Tensor, mask: Tensor | None, cache: Cache, silu: bool) -> Tensor:
    """Many tokens: the tail of one convolution of all inputs."""
    inputs, tokens = cache["conv_inputs"], x.shape[1]
    seen, _ = counts(cache)
    capacity = inputs.shape[1]
    if seen == 0:
        y = conv(x, mask=mask, silu=silu)
        together = x
    else:
        together = torch.cat([inputs[:, :seen], x], dim=1)
        if mask is not None:
            together = together.gather(1, padding_first(mask, seen)[..., None].expand_as(together))
        y = conv.exact(together, silu)[:, seen:]
    if capacity >= seen + tokens and not torch.is_grad_enabled():
        start = 0 if mask is not None else seen  # padding after history moved it
        inputs[:, start : seen + tokens] = together[:, start:]
    else:
        cache["conv_inputs"] = together
    cache["conv_position"] = cache["conv_position"] + tokens
    count(cache, seen + tokens, 0)
    return y


def step_ahead(conv: ShortLongConv, x: Tensor, cache: Cache, silu: bool) -> Tensor:
    """One token, `[B, 1, D]`. While a CUDA graph is captured, the rest is left to `advance` after each replay."""
    recorded = captured(x)
    if not recorded:
        look_ahead(conv, cache)
    found = constants(conv, cache["conv_inputs"].shape[1])
    assert found.taps is not None and found.scale is not None
    y = conv_step(
        x[:, 0], cache["conv_inputs"], cache["conv_ahead"], cache["conv_position"], found.short, found.taps,
        found.scale, found.bias, block=BLOCK, silu=silu,
    )  # fmt: skip
    cache["conv_position"].add_(1)
    if not recorded:
        advance(conv, cache)
    return y[:, None]


def captured(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured: launches are recorded, not made."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def look_ahead(conv: ShortLongConv, cache: Cache) -> None:
    """Make the cache ready for a step: room for its input, and what all blocks before its own add to what follows."""
    seen, base = counts(cache)
    inputs, ahead = cache["conv_inputs"], cache["conv_ahead"]
    if base and seen < inputs.shape[1]:
        return
    capacity = inputs.shape[1]
    if seen >= capacity:  # doubled, so that the copies and convolutions of all growth together stay O(T log T)
        capacity = max(2 * BLOCK, 1 << seen.bit_length())
        cache["conv_inputs"] = inputs = F.pad(inputs, (0, 0, 0, capacity - inputs.shape[1]))
        ahead = precise(inputs.new_zeros(inputs.shape))
    start = seen // BLOCK * BLOCK
    if start:
        found = constants(conv, capacity)
        before = F.pad(precise(inputs[:, :start]), (0, 0, 0, capacity - start))
        ahead[:, start:] = long_conv(before, wide_taps(conv, found, capacity))[:, start:]
    else:
        ahead.zero_()
    cache["conv_ahead"] = ahead
    count(cache, seen, max(start, 1))  # 1: from the beginning


@torch.no_grad()
def advance(conv: ShortLongConv, cache: Cache) -> None:
    """After a step: count it and, at the end of a block, convolve the last blocks into the next ones."""
    seen, base = counts(cache)
    seen += 1
    count(cache, seen, base)
    inputs, ahead = cache["conv_inputs"], cache["conv_ahead"]
    stepped = seen - base // BLOCK * BLOCK
    width = min(stepped & -stepped, inputs.shape[1] - seen)
    if stepped % BLOCK or width <= 0:
        return
    blocks = stepped & -stepped
    last = F.pad(precise(inputs[:, seen - blocks : seen]), (0, 0, 0, width))
    found = constants(conv, inputs.shape[1])
    ahead[:, seen : seen + width] += long_conv(last, wide_taps(conv, found, blocks + width))[:, blocks:]


def wide_taps(conv: ShortLongConv, found: Constants, length: int) -> Tensor:
    """The long taps of every channel, `[D, length]`."""
    assert found.taps is not None
    return found.taps[:, :length].repeat_interleave(conv.dim // len(found.taps), dim=0)
