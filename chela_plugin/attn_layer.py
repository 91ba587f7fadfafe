"""`attn_layer='<spec>'` in timm's stock ViT, `token_mixers='<pattern>'` in its MetaFormer, and the modules behind them.

timm looks `attn_layer` up in a dict of its own and demands a class. Importing this module replaces that dict by one
that also knows every mixer string, lets MetaFormer take strings too, and makes the places that would ignore one say so.
Everything of timm that isn't public is touched here and nowhere else (timm 1.0.31 and newer; `tests/test_attn_layer.py`
fails where a version moves it).
"""

# No `from __future__ import annotations`: TorchScript reads those of a method that it leaves out (`masked`).
import functools
from typing import Any

import timm.models.metaformer as metaformer
import timm.models.naflexvit as naflex
import timm.models.vision_transformer as vit
import torch
from timm.layers import Attention
from torch import Tensor, nn

from chela_plugin.registry import MixerSpec, MixerSpecError, UnknownMixerError, parse_pattern
from chela_plugin.registry.spec import NATIVE
from chela_plugin.unordered import create_unordered_mixer


class TimmMixer(nn.Module):
    """A mixer in a place of timm's; `create`: further arguments of `create_unordered_mixer`."""

    def __init__(self, spec: str | MixerSpec, dim: int, *, proj_drop: float, **create: Any):
        super().__init__()
        self.spec = str(spec)
        self.dim = dim
        self.mixer = create_unordered_mixer(spec, dim, **create)
        self.proj_drop = nn.Dropout(proj_drop)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Undo what timm's initialisation of every Linear did to the mixer, which initialises itself."""
        reset_mixer(self.mixer)

    def extra_repr(self) -> str:
        return self.spec


class MixerAttention(TimmMixer):
    """A mixer with the signature of `timm.layers.Attention`: `[B, N, C]` to `[B, N, C]`, prefix tokens first.

    The mixer sees all N tokens as one sequence: class and register tokens come first in it, then the patches row by
    row. Settings that belong to softmax attention (`num_heads`, `qkv_bias`, `qk_norm`, `scale_norm`, `proj_bias`) come
    from the model's architecture and mean nothing to a mixer, whose own options stand in its string; `proj_drop` is
    honoured. A mixer that is only causal is built with a warning that names `bidirectional(...)`.

    Raises ValueError for `attn_drop` above 0 and for a mixer that needs the patch grid, which timm hands to no
    attention.
    """

    __jit_unused_properties__ = ("proj",)

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
        if attn_drop > 0:
            raise ValueError(f"attn_drop_rate drops softmax weights, and {spec} has none; set it to 0")
        super().__init__(spec, dim, proj_drop=proj_drop, depth=depth, layer_idx=layer_idx, device=device, dtype=dtype)
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

        `attn_mask` `[B, 1, 1, N]` hides tokens from all others, as NaFlexVit's does where a batch is padded: boolean,
        True where there is a token, or added to scores, 0 there. Raises ValueError for a mask of any other shape and
        for `is_causal`, which a mixer can't honour.
        """
        if attn_mask is not None or is_causal:
            return self.proj_drop(self.masked(x, attn_mask, is_causal))
        return self.proj_drop(self.mixer(x))

    @torch.jit.unused
    def masked(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        if is_causal or attn_mask is None:
            raise ValueError(f"{self.spec} in timm's ViT takes no is_causal: it sees every token")
        if attn_mask.shape != (x.shape[0], 1, 1, x.shape[1]):
            raise ValueError(
                f"{self.spec} takes an attn_mask that hides keys alone, of shape {[x.shape[0], 1, 1, x.shape[1]]}, got "
                f"{list(attn_mask.shape)}; NaFlexVit makes such masks with use_key_only_attn_mask=True"
            )
        there = attn_mask if attn_mask.dtype == torch.bool else attn_mask == 0
        return self.mixer(x, attention_mask=there[:, 0, 0])


class MapMixer(TimmMixer):
    """A mixer where timm's MetaFormer has a token mixer: `[B, C, H, W]` to `[B, C, H, W]`, the places row by row.

    `proj_drop` is honoured. A mixer with a two-dimensional form takes it.
    """

    __constants__ = ("uses_grid",)

    def __init__(
        self,
        spec: str | MixerSpec,
        dim: int,
        *,
        proj_drop: float = 0.0,
        depth: int | None = None,
        layer_idx: int | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__(
            spec, dim, proj_drop=proj_drop, depth=depth, layer_idx=layer_idx, dims=2, device=device, dtype=dtype
        )
        self.uses_grid = getattr(self.mixer, "uses_grid", False)

    def forward(self, x: Tensor) -> Tensor:
        grid = (x.shape[2], x.shape[3])
        tokens = x.flatten(2).transpose(1, 2)
        mixed = self.mixer(tokens, grid=grid) if self.uses_grid else self.mixer(tokens)
        return self.proj_drop(mixed).transpose(1, 2).reshape(x.shape)


@torch.no_grad()
def reset_mixer(mixer: nn.Module) -> None:
    for module in children_first(mixer):
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()


def children_first(module: nn.Module) -> list[nn.Module]:
    return [m for child in module.children() for m in children_first(child)] + [module]


@functools.lru_cache(maxsize=256)
def attention_class(spec: str) -> type:
    """A class that timm can call as an attention layer. Its instances are `MixerAttention`s, so they pickle."""

    def build(cls: type, dim: int, **settings: Any) -> MixerAttention:
        return MixerAttention(spec, dim, **settings)

    return type(f"MixerAttention[{spec}]", (), {"__new__": build})


@functools.lru_cache(maxsize=256)
def token_mixer_class(spec: str) -> type:
    """A class that timm's MetaFormer can call as a token mixer. Its instances are `MapMixer`s, so they pickle."""

    def build(cls: type, dim: int, proj_drop: float = 0.0, device=None, dtype=None) -> MapMixer:
        return MapMixer(spec, dim, proj_drop=proj_drop, device=device, dtype=dtype)

    return type(f"MapMixer[{spec}]", (), {"__new__": build})


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


