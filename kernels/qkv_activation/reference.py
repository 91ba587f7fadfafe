"""SiLU of q, k and v and the decay of each token, in plain PyTorch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def qkv_activation(
    from_z: Tensor, from_x: Tensor, bias: Tensor | None, heads: int, keys: int, values: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`(q, k, v, log_decay)`: `[N, H, K]` twice, `[N, H, V]`, and `[N, H]` in fp32 at least, or None without a bias.

    Args:
        from_z: `[N, 2 H K + ...]`, columns of q, then of k, then others that are left alone.
        from_x: `[N, H V + ...]`, columns of v, then with a bias one a head.
        bias: `[H]`, added to the decay's columns; None for no decay.
    """
    wide, wide_values = heads * keys, heads * values
    q, k = F.silu(from_z[:, : 2 * wide]).unflatten(1, (2, heads, keys)).unbind(1)
    v = F.silu(from_x[:, :wide_values]).unflatten(1, (heads, values))
    if bias is None:
        return q, k, v, None
    inner = torch.float64 if from_x.dtype == torch.float64 else torch.float32
    dt = from_x[:, wide_values : wide_values + heads].to(inner) + bias.to(inner)
    return q, k, v, -F.softplus(dt)
