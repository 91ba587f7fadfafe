"""A block's MLP in fewer passes on a GPU, its SiLU by fla's kernels where fla is installed.

The composed form (`model.py: SwiGLU`) is the definition. Fused it is one node of autograd: the gradients of the two
products of its input are summed in the product, and SiLU(gate) * up is not kept but made again in its gradient's pass.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Kernels(NamedTuple):
    """fla's: `swiglu(gate, up, output_contiguous)`, and `swiglu_both(gate, up, d, use_weight, output_contiguous)` to
    the gradients of gate and up and SiLU(gate) * up."""

    swiglu: Callable[..., Tensor]
    swiglu_both: Callable[..., tuple[Tensor, Tensor, Tensor]]


@functools.cache
def fla_kernels() -> Kernels | None:
    """None where fla can't be imported."""
    try:
        from fla.modules.activations.ops import swiglu_fwd, swiglu_fwdbwd
    except Exception:  # a mismatch of fla with torch, triton or transformers takes many forms
        return None
    return Kernels(swiglu_fwd, swiglu_fwdbwd)


def kernels_for(x: Tensor, linears: tuple[nn.Linear, ...]) -> Kernels | None:
    """fla's kernels where they can stand for these modules: eager, on a GPU, one dtype, without hooks or adapters."""
    if not x.is_cuda or x.dtype == torch.float64 or torch.compiler.is_compiling() or torch.is_autocast_enabled("cuda"):
        return None
    if (
        type(x) is not Tensor
        or torch._C._len_torch_dispatch_stack() > 0
        or os.environ.get("CHELA_BACKEND") == "reference"
    ):
        return None
    return fla_kernels() if plain(linears, x.dtype) else None


def plain(linears: tuple[nn.Linear, ...], dtype: torch.dtype) -> bool:
    """Whether every module is torch's own class with an ordinary weight of `dtype` and without hooks."""
    return all(
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and module.weight.dtype == dtype
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        for module in linears
    )


class GatedMLP(torch.autograd.Function):
    """`(SiLU(x G') * x U') D'` with weights G, U `[M, D]` and D `[D, M]`; x `[..., D]`."""

    @staticmethod
    def forward(ctx, x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor, kernels: Kernels):
        rows = x.reshape(-1, x.shape[-1])
        gate, up = rows @ gate_weight.T, rows @ up_weight.T
        ctx.kernels = kernels
        ctx.save_for_backward(x, gate_weight, up_weight, down_weight, gate, up)
        return (kernels.swiglu(gate, up, output_contiguous=True) @ down_weight.T).view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        x, gate_weight, up_weight, down_weight, gate, up = ctx.saved_tensors
        rows, dout = x.reshape(-1, x.shape[-1]), dout.reshape(-1, dout.shape[-1])
        dhidden = dout @ down_weight
        dgate, dup, hidden = ctx.kernels.swiglu_both(gate, up, dhidden, use_weight=True, output_contiguous=True)
        ddown = dout.T @ hidden
        dx = (dgate @ gate_weight).addmm_(dup, up_weight).view(x.shape)
        return dx, dgate.T @ rows, dup.T @ rows, ddown, None
