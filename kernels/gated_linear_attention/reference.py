"""Linear attention with a decay for every key channel, in plain PyTorch: the definition, and a form to train with.

    S_t = Diag(exp(g_t)) S_(t-1) + k_t v_t^T        o_t = scale * S_t^T q_t         (GLA, arXiv:2312.06635, eq. 3 and 4)

with `g <= 0`. Unrolled, `o_t = scale * sum_(s<=t) (sum_c q_tc k_sc exp(g_(s+1)c + ... + g_tc)) v_s`: the score of a
pair needs the decay *between* its two tokens, channel by channel. Writing it as `(q exp(G)) . (k exp(-G))` overflows,
and a `[chunk, chunk, K]` table of differences is slow and loses digits where G is large. So the chunked form halves:

    +-------+         a block's lower half looks at its upper half through the line between the two: queries decay
    | M   0 |         from the line down to themselves (F), keys from themselves to the line (R). Both exponents are
    | A   M |         sums of g, never differences, so nothing overflows or cancels, and A is one matmul. The two M are
    +-------+         blocks of half the size, made the same way, down to single tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 64


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, scale: float, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition, token by token. q, k, g `[B, T, H, K]`, v `[B, T, H, V]`, state `[B, H, K, V]`, one dtype."""
    batch, time, heads, width = k.shape
    state = v.new_zeros(batch, heads, width, v.shape[-1]) if initial_state is None else initial_state
    out = []
    for t in range(time):
        o, state = step(q[:, t], k[:, t], v[:, t], state, g[:, t], scale=scale)
        out.append(o)
    return torch.stack(out, dim=1), state


def step(q: Tensor, k: Tensor, v: Tensor, state: Tensor, g: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """One token: q, k, g `[B, H, K]`, v `[B, H, V]`, state `[B, H, K, V]`."""
    state = g.exp()[..., None] * state + k[..., None] * v[..., None, :]
    return scale * (q[..., None, :] @ state).squeeze(-2), state


def chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, scale: float, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same function by chunks: matmuls inside a chunk, a state handed from chunk to chunk."""
    batch, time, heads, width = k.shape
    chunk = min(CHUNK, 1 << (time - 1).bit_length())
    short = -time % chunk

    def by_chunk(x: Tensor) -> Tensor:
        """`[B, T, H, D]` to `[B, H, n, chunk, D]`; the tokens added have no key and no decay."""
        x = F.pad(x, (0, 0, 0, 0, 0, short)) if short else x
        return x.view(batch, -1, chunk, heads, x.shape[-1]).permute(0, 3, 1, 2, 4)

    q, k, v, g = by_chunk(q * scale), by_chunk(k), by_chunk(v), by_chunk(g)
    scores, from_start, to_end = scores_within(q, k, g)
    added = (k * to_end.exp()).transpose(-1, -2) @ v  # [B, H, n, K, V]
    kept = from_start[..., -1, :].exp()[..., None]  # [B, H, n, K, 1]
    state = v.new_zeros(batch, heads, width, v.shape[-1]) if initial_state is None else initial_state
    before = []
    for c in range(added.shape[2]):
        before.append(state)
        state = kept[:, :, c] * state + added[:, :, c]
    o = scores @ v + (q * from_start.exp()) @ torch.stack(before, dim=2)
    return o.permute(0, 2, 3, 1, 4).reshape(batch, time + short, heads, -1)[:, :time], state


def scores_within(q: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decayed scores inside each chunk, by halving (see the top of the file).

    q, k, g `[..., c, K]`, c a power of two. Returns the lower-triangular scores `[..., c, c]` and the sums of g
    from the chunk's start through each token, and from behind each token to the chunk's end, both `[..., c, K]`.
    """
    *lead, c, width = g.shape
    scores = (q * k).sum(-1)[..., None, None]  # [..., blocks, block, block], blocks of one token
    from_start, to_end = g, torch.zeros_like(g)
    half = 1
    while half < c:
        pairs = (*lead, c // (2 * half), 2, half)
        (up, low), q_low, k_up = scores.view(*pairs, half).unbind(-3), q.view(*pairs, width), k.view(*pairs, width)
        start_up, start_low = from_start.view(*pairs, width).unbind(-3)
        end_up, end_low = to_end.view(*pairs, width).unbind(-3)
        q_low = q_low.select(-3, 1) * start_low.exp()
        k_up = k_up.select(-3, 0) * end_up.exp()
        # A matmul of one or two rows costs more than it computes.
        by_hand = half <= 2
        across = (q_low.unsqueeze(-2) * k_up.unsqueeze(-3)).sum(-1) if by_hand else q_low @ k_up.transpose(-1, -2)
        scores = torch.cat((F.pad(up, (0, half)), torch.cat((across, low), dim=-1)), dim=-2)
        whole_up, whole_low = start_up[..., -1:, :], start_low[..., -1:, :]
        from_start = torch.cat((start_up, start_low + whole_up), dim=-2).view(*lead, c, width)
        to_end = torch.cat((end_up + whole_low, end_low), dim=-2).view(*lead, c, width)
        half *= 2
    return scores.view(*lead, c, c), from_start, to_end
