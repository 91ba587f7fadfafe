"""One decoding step of a causal short-long convolution whose long kernel is modal: `modal_step`.

Spelled out in torch it is some 40 launches a layer, and launches are what decoding a small batch costs. The definition
is `layers/short_long_conv.py` (`continued`); this runs without a gradient where Triton runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chela_plugin.kernels.backend import backend, multiplied_as, ready_for

__all__ = ["modal_step", "runs_here"]

CHANNELS = 64  # of a program


def runs_here(x: Tensor) -> bool:
    """Whether `modal_step` can run on x: Triton, no gradient, nothing that records operators."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or type(x) is not Tensor:
        return False
    return backend(x.device, x.dtype) == "triton"


def modal_step(
    x: Tensor,
    history: Tensor,
    state: Tensor,
    short: Sequence[Tensor],
    scales: Tensor | None,
    long_scale: Tensor,
    bias: Tensor,
    modes: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, history and state after one more token.

    Args:
        x: `[B, D]`.
        history: `[B, S, D]` of x's dtype, the last S inputs, the newest last; S at most the widest kernel less one.
        state: `[B, D, M]` complex64: sum over the inputs so far of p^age x.
        short: the short kernels, `[D, k]` each, tap 0 at lag 0.
        scales: `[branches, D]`, one row a short kernel; None for kernels that are scaled already.
        long_scale, bias: `[D]`.
        modes: `log_time`, `frequency` `[groups, M]` and `residue` `[groups, M, 2]`; neighbours share a group.

    Returns `(y [B, D], history, state)`, new tensors; computed in fp32.
    """
    batch, channels = x.shape
    log_time, frequency, residue = (p.detach().contiguous() for p in modes)
    groups, count = log_time.shape
    widest = max((kernel.shape[1] for kernel in short), default=1)
    taps = torch.cat([kernel.detach() for kernel in short], dim=1) if short else x.new_zeros(channels, 1)
    lags = tuple(lag for kernel in short for lag in range(kernel.shape[1])) or (0,)
    branches = tuple(i for i, kernel in enumerate(short) for _ in range(kernel.shape[1])) or (0,)
    seen, kept = history.shape[1], min(history.shape[1] + 1, widest - 1)
    dtype = x.dtype
    x, history = x.to(multiplied_as(x)), history.to(multiplied_as(x))
    x = x if x.stride(1) == 1 else x.contiguous()
    history = history if history.stride(2) == 1 else history.contiguous()
    y, new_history = torch.empty_like(x), x.new_empty(batch, kept, channels)
    before = torch.view_as_real(state.contiguous())
    after = torch.empty_like(before)
    with ready_for(x):
        from . import triton as kernels

        kernels.step[(batch, -(-channels // CHANNELS))](
            x, history, before, taps, bias if scales is None else scales.detach().contiguous(), long_scale, bias,
            log_time, frequency, residue, y, new_history, after, channels, seen, kept,
            x.stride(0), history.stride(0), history.stride(1),
            LAGS=lags, BRANCHES=branches, TAPS=len(lags), WIDEST=widest, SCALED=scales is not None,
            GROUP=channels // groups, M=count, BM=max(2, 1 << (count - 1).bit_length()), BD=CHANNELS, num_warps=2,
        )  # fmt: skip
    return y.to(dtype), new_history.to(dtype), torch.view_as_complex(after)
