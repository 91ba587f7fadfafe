"""The residual block of all backbones of ours: a token mixer, then an MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import DropPath, LayerScale, Mlp
from timm.models import named_apply, register_notrace_module
from torch import Tensor, nn

from chela_plugin.registry import MixerSpec, parse_pattern
from chela_plugin.registry.spec import NATIVE
from chela_plugin.residual import called, in_turn
from chela_plugin.unordered import create_unordered_mixer

__all__ = ["MixerBlock"]


@register_notrace_module  # torch.fx: a leaf, since a mixer may branch on the shape of its input
class MixerBlock(nn.Module):
    """Pre-norm block: `x + mixer(norm(x))`, then `x + mlp(norm(x))`; each branch with LayerScale and stochastic depth.

    Args:
        dim: Width D.
        depth: Index of this block in the whole model (timm's name for it).
        mixers: One spec a block, of the whole model.
    """

    __constants__ = ("uses_grid",)

    def __init__(
        self,
        dim: int,
        *,
        depth: int,
        mixers: list[MixerSpec],
        mlp_ratio: float,
        init_values: float | None,
        drop_path: float,
        norm_layer: type[nn.Module],
        act_layer: type[nn.Module],
        device=None,
        dtype=None,
        **_attention: Any,  # num_heads, qkv_bias, ...: VisionTransformer hands them to every block; a mixer has its own
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.dim = dim
        self.norm1 = norm_layer(dim, **dd)
        self.mixer = create_unordered_mixer(mixers[depth], dim, depth=len(mixers), layer_idx=depth, dims=2, **dd)
        self.uses_grid = getattr(self.mixer, "uses_grid", False)
        self.ls1 = LayerScale(dim, init_values=init_values, **dd) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, hidden_features=int(dim * mlp_ratio), act_layer=act_layer, **dd)
        self.ls2 = LayerScale(dim, init_values=init_values, **dd) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """`x` `[B, T, D]`, the patches of a `grid` row by row; returns the same shape."""
        if torch.jit.is_scripting():
            mixed = self.mixer(self.norm1(x), grid=grid) if self.uses_grid else self.mixer(self.norm1(x))
            x = x + self.drop_path1(self.ls1(mixed))
            x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        else:
            x, branch = self.branches(x, None, grid)
            x = x + branch
        return x

    @torch.jit.ignore
    def branches(self, x: Tensor, branch: Tensor | None, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The block on the sum of `x` and `branch`, with the MLP's output returned beside `x` and not yet added.

        So the next block can add it and take its norm in one pass (`sum_and_norm` of mixers that offer it). The MLP,
        too, is run by what the mixer offers for it (`mlp_of`).
        """
        sum_and_norm = getattr(self.mixer, "sum_and_norm", in_turn)
        x, y = sum_and_norm(x, branch, self.norm1)
        mixed = self.mixer(y, grid=grid) if self.uses_grid else self.mixer(y)
        x, y = sum_and_norm(x, self.drop_path1(self.ls1(mixed)), self.norm2)
        return x, self.drop_path2(self.ls2(getattr(self.mixer, "mlp_of", called)(self.mlp, y)))

    @torch.jit.ignore
    def hooked(self) -> bool:
        """Whether something waits for this module to be called, so that `branches` may not stand for it."""
        own = (self._forward_hooks, self._forward_pre_hooks, self._backward_hooks, self._backward_pre_hooks)
        return any(own)


@register_notrace_module  # as above
class PatchConv(nn.Conv2d):
    """A convolution whose stride is its kernel, on a GPU as one matrix product over the patches.

    The tokens then lie as `[B, T, D]` in memory, as every block wants them; cuDNN's result stays transposed, and its
    kernel for three channels took 1.7 ms for 256 images of 224 x 224 on an H100, an eighth of the whole model.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # an `or` would have TorchScript compile what follows
            y = self._conv_forward(x, self.weight, self.bias)
        else:
            y = self.product(x) if self.is_product(x) else self._conv_forward(x, self.weight, self.bias)
        return y

    @classmethod
    def of(cls, conv: nn.Conv2d) -> PatchConv:
        """The same convolution, with the same parameters."""
        ph, pw = conv.kernel_size
        with_bias = conv.bias is not None
        like = cls(conv.in_channels, conv.out_channels, (ph, pw), stride=(ph, pw), bias=with_bias, device="meta")
        like.stride, like.padding = conv.stride, conv.padding
        like.weight, like.bias = conv.weight, conv.bias
        return like.train(conv.training)

    @torch.jit.ignore
    def is_product(self, x: Tensor) -> bool:
        ph, pw = self.kernel_size
        whole = x.shape[-2] % ph == 0 and x.shape[-1] % pw == 0
        return x.is_cuda and x.dim() == 4 and whole and self.stride == self.kernel_size and self.padding == (0, 0)

    @torch.jit.ignore
    def product(self, x: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else self.weight.dtype
        (batch, channels, height, width), (ph, pw) = x.shape, self.kernel_size
        h, w = height // ph, width // pw
        patches = x.new_empty(batch, h, w, channels, ph, pw, dtype=dtype)
        patches.copy_(x.view(batch, channels, h, ph, w, pw).permute(0, 2, 4, 1, 3, 5))  # cast and moved in one pass
        y = nn.functional.linear(patches.flatten(3), self.weight.flatten(1).to(dtype), self.bias)
        return y.permute(0, 3, 1, 2)


def mixers_of(mixer: str, depth: int) -> list[MixerSpec]:
    """One spec a block; `native` is `chela`. Raises TypeError for what is no string, MixerSpecError for a bad one."""
    if not isinstance(mixer, str):
        raise TypeError(f"mixer takes a string such as 'chela' or '3*chela + attention', got {mixer!r}")
    chela = MixerSpec.parse("chela")
    return [chela if spec.name == NATIVE else spec for spec in parse_pattern(mixer).expand(depth)]


def init_weights_outside(
    mixers: list[nn.Module], model: nn.Module, init: Callable[..., None], reset: Callable[..., None]
) -> None:
    """Apply `init` to every module of `model`, children first, but `reset` to those in `mixers`, and to their parts."""
    inside = {id(module) for mixer in mixers for module in mixer.modules()}

    def init_module(module: nn.Module, name: str) -> None:
        (reset if id(module) in inside else init)(module, name=name)

    named_apply(init_module, model)


def no_weight_decay_of(model: nn.Module) -> set[str]:
    """Names of the parameters that mixers mark as free of weight decay."""
    return {name for name, p in model.named_parameters() if getattr(p, "_no_weight_decay", False)}


def reparameterize_mixers(model: nn.Module) -> None:
    """Fold the branches of every mixer that has some, in place; for inference."""
    for module in model.modules():
        if isinstance(module, MixerBlock):
            fold = getattr(module.mixer, "reparameterize", None)
            if callable(fold):
                fold()
