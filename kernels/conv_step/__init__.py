"""One decoding step of a causal short-long convolution whose long kernel is a list of taps: `conv_step`.

`reference.py` is the definition, `triton.py` the kernel. Nothing in it depends on the place in the sequence but a
number in memory, so that a CUDA graph of a step serves all of them.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from chela_plugin.kernels.backend import backend, multiplied_as, ready_for, traced
from chela_plugin.kernels.launching import Launcher
from chela_plugin.kernels.precision import without_autocast

from . import reference

__all__ = ["conv_step"]

CHANNELS = 32  # of a program


@functools.cache
def _launcher() -> Launcher:
    from . import triton as kernels

    return Launcher(kernels.step)


def conv_step(
    x: Tensor,
    inputs: Tensor,
    ahead: Tensor,
    position: Tensor,
    short: Tensor,
    long: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    block: int,
    silu: bool = False,
) -> Tensor:
    """One more token: its output `[B, D]`, and x at its place in `inputs`. Formulas in `reference.py`; no gradient.

    Args:
        x: `[B, D]`.
        inputs: `[B, capacity, D]` of x's dtype: the inputs so far, each at its place. Overwritten at one place.
        ahead: `[B, capacity, D]`, fp32 at least: at a place p what all blocks before p's own add to its long part.
        position: `[B]` int64, x's place in its row, below the capacity; the same in all rows.
        short: `[D, K]`, tap 0 at lag 0.
        long: `[groups, L]`, L at least `block` or the capacity; neighbouring channels share a group.
        scale, bias: `[D]`, the scale of the long part and the bias.
        block: places of a block, a power of two.
        silu: SiLU of the output.

    Returns y, summed in fp32 at least.
    """
    if traced(x) or backend(x.device, x.dtype) != "triton":
        with torch.no_grad(), without_autocast(x):
            y = reference.step(x, inputs, ahead, position, short, long, scale, bias, block)
            return torch.nn.functional.silu(y) if silu else y
    batch, channels = x.shape
    dtype, held = x.dtype, inputs
    x, inputs = x.to(multiplied_as(x)), inputs.to(multiplied_as(x))
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty_like(x)
    taps = short.shape[1]
    window = max(block, 1 << (taps - 1).bit_length())
    with ready_for(x):
        _launcher()(
            (batch, -(-channels // CHANNELS)), (x, inputs, ahead, position, short, long, scale, bias, y),
            (channels, long.shape[1], x.stride(0), inputs.stride(0), ahead.stride(0), long.stride(0)),
            TAPS=taps, BLOCK=block, WINDOW=window, SILU=silu, GROUP=channels // len(long), BD=CHANNELS, num_warps=4,
        )  # fmt: skip
    if inputs is not held:
        held.copy_(inputs)
    return y.to(dtype)
