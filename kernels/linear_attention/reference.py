"""Linear attention in plain PyTorch: the definition, and the chunked form that trains on a CPU.

    S_t = exp(d_t) S_{t-1} + k_t^T v_t          o_t = scale * q_t S_t          S: [K, V], d = log_decay <= 0

    o_t = scale * ( exp(g_t) q_t S_0  +  sum_{s <= t} exp(g_t - g_s) (q_t . k_s) v_s ),      g_t = d_1 + ... + d_t

`recurrent` is the first line, `quadratic` the second, `chunked` mixes the two: the second inside chunks of 64 tokens,
the first from chunk to chunk. `bidirectional` sums over all s. Linear attention as a recurrence: Katharopoulos et al.,
arXiv:2006.16236, equations 16 to 20; the decay: RetNet, arXiv:2307.08621, and Mamba-2, arXiv:2405.21060, section 6.

Everything here takes inputs that `check_inputs` has passed. Dims: B batch, T time, H heads, K key width, V value width.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

CHUNK = 64
# exp(-80) is 1.8e-35: below it a decay has forgotten everything, and the differences of sums of such decays would
# lose the digits of the mild ones (and turn -inf into nan).
LEAST_LOG_DECAY = -80.0


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """States are fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, scale: float, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition, token after token: `([B, T, H, V], [B, H, K, V])`. For tests; T sequential steps."""
    dtype = state_dtype(q.dtype)
    batch, time, heads, width = k.shape
    state = (
        k.new_zeros(batch, heads, width, v.shape[-1], dtype=dtype) if initial_state is None else initial_state.to(dtype)
    )
    if log_decay is not None and log_decay.dim() == 1:
        log_decay = log_decay.expand(batch, time, heads)
    out = []
    for t in range(time):
        o, state = step(q[:, t], k[:, t], v[:, t], state, None if log_decay is None else log_decay[:, t], scale)
        out.append(o)
    return torch.stack(out, 1), state


def quadratic(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, scale: float, initial_state: Tensor | None
) -> Tensor:
    """The definition as a masked T x T product: `[B, T, H, V]`. For tests; memory grows with T^2."""
    dtype = state_dtype(q.dtype)
    time = q.shape[1]
    q_BTHK, k_BTHK, v_BTHV = q.to(dtype), k.to(dtype), v.to(dtype)
    scores_BHTS = torch.einsum("bthk,bshk->bhts", q_BTHK, k_BTHK)
    past_TS = torch.ones(time, time, dtype=torch.bool, device=q.device).tril()
    g_BHT = None
    if log_decay is not None:
        g_BHT = _cumulative(log_decay, time, dtype)
        scores_BHTS = scores_BHTS * _decay(g_BHT, past_TS)
    out = torch.einsum("bhts,bshv->bthv", scores_BHTS.masked_fill(~past_TS, 0.0), v_BTHV)
    if initial_state is not None:
        carried = torch.einsum("bthk,bhkv->bthv", q_BTHK, initial_state.to(dtype))
        out = out + (carried if g_BHT is None else carried * g_BHT.exp().transpose(1, 2)[..., None])
    return (scale * out).to(q.dtype)


def chunked(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, scale: float, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The form that trains on a CPU: matrix products over chunks of 64 tokens, one short loop over chunks.

    Where a chunk ends depends on T alone, and a product never mixes a row with a later one except times an exact zero:
    a later token can't change the last bit of an earlier output. Returns `([B, T, H, V], [B, H, K, V])`.
    """
    dtype = state_dtype(q.dtype)
    time, heads = k.shape[1:3]
    size = min(CHUNK, time)
    count = math.ceil(time / size)

    def cut(x: Tensor) -> Tensor:  # [B, T, H, D] -> [B, H, chunks, size, D]
        x = x.to(dtype).transpose(1, 2)
        return pad(x, (0, 0, 0, count * size - time)).unflatten(2, (count, size))

    q_BHNCK, k_BHNCK, v_BHNCV = cut(q), cut(k), cut(v)
    scores_BHNCC = q_BHNCK @ k_BHNCK.transpose(-1, -2)
    past_CC = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    carry_BHN = None
    if log_decay is not None:
        static = log_decay.dim() == 1  # one batch and one time for all: [1, H, N, C]
        g_BHT = (log_decay.expand(1, time, heads) if static else log_decay).to(dtype).transpose(1, 2)
        g_BHNC = pad(g_BHT.clamp(min=LEAST_LOG_DECAY), (0, count * size - time)).unflatten(2, (count, size)).cumsum(-1)
        scores_BHNCC = scores_BHNCC * _decay(g_BHNC, past_CC)
        q_BHNCK = q_BHNCK * g_BHNC.exp()[..., None]
        k_BHNCK = k_BHNCK * (g_BHNC[..., -1:] - g_BHNC).exp()[..., None]
        carry_BHN = g_BHNC[..., -1].exp()
    out_BHNCV = scores_BHNCC.masked_fill(~past_CC, 0.0) @ v_BHNCV
    added_BHNKV = k_BHNCK.transpose(-1, -2) @ v_BHNCV
    state = None if initial_state is None else initial_state.to(dtype)
    before = []  # the state that each chunk starts from
    for n in range(count):
        added = added_BHNKV[:, :, n]
        before.append(torch.zeros_like(added) if state is None else state)
        if state is None:
            state = added
        else:
            state = (state if carry_BHN is None else state * carry_BHN[:, :, n, None, None]) + added
    assert state is not None
    if count > 1 or initial_state is not None:
        out_BHNCV = out_BHNCV + q_BHNCK @ torch.stack(before, 2)
    out = (scale * out_BHNCV).flatten(2, 3)[:, :, :time].transpose(1, 2)
    return out.to(q.dtype), state


