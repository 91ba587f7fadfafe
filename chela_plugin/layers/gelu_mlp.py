"""A vision block's MLP as one node of autograd: eager training on a GPU, for any mixer, as in residual.py.

timm's `Mlp` is the definition. There GELU's input and output are both kept, four tensors of a block's 22 of the width
D each; here its output is made again, and is gone before its gradient comes, whose pass sums the first bias's too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chela_plugin.kernels.precision import as_type

from .fused import exactly, fusible, product


def mlp_of(mlp: nn.Module, x: Tensor) -> Tensor:
    """`mlp(x)`, by the node where it can stand for the module."""
    if not torch.is_grad_enabled() or not stands_for(mlp, x):
        return mlp(x)
    first, second = mlp.fc1, mlp.fc2
    assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
    return FusedMlp.apply(x, first.weight, first.bias, second.weight, second.bias)


def stands_for(mlp: Any, x: Tensor) -> bool:
    """Whether calling the module would be two plain linear layers with biases and GELU, in x's dtype, unobserved."""
    if (type(mlp).__name__, type(mlp).__module__) != ("Mlp", "timm.layers.mlp"):
        return False
    act, first, second = mlp.act, mlp.fc1, mlp.fc2
    if type(act) is not nn.GELU or act.approximate != "none":
        return False
    if not (isinstance(first, nn.Linear) and isinstance(second, nn.Linear) and type(mlp.norm) is nn.Identity):
        return False
    drops = (mlp.drop1, mlp.drop2)
    if first.bias is None or second.bias is None or (mlp.training and any(drop.p for drop in drops)):
        return False
    for module in (mlp, act, mlp.norm, *drops):
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return False
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != x.dtype:
        return False
    return fusible(x, (first, second), first.bias, second.bias)


class FusedMlp(torch.autograd.Function):
    """`GELU(x A' + a) B' + b` with weights A `[M, D]` and B `[D, M]`; x `[..., D]`, in x's dtype."""

    @staticmethod
    def forward(ctx, x, first, first_bias, second, second_bias):
        rows = x.reshape(-1, x.shape[-1])
        ctx.dtypes = [t.dtype for t in (first, first_bias, second, second_bias)]
        with exactly(x):
            first, first_bias, second, second_bias = (t.to(x.dtype) for t in (first, first_bias, second, second_bias))
            hidden = torch.addmm(first_bias, rows, first.T)
            out = torch.addmm(second_bias, F.gelu(hidden), second.T)
        ctx.save_for_backward(x, hidden, first, second)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        from chela_plugin.kernels.gelu import launch as gelu

        x, hidden, first, second = ctx.saved_tensors
        rows, dout = x.reshape(-1, x.shape[-1]), dout.to(x.dtype).reshape(-1, dout.shape[-1])
        with exactly(x):
            dsecond, dsecond_bias = product(dout.T, F.gelu(hidden), ctx.dtypes[2]), dout.sum(0, dtype=torch.float32)
            dhidden, dfirst_bias = gelu.gradient(hidden, dout @ second)
            gradients = (product(dhidden.T, rows, ctx.dtypes[0]), dfirst_bias, dsecond, dsecond_bias)
            dx = (dhidden @ first).view(x.shape)
        return dx, *(as_type(gradient, dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True))