def refuse_unused_mixers() -> None:
    """Make a NaFlexVit say so where its blocks are EVA's, which have an attention of their own."""
    original = naflex.get_block_fn

    @functools.wraps(original)
    def get_block_fn(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        block = original(cfg, *args, **kwargs)
        ignored = getattr(block, "func", block) is naflex.EvaBlock
        if ignored and isinstance(cfg.attn_layer, str) and cfg.attn_layer not in vit.ATTN_LAYERS:
            raise ValueError(
                "NaFlexVit with rotary positions, SwiGLU or gated attention is made of EVA's blocks, which ignore "
                f"attn_layer={cfg.attn_layer!r}; build it without, then chela_plugin.swap_mixers(model, pattern)"
            )
        return block

    naflex.get_block_fn = get_block_fn


def take_token_mixer_strings() -> None:
    """Let MetaFormer's `token_mixers` be a string, one pattern over the stages, or a list with strings in it."""
    original = metaformer.MetaFormer.__init__

    @functools.wraps(original)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = kwargs.get("token_mixers")
        if isinstance(given, str):
            stages = parse_pattern(given).expand(len(kwargs.get("depths", (2, 2, 6, 2))))
            kwargs["token_mixers"] = [resolve_token_mixer(spec) for spec in stages]
        elif isinstance(given, list | tuple):
            kwargs["token_mixers"] = [
                resolve_token_mixer(MixerSpec.parse(kind)) if isinstance(kind, str) else kind for kind in given
            ]
        original(self, *args, **kwargs)
        for module in self.modules():
            if isinstance(module, MapMixer):
                module.init_weights()

    metaformer.MetaFormer.__init__ = __init__  # type: ignore[method-assign]  # timm has no seam for this


def resolve_token_mixer(spec: MixerSpec) -> type:
    return metaformer.Pooling if spec.name == NATIVE else token_mixer_class(str(spec))


def install() -> None:
    """Teach timm's ViT family and MetaFormer mixer strings; a second call changes nothing."""
    if not isinstance(vit.ATTN_LAYERS, AttnLayers):
        vit.ATTN_LAYERS = AttnLayers(vit.ATTN_LAYERS)
        for name in ("ParallelScalingBlock", "DiffParallelScalingBlock"):
            if hasattr(vit, name):
                refuse_mixers(getattr(vit, name))
        refuse_unused_mixers()
        take_token_mixer_strings()


install()
