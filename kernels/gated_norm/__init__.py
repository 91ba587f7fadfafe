"""What follows a linear attention in one pass: skip, root-mean-square norm of each head, weight, SiLU gate.

`reference.py` is the definition, `triton.py` the kernels, `ops.py` what torch sees of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chela_plugin.kernels.backend import backend, traced
from chela_plugin.kernels.precision import without_autocast

from . import reference

__all__ = ["gated_norm"]


def gated_norm(
    o: Tensor,
    weight: Tensor,
    gate: Tensor | None = None,
    *,
    v: Tensor | None = None,
    skip: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`RMSNorm_head(o + skip v) weight SiLU(gate)`; differentiable in every tensor.

    In plain PyTorch these are five operations, which read or write 14 tensors of o's size where 4 do.

    Args:
        o: `[B, T, H, V]`, fp16, bf16, fp32 or (plain PyTorch only) fp64.
        weight: `[H, V]`.
        gate: `[B, T, H V]`, before its SiLU, of o's dtype; None leaves it out.
        v, skip: `[B, T, H, V]` of o's dtype and `[H]`; both or neither.
        eps: added to the mean square.

    Returns `[B, T, H V]` in o's dtype; computed in fp32 at least. Rows of v and gate may be views into wider rows.

    Raises ValueError for shapes or dtypes that do not fit.
    """
    if o.dim() != 4 or weight.shape != o.shape[2:]:
        raise ValueError(f"o is [B, T, H, V] and weight [H, V], got {list(o.shape)} and {list(weight.shape)}")
    if (v is None) != (skip is None):
        raise ValueError("v and skip go together: pass both or neither")
    if v is not None and skip is not None and (v.shape != o.shape or skip.shape != o.shape[2:3]):
        raise ValueError(f"v is like o {list(o.shape)} and skip [H], got {list(v.shape)} and {list(skip.shape)}")
    if gate is not None and gate.shape != (*o.shape[:2], o.shape[2] * o.shape[3]):
        raise ValueError(f"gate is [B, T, H V] for o {list(o.shape)}, got {list(gate.shape)}")
    for name, other in (("v", v), ("gate", gate)):
        if other is not None and other.dtype != o.dtype:
            raise ValueError(f"{name} must have o's dtype {o.dtype}, got {other.dtype}")
    if backend(o.device, o.dtype) == "triton" and o.numel():
        from . import ops

        learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (o, v, skip, weight, gate))
        # Without a gradient an eager call goes round the dispatcher, which costs more host time than the launch.
        run = ops.forward_op if learns or traced(o) else ops.forward
        return run(o, v, skip, weight, gate, float(eps))
    with without_autocast(o):
        return reference.gated_norm(o, v, skip, weight, gate, eps)
