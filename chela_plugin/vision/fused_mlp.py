"""A block's MLP as one node of autograd: eager training on a GPU.

timm's module is the definition. There GELU's input and output are both kept, four tensors of a block's 22 of the width
D each; here its output is made again, and is gone before its gradient comes, whose pass sums the first bias's too.
"""

from __future__ import annotations

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

# chela_plugin.layers is imported where it is used: a backbone with other mixers imports none of ours.


def mlp_of(mlp: nn.Module, x: Tensor) -> Tensor:
    """`mlp(x)`, by the node where it can stand for the module."""
    if not torch.is_grad_enabled() or not stands_for(mlp, x):
        return mlp(x)
    assert isinstance(mlp, Mlp)
    first, second = mlp.fc1, mlp.fc2
    assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
    return FusedMlp.apply(x, first.weight, first.bias, second.weight, second.bias)


def stands_for(mlp: nn.Module, x: Tensor) -> bool:
    """Whether calling the module would be two plain linear layers with biases and GELU, in x's dtype, unobserved."""
    from chela_plugin.layers.fused import fusible

    if type(mlp) is not Mlp or type(mlp.act) is not nn.GELU or mlp.act.approximate != "none":
        return False
    if not (isinstance(mlp.fc1, nn.Linear) and isinstance(mlp.fc2, nn.Linear) and type(mlp.norm) is nn.Identity):
        return False
    if mlp.fc1.bias is None or mlp.fc2.bias is None or (mlp.training and (mlp.drop1.p or mlp.drop2.p)):
        return False
    for module in (mlp, mlp.act, mlp.norm, mlp.drop1, mlp.drop2):
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return False
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != x.dtype:
        return False
    return fusible(x, (mlp.fc1, mlp.fc2), mlp.fc1.bias, mlp.fc2.bias)


class FusedMlp(torch.autograd.Function):
    """`GELU(x A' + a) B' + b` with weights A `[M, D]` and B `[D, M]`; x `[..., D]`, in x's dtype."""

    @staticmethod
    def forward(ctx, x, first, first_bias, second, second_bias):
        from chela_plugin.layers.fused import exactly

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
        from chela_plugin.layers.fused import exactly, product

        x, hidden, first, second = ctx.saved_tensors
        rows, dout = x.reshape(-1, x.shape[-1]), dout.to(x.dtype).reshape(-1, dout.shape[-1])
        with exactly(x):
            dsecond, dsecond_bias = product(dout.T, F.gelu(hidden), ctx.dtypes[2]), dout.sum(0, dtype=torch.float32)
            dhidden, dfirst_bias = gelu.gradient(hidden, dout @ second)
            gradients = (product(dhidden.T, rows, ctx.dtypes[0]), dfirst_bias, dsecond, dsecond_bias)
            dx = (dhidden @ first).view(x.shape)
        return dx, *(gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True))
