"""`attn_layer='<spec>'` for timm's stock ViT, and the module that puts a mixer where timm expects an attention.

timm looks a string up in a dict of its own and demands a class. Importing this module replaces that dict by one that
also knows every mixer string. Everything of timm that isn't public is touched here and nowhere else (timm 1.0.29 and
newer; `tests/test_attn_layer.py` fails where a version moves it).
"""

from __future__ import annotations

import functools
from typing import Any

import timm.models.vision_transformer as vit
import torch
from timm.layers import Attention
from torch import Tensor, nn

from chela_plugin.registry import MixerSpec, MixerSpecError, UnknownMixerError, create_mixer
from chela_plugin.registry.spec import NATIVE


class MixerAttention(nn.Module):
    """A mixer with the signature of `timm.layers.Attention`: `[B, N, C]` to `[B, N, C]`, prefix tokens first.

    The mixer sees all N tokens as one sequence: class and register tokens come first in it, then the patches row by
    row. Settings that belong to softmax attention (`num_heads`, `qkv_bias`, `qk_norm`, `scale_norm`, `proj_bias`) come
    from the model's architecture and mean nothing to a mixer, whose own options stand in its string; `proj_drop` is
    honoured.

    Raises ValueError for `attn_drop` above 0, for a mixer that is only causal, and for one that needs the patch grid,
    which timm hands to no attention.
    """

    def __init__(
        self,
        spec: str | MixerSpec,
        dim: int,
        *,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        depth: int | None = None,
        layer_idx: int | None = None,
        device=None,
        dtype=None,
        **_softmax: Any,  # see the docstring
    ):
        super().__init__()
        if attn_drop > 0:
            raise ValueError(f"attn_drop_rate drops softmax weights, and {spec} has none; set it to 0")
        self.spec = str(spec)
        self.mixer = create_mixer(spec, dim, causal=False, depth=depth, layer_idx=layer_idx, device=device, dtype=dtype)
        self.dim = dim
        self.proj_drop = nn.Dropout(proj_drop)
        if getattr(self.mixer, "uses_grid", False):
            raise ValueError(f"{spec} needs the patch grid, which timm's blocks don't pass on; use chela_vit instead")

    @property
    def proj(self) -> nn.Linear:
        """What timm's `fix_init` scales, the output projection: the mixer's `proj`, else its last Linear onto `dim`."""
        own = getattr(self.mixer, "proj", None)
        if isinstance(own, nn.Linear):
            return own
        onto = [m for m in self.mixer.modules() if isinstance(m, nn.Linear) and m.out_features == self.dim]
        if not onto:
            raise ValueError(f"{self.spec} has no output projection for timm's fix_init to scale; set fix_init=False")
        return onto[-1]

    @torch.no_grad()
    def init_weights(self) -> None:
        """Undo what timm's initialisation of every Linear did to the mixer, which initialises itself."""
        for module in children_first(self.mixer):
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        rope: Tensor | None = None,
        shared_rel_pos: Tensor | None = None,
        shared_rel_pos_bias: Tensor | None = None,
    ) -> Tensor:
        """`x` `[B, N, C]`. `rope` and the shared biases tell softmax attention about order; a mixer has its own way.

        Raises ValueError for `attn_mask` and `is_causal`, which would change what is computed.
        """
        if attn_mask is not None or is_causal:
            raise ValueError(f"{self.spec} in timm's ViT takes no attn_mask and no is_causal: it sees every token")
        return self.proj_drop(self.mixer(x))

    def extra_repr(self) -> str:
        return self.spec


def children_first(module: nn.Module) -> list[nn.Module]:
    return [m for child in module.children() for m in children_first(child)] + [module]


@functools.lru_cache(maxsize=256)
def attention_class(spec: str) -> type:
    """A class that timm can call as an attention layer. Its instances are `MixerAttention`s, so they pickle."""

    def build(cls: type, dim: int, **settings: Any) -> MixerAttention:
        return MixerAttention(spec, dim, **settings)

    return type(f"MixerAttention[{spec}]", (), {"__new__": build})


class AttnLayers(dict):
    """timm's table of attention layers, in which every mixer string has an entry too; timm's own names win."""

    def get(self, key: Any, default: Any = None) -> Any:
        if key in self or not isinstance(key, str):
            return super().get(key, default)
        try:
            spec = MixerSpec.parse(key)
        except UnknownMixerError as error:
            own = ", ".join(repr(name) for name in self if name)
            raise UnknownMixerError(f"{error.message}; timm's own: {own}", error.text, error.column) from None
        except MixerSpecError as error:
            if error.message.startswith("expected one mixer"):
                raise MixerSpecError(
                    "attn_layer is the same in every block; for a pattern build the model, then "
                    "chela_plugin.swap_mixers(model, pattern)",
                    error.text,
                    error.column,
                ) from None
            raise
        return Attention if spec.name == NATIVE else attention_class(str(spec))


def refuse_mixers(block: type[nn.Module]) -> None:
    """Make a block that ignores `attn_layer` say so where it is given a mixer string."""
    original = block.__init__

    @functools.wraps(original)
    def __init__(self, *args: Any, attn_layer: Any = None, **kwargs: Any) -> None:
        if isinstance(attn_layer, str) and attn_layer not in vit.ATTN_LAYERS:
            raise ValueError(
                f"timm's {block.__name__} has an attention of its own and ignores attn_layer={attn_layer!r}"
            )
        original(self, *args, attn_layer=attn_layer, **kwargs)

    block.__init__ = __init__  # type: ignore[method-assign]  # timm has no seam for this


def install() -> None:
    """Teach timm's ViT family mixer strings; a second call changes nothing."""
    if not isinstance(vit.ATTN_LAYERS, AttnLayers):
        vit.ATTN_LAYERS = AttnLayers(vit.ATTN_LAYERS)
        for name in ("ParallelScalingBlock", "DiffParallelScalingBlock"):
            if hasattr(vit, name):
                refuse_mixers(getattr(vit, name))


install()
