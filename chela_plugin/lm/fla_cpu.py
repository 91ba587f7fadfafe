"""SwiGLU for fla's MLP where there is no Triton driver: what a fla model with mixers of ours lacks to run on a CPU.

fla's MLP calls a Triton kernel even with `fuse_swiglu=False`. Its functions take other implementations by registration
(`fla.backends.register`); these two are offered on machines without a driver only, where the kernel could not run.
"""

from __future__ import annotations

import torch.nn.functional as F
from fla.backends import BaseBackend, register
from fla.modules.activations.ops import swiglu_fwd, swiglu_fwdbwd
from fla.utils import device_platform
from torch import Tensor


class TorchOnCpu(BaseBackend):
    """Plain PyTorch, where fla found no accelerator."""

    backend_type = "torch_cpu"

    @classmethod
    def is_available(cls) -> bool:
        return device_platform == "cpu"


@register(swiglu_fwd, backend=TorchOnCpu)
def swiglu_forward(x: Tensor, y: Tensor, output_contiguous: bool = False) -> Tensor:
    """`SiLU(x) y`."""
    return F.silu(x) * y


@register(swiglu_fwdbwd, backend=TorchOnCpu)
def swiglu_backward(
    x: Tensor, y: Tensor, g: Tensor, use_weight: bool = False, output_contiguous: bool = False
) -> tuple[Tensor, ...]:
    """Gradients of x and y for the output's gradient `g`, and the output again with `use_weight`."""
    gate = x.sigmoid()
    silu = x * gate
    gradients = g * y * (gate + silu * (1 - gate)), g * silu
    return (*gradients, silu * y) if use_weight else gradients
