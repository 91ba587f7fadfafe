"""Depthwise convolution of images whose channels stand innermost: k x k taps plus a row and a column kernel.

`reference.py` is the definition, `triton.py`, `triton_norm.py` and `triton_planes.py` are the kernels, `launch.py`
launches them, `ops.py` is what torch sees of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chela_plugin.kernels.backend import backend, traced
from chela_plugin.kernels.precision import without_autocast

from . import reference

__all__ = ["grid_conv", "grid_conv_norm"]


def grid_conv(
    x: Tensor,
    short: Tensor | None = None,
    cross: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    """Convolution of every channel with a k x k kernel, plus a row kernel and a column kernel; zeros outside.

    Args:
        x: `[B, h, w, D]`, in memory in this order (the tokens `[B, T, D]` of an image are); else it is copied.
        short: `[D, k, k]`, k odd; a convolution's, not a correlation's.
        cross: `[4, G, L]`, L at least max(h, w): taps of lags 0 to L - 1 to the right, left, down and up. Both lags 0
            count, the left's and the up's are unused. D / G neighbouring channels share each.
        scale: `[D]`, of the cross.
        bias: `[D]`.
        silu: SiLU of the result, in the same pass, and its gradient too.

    Returns `[B, h, w, D]` in x's dtype; sums run in fp32 at least. Differentiable in every tensor.

    Raises ValueError for shapes that do not fit.
    """
    check(x, [] if short is None else [short], cross)
    for name, tensor in (("scale", scale), ("bias", bias)):
        if tensor is not None and tensor.shape != x.shape[3:]:
            raise ValueError(f"{name} is [D] = [{x.shape[3]}], got {list(tensor.shape)}")
    if scale is not None and cross is None:
        raise ValueError("scale is the cross kernels': pass cross too")
    if fits(x):
        from . import ops

        if traced(x):
            return ops.forward_op(x, short, cross, scale, bias, silu, torch.is_grad_enabled())[0]
        tensors = (x, short, cross, scale, bias)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            return ops.Eager.apply(*tensors, silu)
        return ops.forward(*tensors, silu, False)[0]
    with without_autocast(x):
        return reference.grid_conv(x, short, cross, scale, bias, silu)


def grid_conv_norm(
    x: Tensor,
    shorts: Sequence[Tensor],
    cross: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    running: Sequence[tuple[Tensor, Tensor]] | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    silu: bool = False,
) -> Tensor:
    """Each short kernel and the cross as a branch of its own under a batch norm of its own, summed: training.

        sum_i weight_i (y_i - mean_i) / sqrt(var_i + eps) + bias_i,    y_i the convolution of x with kernel i

    with mean and variance of each channel over the batch and the grid.

    Args:
        x, cross, silu: see `grid_conv`.
        shorts: each `[D, k, k]`.
        weights, biases: `[D]` each, of the short branches and then of the cross.
        running: of each branch the running mean and variance `[D]` in fp32, moved by `momentum` towards this batch's
            in place, the variance's unbiased; None to leave them.

    Returns `[B, h, w, D]` in x's dtype. Differentiable in x, shorts, cross, weights and biases.
    """
    check(x, shorts, cross)
    expected = len(shorts) + (cross is not None)
    if len(weights) != expected or len(biases) != expected or (running is not None and len(running) != expected):
        raise ValueError(f"{expected} branches need as many weights and biases, got {len(weights)} and {len(biases)}")
    if fits(x) and not traced(x):
        from . import ops

        return ops.Normed.apply(x, cross, len(shorts), running, momentum, eps, silu, *shorts, *weights, *biases)
    branches = [grid_conv(x, short) for short in shorts]
    if cross is not None:
        branches.append(grid_conv(x, None, cross))
    with without_autocast(x):
        y, means, variances = reference.normed(
            branches, torch.stack(list(weights)), torch.stack(list(biases)), eps, silu
        )
        if running is not None:
            places = x.numel() // x.shape[3]
            with torch.no_grad():
                for (mean, var), new_mean, new_var in zip(running, means, variances, strict=True):
                    mean.lerp_(new_mean.to(mean.dtype), momentum)
                    var.lerp_((new_var * (places / max(places - 1, 1))).to(var.dtype), momentum)
    return y


def check(x: Tensor, shorts: Sequence[Tensor], cross: Tensor | None) -> None:
    if x.dim() != 4:
        raise ValueError(f"x is [B, h, w, D], got {list(x.shape)}")
    if not shorts and cross is None:
        raise ValueError("a convolution needs taps: a short kernel, a cross, or both")
    h, w, dim = x.shape[1:]
    for short in shorts:
        if short.dim() != 3 or short.shape[0] != dim or short.shape[1] != short.shape[2] or short.shape[1] % 2 == 0:
            raise ValueError(f"short is [D, k, k] with D = {dim} and k odd, got {list(short.shape)}")
    if cross is not None and (cross.dim() != 3 or cross.shape[0] != 4 or dim % max(cross.shape[1], 1)):
        raise ValueError(f"cross is [4, G, L] with G a divisor of D = {dim}, got {list(cross.shape)}")
    if cross is not None and cross.shape[2] < max(h, w):
        raise ValueError(f"cross has {cross.shape[2]} taps each way, and a grid of {h} x {w} needs {max(h, w)}")


def fits(x: Tensor) -> bool:
    """Whether the kernels take it: they address one image in 32 bits."""
    return backend(x.device, x.dtype) == "triton" and x.numel() > 0 and x[0].numel() < 2**31
