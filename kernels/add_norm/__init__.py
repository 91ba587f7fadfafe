"""A residual sum and the layer or RMS norm behind it in one pass, eager: what stands between two branches of a block.

`reference.py` is the definition, `triton.py` the kernels, `launch.py` their launches. There is no operator of torch
here: while torch records, the plain form runs, which a compiler fuses by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chela_plugin.kernels.backend import backend, traced

from . import reference

__all__ = ["add_norm", "add_rms_norm"]

MAX_DIM = 8192  # a row of more would not fit the registers of a program


def add_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-5, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """`(s, y)`: s = x + branch and y = LayerNorm(s); differentiable in all four tensors.

    Args:
        x: `[..., D]`; the residual stream, fp16, bf16, fp32 or (plain PyTorch only) fp64.
        branch: like x, in any of these dtypes, or None for nothing to add: s is then x.
        weight, bias: `[D]`.
        dtype: of y; by default s's.

    Returns s in the wider dtype of x and branch. Statistics are in fp32 at least. In separate operations a bf16 branch
    on an fp32 stream is three passes that move 22 bytes a number, under autocast; here one that moves 12.

    Raises ValueError for shapes that do not fit.
    """
    return _run(x, branch, weight, bias, eps, dtype)


def add_rms_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, eps: float = 1e-5, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """`(s, y)`: s = x + branch and y = RMSNorm(s) = weight * s / sqrt(mean(s^2) + eps) (arXiv:1910.07467).

    Otherwise as `add_norm`. Forward and backward it reads or writes 8 tensors of x's size; fla's norm with its residual
    took 2.0 times as long in a trial on an H100 (`benchmarks/NOTES-layers.md`).
    """
    return _run(x, branch, weight, None, eps, dtype)


def _run(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.shape != x.shape[-1:]:
            raise ValueError(f"{name} is [D] = [{x.shape[-1]}], got {list(value.shape)}")
    if branch is not None and branch.shape != x.shape:
        raise ValueError(f"the branch is of x's shape {list(x.shape)}, got {list(branch.shape)}")
    wide = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
    dtype = dtype or wide
    if backend(x.device, wide) == "triton" and not traced(x) and x.numel() and x.shape[-1] <= MAX_DIM:
        from . import launch

        x, branch = x.contiguous(), None if branch is None else branch.contiguous()
        tensors = (x, branch, weight, bias)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            return launch.AddNorm.apply(*tensors, eps, dtype)
        return launch.forward(*tensors, eps, dtype, False)[:2]
    return reference.add_norm(x, branch, weight, bias, eps, dtype)
