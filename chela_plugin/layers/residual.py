"""What a host does between two branches of its blocks, for any mixer: the residual sum and the next branch's norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from chela_plugin.kernels.add_norm import add_norm, add_rms_norm
from chela_plugin.kernels.backend import backend, traced


def sum_and_norm(x: Tensor, branch: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """`(s, norm(s))` with s = x + branch; in one pass where a kernel can stand for the norm.

    There the norm's output has autocast's dtype right away, which every projection behind it would round it to.
    """
    if stands_for(norm, x):
        assert isinstance(norm, nn.LayerNorm | nn.RMSNorm)
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else None
        if isinstance(norm, nn.RMSNorm):
            eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps  # torch's rule
            return add_rms_norm(x, branch, norm.weight, eps, dtype)
        return add_norm(x, branch, norm.weight, norm.bias, norm.eps, dtype)
    s = x if branch is None else x + branch
    return s, norm(s)


def stands_for(norm: nn.Module, x: Tensor) -> bool:
    """Whether the kernel computes what calling the norm would: over the last dim, without hooks, eager."""
    if traced(x) or backend(x.device, x.dtype) != "triton":
        return False
    kind = type(norm)
    # timm's class of this name chooses between torch's functions; its others norm another dim or dtype.
    if kind not in (nn.LayerNorm, nn.RMSNorm) and (kind.__name__, kind.__module__) != ("LayerNorm", "timm.layers.norm"):
        return False
    return (
        norm.weight is not None
        and (kind is nn.RMSNorm or norm.bias is not None)
        and norm.normalized_shape == x.shape[-1:]
        and not (norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks)
    )
