"""The residual block of all backbones of ours: a token mixer, then an MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.layers import DropPath, LayerScale, Mlp
from timm.models import named_apply, register_notrace_module
from torch import Tensor, nn

from chela_plugin.registry import MixerSpec, parse_pattern
from chela_plugin.registry.spec import NATIVE
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
        mixed = self.mixer(self.norm1(x), grid=grid) if self.uses_grid else self.mixer(self.norm1(x))
        x = x + self.drop_path1(self.ls1(mixed))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


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