def bidirectional(q: Tensor, k: Tensor, v: Tensor, scale: float, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Every token sees every token: `o = scale * q (S_0 + k^T v)`. Returns `([B, T, H, V], [B, H, K, V])`."""
    dtype = state_dtype(q.dtype)
    state = k.to(dtype).permute(0, 2, 3, 1) @ v.to(dtype).transpose(1, 2)
    if initial_state is not None:
        state = state + initial_state.to(dtype)
    out = scale * (q.to(dtype).transpose(1, 2) @ state)
    return out.transpose(1, 2).to(q.dtype), state


def packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cuts: list[int],
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Sequences behind one another in one row, cut at `cuts`: `([1, T, H, V], [N, H, K, V])`."""
    out, states = [], []
    for n, (start, end) in enumerate(pairwise(cuts)):
        first = None if initial_state is None else initial_state[n : n + 1]
        if start == end:
            dtype = state_dtype(q.dtype)
            nothing = k.new_zeros(1, k.shape[2], k.shape[3], v.shape[3], dtype=dtype)
            states.append(nothing if first is None else first.to(dtype))
            continue
        parts = q[:, start:end], k[:, start:end], v[:, start:end]
        if causal:
            decay = log_decay[:, start:end] if log_decay is not None and log_decay.dim() == 3 else log_decay
            o, state = chunked(*parts, decay, scale, first)
        else:
            o, state = bidirectional(*parts, scale, first)
        out.append(o)
        states.append(state)
    return torch.cat(out, 1), torch.cat(states, 0)


def step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """One token: q, k `[B, H, K]`, v `[B, H, V]`, state `[B, H, K, V]`, log_decay `[H]` or `[B, H]`."""
    if log_decay is not None:
        state = state * log_decay.to(state.dtype).exp()[..., None, None]
    state = state + k.to(state.dtype)[..., :, None] * v.to(state.dtype)[..., None, :]
    out = (q.to(state.dtype)[..., None, :] @ state).squeeze(-2)
    return (scale * out).to(q.dtype), state


def _cumulative(log_decay: Tensor, time: int, dtype: torch.dtype) -> Tensor:
    """`[H]` or `[B, T, H]` per step to the running sum `[1 or B, H, T]`."""
    if log_decay.dim() == 1:
        log_decay = log_decay.expand(1, time, len(log_decay))
    return log_decay.to(dtype).clamp(min=LEAST_LOG_DECAY).transpose(1, 2).cumsum(-1)


def _decay(g: Tensor, past: Tensor) -> Tensor:
    """`exp(g_t - g_s)` where s <= t, else 1. Only differences at or below 0 are ever exponentiated."""
    return (g[..., :, None] - g[..., None, :]).masked_fill(~past, 0.0).exp()
