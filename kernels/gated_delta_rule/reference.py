"""The gated delta rule in plain PyTorch: the definition, and a chunked form to train with.

    S_t = exp(g_t) (I - beta_t k_t k_t^T) S_(t-1) + beta_t k_t v_t^T        o_t = scale * S_t^T q_t

(Gated DeltaNet, arXiv:2412.06464, equation 10, with the state transposed to `[K, V]`.) Each token writes what its key
did not yet return: with `u_t = beta_t (v_t - exp(g_t) S_(t-1)^T k_t)` the state is
`S_t = exp(g_t) S_(t-1) + k_t u_t^T`, plain linear attention over u. Inside a chunk that starts at S_0, with
`D_ts = exp(g_(s+1) + ... + g_t)` and `D_t0 = exp(g_1 + ... + g_t)`,

    u_t = beta_t v_t - beta_t D_t0 S_0^T k_t - sum_(s<t) beta_t D_ts (k_t . k_s) u_s

so all u solve one unit lower triangular system, `(I + L) U = beta V - (beta D_0 K) S_0`: the WY form of section 3.3.
Every exponent is a sum of g between two tokens, at most 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 64


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, *, scale: float, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition, token by token. q, k `[B, T, H, K]`, v `[B, T, H, V]`, beta, g `[B, T, H]`, one dtype."""
    batch, time, heads, width = k.shape
    state = v.new_zeros(batch, heads, width, v.shape[-1]) if initial_state is None else initial_state
    out = []
    for t in range(time):
        o, state = step(q[:, t], k[:, t], v[:, t], state, beta[:, t], g[:, t], scale=scale)
        out.append(o)
    return torch.stack(out, dim=1), state


def step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, beta: Tensor, g: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """One token: q, k `[B, H, K]`, v `[B, H, V]`, state `[B, H, K, V]`, beta, g `[B, H]`."""
    state = g.exp()[..., None, None] * state
    u = beta[..., None] * (v - (k[..., None, :] @ state).squeeze(-2))
    state = state + k[..., None] * u[..., None, :]
    return scale * (q[..., None, :] @ state).squeeze(-2), state


def chunked(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, *, scale: float, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same function by chunks: one triangular solve a chunk, all chunks at once, then a walk over the states."""
    batch, time, heads, width = k.shape
    chunk = min(CHUNK, time)
    short = -time % chunk

    def by_chunk(x: Tensor) -> Tensor:
        """`[B, T, H, D]` to `[B, H, n, chunk, D]`; the tokens added have no key, no decay and beta 0."""
        x = F.pad(x, (0, 0, 0, 0, 0, short)) if short else x
        return x.reshape(batch, -1, chunk, heads, x.shape[-1]).permute(0, 3, 1, 2, 4)

    q, k, v, beta, g = by_chunk(q * scale), by_chunk(k), by_chunk(v), by_chunk(beta[..., None]), by_chunk(g[..., None])
    decay, from_start, to_end = decay_within(g.squeeze(-1))
    keys = k.transpose(-1, -2)
    lower = (beta * (k @ keys) * decay).tril(-1)
    right = torch.cat((beta * v, beta * from_start.exp() * k), dim=-1)
    u, w = torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True).split(
        (v.shape[-1], width), dim=-1
    )
    scores = (q @ keys) * decay
    q_start = q * from_start.exp()
    k_end = (k * to_end.exp()).transpose(-1, -2)
    kept = from_start[..., -1:, :].exp()
    state = v.new_zeros(batch, heads, width, v.shape[-1]) if initial_state is None else initial_state
    out = []
    for c in range(k.shape[2]):
        written = u[:, :, c] - w[:, :, c] @ state
        out.append(q_start[:, :, c] @ state + scores[:, :, c] @ written)
        state = kept[:, :, c] * state + k_end[:, :, c] @ written
    o = torch.stack(out, dim=2)
    return o.permute(0, 2, 3, 1, 4).reshape(batch, time + short, heads, -1)[:, :time], state


def decay_within(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decays between the tokens of each chunk, for g `[..., c]`.

    Returns `exp(g_(s+1) + ... + g_t)` where s <= t, else 0, `[..., c (t), c (s)]`; and the sums of g from the start
    through each token and from behind each token to the end, both `[..., c, 1]`. Summed, not subtracted: the
    difference of two long sums would lose the digits of a short one between them.
    """
    c = g.shape[-1]
    lag = torch.ones(c, c, dtype=torch.bool, device=g.device)
    between = g[..., :, None].expand(*g.shape, c).masked_fill(~lag.tril(-1), 0.0).cumsum(-2)
    return between.exp().masked_fill(~lag.tril(), 0.0), g.cumsum(-1)[..., None], between[..., -1, :, None]
