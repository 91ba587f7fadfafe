"""Linear attention as mixers call it: behind the state in a cache, in whichever of its forms suits."""

from __future__ import annotations

import torch
from torch import Tensor

from chela_plugin.kernels.linear_attention import linear_attention, linear_attention_step

from .mixer import Cache


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    cache: Cache | None,
    *,
    causal: bool = True,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """`kernels.linear_attention`, continuing and updating `cache["state"]`; returns `[B, T, H, V]`.

    `mask` `[B, T]`, heeded where there is a cache: tokens where it is False neither join the state nor decay it.
    """
    if cache is None:
        return linear_attention(q, k, v, log_decay, causal=causal, scale=scale)[0]
    if q.shape[1] == 1 and mask is None:
        if log_decay is not None and log_decay.dim() == 3:
            log_decay = log_decay[:, 0]
        o, cache["state"] = linear_attention_step(
            q[:, 0], k[:, 0], v[:, 0], cache["state"], log_decay, scale, in_place=True
        )
        return o[:, None]
    o, cache["state"] = linear_attention(
        q, k, v, log_decay, scale=scale, initial_state=cache["state"], output_final_state=True, mask=mask
    )
    return o


def empty_state(
    like: Tensor, shape: tuple[int, ...], device: torch.device | str | None, dtype: torch.dtype | None
) -> Tensor:
    """A state of zeros on `like`'s device; fp32, or fp64 where the model is."""
    double = (dtype or like.dtype) == torch.float64
    return torch.zeros(shape, device=device or like.device, dtype=torch.float64 if double else torch.float32)
