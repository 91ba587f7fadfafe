"""Layers and models of other packages, as a suite times them. Imported only where a case asks for one."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chela_plugin.bench.cases import Unavailable
from chela_plugin.kernels.peers import bare_mamba_ssm


def fla(module: str) -> Any:
    """A module of fla. Raises Unavailable without fla."""
    mamba_ssm_importable()  # fla's Mamba-2 asks for it when it is imported
    try:
        return importlib.import_module(f"fla.{module}")
    except Exception as error:  # a mismatch of fla with torch, triton or transformers takes many forms
        raise Unavailable(
            f"fla can't be imported ({type(error).__name__}: {error}); pip install 'chela-plugin[lm]'"
        ) from error


def needs_cuda(device: torch.device, what: str) -> None:
    if device.type != "cuda":
        raise Unavailable(f"{what} needs a CUDA device")


def mamba_ssm_importable() -> str | None:
    """Make mamba_ssm's Triton modules importable; None, or the reason why they aren't.

    Its `__init__` asks for the CUDA extension even where only Triton code is wanted. Where that was not built, a bare
    module with the package's path stands in for it.
    """
    found = importlib.util.find_spec("mamba_ssm") if "mamba_ssm" not in sys.modules else None
    if "mamba_ssm" not in sys.modules:
        if found is None or found.submodule_search_locations is None:
            return "mamba_ssm is not installed; pip install 'chela-plugin[mamba]'"
        try:
            importlib.import_module("mamba_ssm")
        except Exception:  # no extension, or an extension for another torch
            for name in [name for name in sys.modules if name == "mamba_ssm" or name.startswith("mamba_ssm.")]:
                del sys.modules[name]
            sys.modules["mamba_ssm"] = bare_mamba_ssm(found)
    try:
        importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    except Exception as error:
        return f"mamba_ssm can't be imported ({type(error).__name__}: {error})"
    return None


def needs_mamba_ssm(device: torch.device) -> None:
    needs_cuda(device, "mamba_ssm")
    reason = mamba_ssm_importable()
    if reason:
        raise Unavailable(reason)


class FlaLayer(nn.Module):
    """A layer of fla that returns its output alone."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def gla_layer(dim: int, device: torch.device) -> nn.Module:
    """fla's GLA layer as the paper has it: 4 heads, keys of dim / 2; about 4 dim^2 parameters."""
    needs_cuda(device, "fla")
    return FlaLayer(fla("layers").GatedLinearAttention(hidden_size=dim, num_heads=4))


def gated_deltanet_layer(dim: int, device: torch.device) -> nn.Module:
    """fla's Gated DeltaNet with keys of dim / 2 and values of dim: about 4 dim^2 parameters."""
    needs_cuda(device, "fla")
    heads = max(dim // 256, 1)
    layer = fla("layers").GatedDeltaNet(hidden_size=dim, head_dim=dim // 2 // heads, num_heads=heads, expand_v=2)
    return FlaLayer(layer)


def mamba2_layer(dim: int, device: torch.device, expand: float) -> nn.Module:
    """fla's Mamba-2 layer on mamba_ssm's Triton kernels.

    In eval mode, gradients and all: in training mode it takes the fused path, which needs the causal_conv1d package.
    """
    needs_mamba_ssm(device)
    return FlaLayer(fla("layers").Mamba2(hidden_size=dim, expand=expand, backend="triton")).eval()


def mamba_ssm_layer(dim: int, device: torch.device, expand: float) -> nn.Module:
    """mamba_ssm's own Mamba-2 module, without its CUDA extension and causal_conv1d: torch's convolution instead."""
    needs_mamba_ssm(device)
    module = importlib.import_module("mamba_ssm.modules.mamba2")
    # It computes widths as expand * dim and needs whole numbers: 1.25 would make a float of them.
    return module.Mamba2(dim, expand=Fraction(expand), use_mem_eff_path=False)


class RotaryAttention(nn.Module):
    """Causal softmax attention as fast as the packages here allow: torch's flash SDPA, fla's fused rotary positions."""

    def __init__(self, dim: int, heads: int, rotary: nn.Module):
        super().__init__()
        self.heads, self.rotary = heads, rotary
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k = self.rotary(q, k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(o.transpose(1, 2).flatten(2))


def rotary_attention_layer(dim: int, device: torch.device, heads: int) -> nn.Module:
    needs_cuda(device, "fla's rotary kernel")
    return RotaryAttention(dim, heads, fla("modules").RotaryEmbedding(dim // heads))
