"""Mamba's selective scan in plain PyTorch: the definition, and a chunked form that recomputes its states in backward.

    h_t = exp(delta_t A) h_(t-1) + delta_t u_t B_t        y_t = sum_n h_tn C_tn

(arXiv:2312.00752, equation 2 and algorithm 2) for every channel alone, with N states, A < 0 and delta >= 0. The
states `[B, T, D, N]` are N times as large as the input, so, as in the paper's kernel (section 3.3.2), they are never
kept: forward walks the sequence chunk by chunk and saves the state at each chunk's start; backward walks it in reverse,
computing each chunk's states again.

Inside a chunk the recurrence `h_t = a_t h_(t-1) + b_t` runs in blocks of 8, all blocks at once, position by position;
the blocks' ends are a recurrence of the same kind, 8 times shorter, so the depth is logarithmic in the chunk. Only
products of decays (at most 1) occur: nothing overflows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 32  # on a CPU core none of 16, 32 and 64 is the fastest at all sizes: benchmarks/results/plain_forms_cpu.json
BLOCK = 8


def recurrent(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, *, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition, token by token. u, delta `[B, T, D]`, a `[D, N]`, b, c `[B, T, N]`, state `[B, D, N]`."""
    state = u.new_zeros(u.shape[0], *a.shape) if initial_state is None else initial_state
    out = []
    for t in range(u.shape[1]):
        y, state = step(u[:, t], delta[:, t], a, b[:, t], c[:, t], state)
        out.append(y)
    return torch.stack(out, dim=1), state


def step(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token: u, delta `[B, D]`, b, c `[B, N]`, state `[B, D, N]`."""
    state = (delta[..., None] * a).exp() * state + (delta * u)[..., None] * b[:, None]
    return (state @ c[..., None]).squeeze(-1), state


def linear_recurrence(a: Tensor, b: Tensor, reverse: bool = False) -> Tensor:
    """`h_t = a_t h_(t-1) + b_t` over dim 0 of a and b `[T, ...]`, nothing before the first; overwrites a and b.

    `reverse` runs from the last to the first: `h_t = a_t h_(t+1) + b_t`.
    """
    time, ahead = a.shape[0], 1 if reverse else -1
    if time <= BLOCK:
        for t in range(time - 2, -1, -1) if reverse else range(1, time):
            b[t].addcmul_(a[t], b[t + ahead])
        return b
    blocks = -(-time // BLOCK)
    if time % BLOCK:
        # Tokens with a = 1 and b = 0 hand the state on, at whichever end the recurrence comes to last.
        pad = (0, 0) * (a.dim() - 1) + ((blocks * BLOCK - time, 0) if reverse else (0, blocks * BLOCK - time))
        padded = linear_recurrence(F.pad(a, pad, value=1.0), F.pad(b, pad), reverse)
        return padded[-time:] if reverse else padded[:time]
    a, b = a.view(blocks, BLOCK, *a.shape[1:]), b.view(blocks, BLOCK, *b.shape[1:])
    for t in range(BLOCK - 2, -1, -1) if reverse else range(1, BLOCK):
        b[:, t].addcmul_(a[:, t], b[:, t + ahead])
        a[:, t].mul_(a[:, t + ahead])
    last = 0 if reverse else BLOCK - 1
    ends = linear_recurrence(a[:, last].clone(), b[:, last].clone(), reverse)
    if reverse:
        b[:-1].addcmul_(a[:-1], ends[1:, None])
    else:
        b[1:].addcmul_(a[1:], ends[:-1, None])
    return b.view(time, *b.shape[2:])


class SelectiveScan(torch.autograd.Function):
    """`chunked` with its own backward: memory for the inputs and one state a chunk. All tensors of one dtype.

    Inside, states are `[t, B, N, D]`: channels last, where the inputs are contiguous, and time first, where the
    recurrence walks.
    """

    @staticmethod
    def forward(ctx, u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, initial_state: Tensor):
        u, delta, b, c = (x.transpose(0, 1) for x in (u, delta, b, c))
        a = a.t().contiguous()
        state = initial_state.transpose(1, 2)
        starts, out = [], []
        for span in spans(len(u)):
            starts.append(state)
            states = span_states(decays(delta[span], a), u[span], delta[span], b[span], state)
            out.append((states * c[span][..., None]).sum(-2))
            state = states[-1].clone()
        ctx.save_for_backward(u, delta, a, b, c, torch.stack(starts))
        return torch.cat(out).transpose(0, 1), state.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y: Tensor, grad_state: Tensor):
        u, delta, a, b, c, starts = ctx.saved_tensors
        grad_y, carried = grad_y.transpose(0, 1), grad_state.transpose(1, 2)
        grad_u, grad_delta, grad_b, grad_c = (torch.empty_like(x) for x in (u, delta, b, c))
        grad_a = torch.zeros_like(a)
        for start, span in reversed(list(zip(starts, spans(len(u)), strict=True))):
            decay = decays(delta[span], a)
            states = span_states(decay.clone(), u[span], delta[span], b[span], start)
            grad_c[span] = (states * grad_y[span][:, :, None]).sum(-1)
            # G_t = grad_y_t C_t + decay_(t+1) G_(t+1): the same kind of recurrence, backwards in time.
            grad_h = grad_y[span][:, :, None] * c[span][..., None]
            grad_h[-1] += carried
            grad_h = linear_recurrence(torch.cat((decay[1:], decay[:1])), grad_h, reverse=True)
            carried = decay[0] * grad_h[0]
            grad_input = (grad_h * b[span][..., None]).sum(-2)  # of delta_t u_t
            grad_u[span] = grad_input * delta[span]
            grad_b[span] = (grad_h * (delta[span] * u[span])[:, :, None]).sum(-1)
            grad_exponent = decay.mul_(grad_h)
            grad_exponent[0] *= start
            grad_exponent[1:] *= states[:-1]
            grad_delta[span] = (grad_exponent * a).sum(-2) + grad_input * u[span]
            grad_a += grad_exponent.mul_(delta[span][:, :, None]).sum((0, 1))
        grad_u, grad_delta, grad_b, grad_c = (x.transpose(0, 1) for x in (grad_u, grad_delta, grad_b, grad_c))
        return grad_u, grad_delta, grad_a.t(), grad_b, grad_c, carried.transpose(1, 2)


def chunked(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, *, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same function by chunks; shapes as in `recurrent`. Differentiable once."""
    state = u.new_zeros(u.shape[0], *a.shape) if initial_state is None else initial_state
    return SelectiveScan.apply(u, delta, a, b, c, state)


def decays(delta: Tensor, a: Tensor) -> Tensor:
    """`exp(delta A)` `[t, B, N, D]` of delta `[t, B, D]` and a `[N, D]`."""
    return (delta[:, :, None] * a).exp_()


def span_states(decay: Tensor, u: Tensor, delta: Tensor, b: Tensor, state: Tensor) -> Tensor:
    """The states `[t, B, N, D]` of one span that starts from `state` `[B, N, D]`. Overwrites `decay`."""
    added = (delta * u)[:, :, None] * b[..., None]
    added[0].addcmul_(decay[0], state)
    return linear_recurrence(decay, added)


def spans(time: int) -> list[slice]:
    return [slice(t, min(t + CHUNK, time)) for t in range(0, time, CHUNK)]
