"""One decoding step of a causal short-long convolution whose long kernel is modal: `modal_step`.

`reference.py` is the definition, `triton.py` the kernel: spelled out in torch a step is some 40 launches a layer, and
launches are what decoding a small batch costs.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from chela_plugin.kernels.backend import backend, multiplied_as, ready_for, traced
from chela_plugin.kernels.launching import Launcher
from chela_plugin.kernels.precision import without_autocast

from . import reference

__all__ = ["modal_step", "runs_here"]

CHANNELS = 64  # of a program


@functools.cache
def _launcher() -> Launcher:
    from . import triton as kernels

    return Launcher(kernels.step)


def runs_here(x: Tensor) -> bool:
    """Whether a kernel takes a step of x: Triton, no gradient, nothing that records operators."""
    return not torch.is_grad_enabled() and not traced(x) and backend(x.device, x.dtype) == "triton"


def modal_step(
    x: Tensor,
    history: Tensor,
    state: Tensor,
    short: Tensor,
    long_scale: Tensor,
    bias: Tensor,
    modes: tuple[Tensor, Tensor, Tensor],
    *,
    silu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, history and state after one more token; formulas in `reference.py`.

    Args:
        x: `[B, D]`.
        history: `[B, K - 1, D]` of x's dtype, the last inputs, the newest last; zeros before the first.
        state: `[B, D, M]` complex64 (complex128 for fp64): sum over the inputs so far of p^age x.
        short: `[D, K]`, tap 0 at lag 0.
        long_scale, bias: `[D]`.
        modes: `log_time`, `frequency` `[groups, M]` and `residue` `[groups, M, 2]`; neighbours share a group.
        silu: SiLU of the output.

    Returns `(y [B, D], history, state)`. Where `runs_here`, history and state are the tensors given, overwritten, so
    that a CUDA graph finds them where they were; else new ones, through which gradients flow. Computed in fp32 at
    least.
    """
    if not runs_here(x):
        with without_autocast(x):
            y, history, state = reference.step(x, history, state, short, long_scale, bias, modes)
            return torch.nn.functional.silu(y) if silu else y, history, state
    batch, channels = x.shape
    log_time, frequency, residue = (p.contiguous() for p in modes)
    groups, count = log_time.shape
    dtype, held, state = x.dtype, history.contiguous(), state.contiguous()
    x, history = x.to(multiplied_as(x)), held.to(multiplied_as(x))
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty_like(x)
    parts = torch.view_as_real(state)
    with ready_for(x):
        _launcher()(
            (batch, -(-channels // CHANNELS)),
            (x, history, parts, short, bias, long_scale, log_time, frequency, residue, y), (channels, x.stride(0)),
            TAPS=short.shape[1], SILU=silu, GROUP=channels // groups, M=count,
            BM=max(2, 1 << (count - 1).bit_length()), BD=CHANNELS, num_warps=2,
        )  # fmt: skip
    if history is not held:
        held.copy_(history)
    return y.to(dtype), held, state
