"""Launches of the two kernels. Nothing here looks at a value, so every launch can go into a CUDA graph."""

from __future__ import annotations

import torch
from torch import Tensor

from chela_plugin.kernels.backend import ceil_div, next_power_of_2, ready_for
from chela_plugin.kernels.launching import Launcher

from . import triton as kernels

activation, activation_gradient = Launcher(kernels.activate), Launcher(kernels.gradient)
ROWS, COLUMNS = 16, 256  # of a program's block: 16 numbers a thread of eight warps


def activate(
    from_z: Tensor, from_x: Tensor, bias: Tensor | None, heads: int, keys: int, values: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As `reference.qkv_activation`, with q and k as views into one buffer; last dims dense."""
    rows, wide, wide_values = from_z.shape[0], heads * keys, heads * values
    qk = torch.empty(rows, 2 * wide, dtype=from_z.dtype, device=from_z.device)
    v = torch.empty(rows, heads, values, dtype=from_z.dtype, device=from_z.device)
    log_decay = None
    if bias is not None:
        log_decay = torch.empty(rows, heads, dtype=torch.float32, device=from_z.device)
    blocks = ceil_div(2 * wide, COLUMNS) + ceil_div(wide_values, COLUMNS) + (bias is not None)
    with ready_for(from_z):
        activation(
            (ceil_div(rows, ROWS), blocks),
            (from_z, from_x, from_x if bias is None else bias, qk, v, qk if log_decay is None else log_decay),
            (rows, from_z.stride(0), from_x.stride(0), 2 * wide), QK=2 * wide, VALUES=wide_values, H=heads,
            DECAY=bias is not None, BR=ROWS, BC=COLUMNS, BH=next_power_of_2(heads), num_warps=8,
        )  # fmt: skip
    q, k = qk.view(rows, 2, heads, keys).unbind(1)
    return q, k, v, log_decay


def activate_qk(from_z: Tensor, heads: int, keys: int) -> tuple[Tensor, Tensor]:
    """q and k of `activate` alone."""
    rows, wide = from_z.shape[0], heads * keys
    qk = torch.empty(rows, 2 * wide, dtype=from_z.dtype, device=from_z.device)
    with ready_for(from_z):
        activation(
            (ceil_div(rows, ROWS), ceil_div(2 * wide, COLUMNS)), (from_z, from_z, from_z, qk, qk, qk),
            (rows, from_z.stride(0), from_z.stride(0), 2 * wide), QK=2 * wide, VALUES=0, H=heads, DECAY=False, BR=ROWS,
            BC=COLUMNS, BH=next_power_of_2(heads), num_warps=8,
        )  # fmt: skip
    q, k = qk.view(rows, 2, heads, keys).unbind(1)
    return q, k


def gradient(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    do: Tensor | None,
    dlog_decay: Tensor | None,
    from_z: Tensor,
    from_x: Tensor,
    bias: Tensor | None,
    skip: Tensor | None,
    dfrom_z: Tensor,
    dfrom_x: Tensor,
) -> Tensor | None:
    """Writes the gradients of from_z's columns of q and k and of all of from_x's columns; returns that of bias, fp32.

    Args:
        dq, dk, dv: `[..., H, K]`, `[..., H, K]`, `[..., H, V]`, of N rows in all.
        do, skip: gradient of the attention's output `[..., H, V]` and `[H]`, for an output o + skip v; or None.
        dlog_decay: `[..., H]`, with bias.
        dfrom_z: `[N, at least 2 H K]` as wide as the caller likes; dfrom_x: `[N, H V + columns of the decay, padded]`.
    """
    rows, heads = from_z.shape[0], dq.shape[-2]
    wide, wide_values = heads * dq.shape[-1], heads * dv.shape[-1]
    dq, dk, dv = dq.contiguous(), dk.contiguous(), dv.contiguous()
    do = dv if do is None else do.contiguous()
    programs = ceil_div(rows, ROWS)
    dbias = torch.empty(programs if bias is not None else 0, heads, dtype=torch.float32, device=dq.device)
    pad = dfrom_x.shape[1] - wide_values
    blocks = 2 * ceil_div(wide, COLUMNS) + ceil_div(wide_values, COLUMNS) + (bias is not None)
    with ready_for(from_z):
        activation_gradient(
            (programs, blocks),
            (dq, dk, dv, do, dq if dlog_decay is None else dlog_decay.contiguous(), from_z, from_x,
             dq if bias is None else bias, dq if skip is None else skip, dfrom_z, dfrom_x, dbias),
            (rows, from_z.stride(0), from_x.stride(0), dfrom_z.stride(0), dfrom_x.stride(0)),
            KEYS=wide, VALUES=wide_values, V=dv.shape[-1], H=heads, PAD=pad, DECAY=bias is not None,
            SKIP=skip is not None, BR=ROWS, BC=COLUMNS, BH=next_power_of_2(max(heads, pad)), num_warps=8,
        )  # fmt: skip
    return None if bias is None else dbias.sum(0)
