"""`swap_mixers`: another mixer in every block of a model that is built already."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from torch import nn

from chela_plugin.registry import MixerSpec, Pattern, create_mixer, parse_pattern
from chela_plugin.registry.spec import NATIVE

# timm's attentions from [B, N, C] to [B, N, C], by module and name: none of these files is imported for a model that
# doesn't use it, and a timm that lacks one still works.
TIMM_ATTENTIONS = {
    ("timm.layers.attention", "Attention"),
    ("timm.layers.attention", "AttentionRope"),
    ("timm.layers.diff_attention", "DiffAttention"),
    ("timm.models.beit", "Attention"),
    ("timm.models.eva", "EvaAttention"),
    ("timm.models.vision_transformer_relpos", "RelPosAttention"),
    ("chela_plugin.attn_layer", "MixerAttention"),
}


def swap_mixers(model: nn.Module, pattern: str) -> int:
    """Replace the token mixer of each block by the pattern's, in block order; returns how many were replaced.

    Args:
        model: a timm model whose blocks hold an attention of the ViT kind at `.attn`, or a MetaFormer of timm's; a
            ChelaViT or ChelaFormer; a ChelaForCausalLM or ChelaModel; a model of fla; or a module that holds one of
            these. New mixers are freshly initialised, on the device, in the dtype and in the mode (train or eval) of
            what they replace.
        pattern: `'chela'`, `'3*chela + native'`, repeated over the blocks; `native` keeps the mixer that a block has.
    In our own models and fla's the string that is saved with the model follows.

    In timm's models class and register tokens come first and are part of the sequence that the new mixer sees.
    When an error is raised the model is as it was.

    Raises:
        MixerSpecError, UnknownMixerError, MixerUnavailableError: the pattern.
        ValueError: no block whose mixer can be replaced, every block kept as `native`, or a mixer that refuses.
    """
    terms = parse_pattern(pattern)
    slots: list[Slot] = [*own_slots(model), *fla_slots(model)] or [*timm_slots(model)]
    if not slots:
        raise ValueError(f"{type(model).__name__} has no block whose mixer can be replaced{inventory(model)}")
    specs = terms.expand(len(slots))
    if all(spec.name == NATIVE for spec in specs):
        raise ValueError(f"'{pattern}' keeps the mixers of all {len(slots)} blocks; there is nothing to replace")
    # All are built before the first is put in place: one that refuses must not leave half a swap behind.
    built = [
        (slot, slot.build(spec, index, len(slots)), spec)
        for index, (slot, spec) in enumerate(zip(slots, specs, strict=True))
        if spec.name != NATIVE
    ]
    for slot, mixer, spec in built:
        slot.put(mixer.train(slot.old.training), spec)
    for owner in {id(slot.owner): slot.owner for slot in slots if isinstance(slot, OwnSlot)}.values():
        now = [slot.spec for slot in slots if isinstance(slot, OwnSlot) and slot.owner is owner]
        record(owner, str(terms) if now == terms.expand(len(now)) else runs(now))
    return len(built)


class Slot:
    """A place in a block that holds a mixer."""

    def __init__(self, block: nn.Module, name: str):
        self.block: Any = block
        self.name = name
        self.old: Any = getattr(block, name)

    def placement(self) -> dict[str, Any]:
        """Device and dtype of the mixer that is there, or of its block where that mixer has no parameters."""
        for parameter in (*self.old.parameters(), *self.block.parameters()):
            return {"device": parameter.device, "dtype": parameter.dtype}
        return {}

    def build(self, spec: MixerSpec, index: int, depth: int) -> nn.Module:
        raise NotImplementedError

    def put(self, mixer: nn.Module, spec: MixerSpec) -> None:
        setattr(self.block, self.name, mixer)


class TimmSlot(Slot):
    """`.attn` of a timm block."""

    def build(self, spec: MixerSpec, index: int, depth: int) -> nn.Module:
        from chela_plugin.attn_layer import MixerAttention  # imports timm, which a language model doesn't need

        dropout = getattr(self.old, "proj_drop", None)
        rate = dropout.p if isinstance(dropout, nn.Dropout) else 0.0
        return MixerAttention(spec, self.dim(), proj_drop=rate, depth=depth, layer_idx=index, **self.placement())

    def dim(self) -> int:
        if hasattr(self.old, "mixer"):
            return self.old.dim
        into = next(m for m in self.old.modules() if isinstance(m, nn.Linear)).in_features
        out = self.old.proj.out_features
        if into != out:
            raise ValueError(f"{type(self.old).__name__} maps {into} channels to {out}; a mixer keeps the width")
        return into


class MapSlot(TimmSlot):
    """`.token_mixer` of a MetaFormer block that works on `[B, C, H, W]`."""

    def build(self, spec: MixerSpec, index: int, depth: int) -> nn.Module:
        from chela_plugin.attn_layer import MapMixer

        dropout = getattr(self.old, "proj_drop", None)
        rate = dropout.p if isinstance(dropout, nn.Dropout) else 0.0
        dim = self.block.mlp.fc1.in_channels
        return MapMixer(spec, dim, proj_drop=rate, depth=depth, layer_idx=index, **self.placement())


class OwnSlot(Slot):
    """`.mixer` of a block of ours; `owner` is the backbone or ChelaModel, `spec` what the block holds."""

    def __init__(self, owner: nn.Module, block: nn.Module, spec: MixerSpec, dim: int, causal: bool):
        super().__init__(block, "mixer")
        self.owner, self.spec, self.dim, self.causal = owner, spec, dim, causal

    def build(self, spec: MixerSpec, index: int, depth: int) -> nn.Module:
        place = {"depth": depth, "layer_idx": index, **self.placement()}
        if self.causal:
            return create_mixer(spec, self.dim, causal=True, **place)
        from chela_plugin.unordered import create_unordered_mixer  # imports timm, as the model has done already

        return create_unordered_mixer(spec, self.dim, dims=2, **place)

    def put(self, mixer: nn.Module, spec: MixerSpec) -> None:
        super().put(mixer, spec)
        self.spec = spec
        if self.causal:
            self.block.mixer_spec = spec
        else:
            self.block.uses_grid = getattr(mixer, "uses_grid", False)


class FlaSlot(OwnSlot):
    """The mixer of a block of fla; `spec` is `native` where that is the family's own."""

    def __init__(self, owner: nn.Module, block: nn.Module, name: str):
        Slot.__init__(self, block, name)
        self.owner, self.spec = owner, getattr(self.old, "spec", MixerSpec(NATIVE))

    def build(self, spec: MixerSpec, index: int, depth: int) -> nn.Module:
        config: Any = self.owner.config
        place = {"depth": config.num_hidden_layers, "layer_idx": self.block.layer_idx}
        return fla_host().FlaMixer(spec, config.hidden_size, **place, **self.placement())

    def put(self, mixer: nn.Module, spec: MixerSpec) -> None:
        Slot.put(self, mixer, spec)
        self.spec = spec


def own_slots(model: nn.Module) -> Iterator[OwnSlot]:
    backbones = [
        *instances(model, "chela_plugin.vision.chela_vit", "ChelaViT"),
        *instances(model, "chela_plugin.vision.chela_former", "ChelaFormer"),
    ]
    for backbone in backbones:
        blocks = instances(backbone, "chela_plugin.vision.block", "MixerBlock")
        for block, spec in zip(blocks, parse_pattern(backbone.mixer).expand(len(blocks)), strict=True):
            yield OwnSlot(backbone, block, spec, block.dim, causal=False)
    for lm in instances(model, "chela_plugin.lm.model", "ChelaModel"):
        for block in lm.layers:
            yield OwnSlot(lm, block, block.mixer_spec, lm.config.hidden_size, causal=True)


def fla_slots(model: nn.Module) -> Iterator[FlaSlot]:
    if fla_host() is not None:
        for owner, block, name in fla_host().swappable(model):
            yield FlaSlot(owner, block, name)


def fla_host() -> Any:
    """Our module for fla, imported by the hook once fla is; None before."""
    return sys.modules.get("chela_plugin.lm.fla_models")


def instances(model: nn.Module, module: str, name: str) -> list[Any]:
    """Parts of `model` that are instances of `module.name`; a module that isn't imported has none."""
    kind = getattr(sys.modules.get(module), name, None)
    return [] if kind is None else [part for part in model.modules() if isinstance(part, kind)]


def record(owner: Any, text: str) -> None:
    """Put the string where the owner's own saving reads it."""
    if hasattr(owner, "config"):
        setattr(owner.config, "token_mixer" if hasattr(owner.config, "token_mixer") else "mixer", text)
    else:
        owner.mixer = text
        owner._model_args = {**getattr(owner, "_model_args", {}), "mixer": text}


def runs(specs: list[MixerSpec]) -> str:
    return str(Pattern(tuple((len(list(group)), spec) for spec, group in groupby(specs))))


def timm_slots(model: nn.Module) -> Iterator[TimmSlot]:
    maps = {  # blocks of MetaFormer stages that work on maps; the others hold an attention over tokens
        id(block)
        for stage in instances(model, "timm.models.metaformer", "MetaFormerStage")
        if stage.use_nchw
        for block in stage.blocks
    }
    for module in model.modules():
        attention = type(getattr(module, "attn", None))
        if (attention.__module__, attention.__name__) in TIMM_ATTENTIONS:
            yield TimmSlot(module, "attn")
        elif (type(module).__module__, type(module).__name__) == ("timm.models.metaformer", "MetaFormerBlock"):
            yield MapSlot(module, "token_mixer") if id(module) in maps else TimmSlot(module, "token_mixer")


def inventory(model: nn.Module) -> str:
    """What the blocks hold instead, for the error."""
    if fla_host() is None and any(type(part).__module__.startswith("fla.models.") for part in model.modules()):
        return ": it is fla's, and our module for fla is not loaded (CHELA_AUTOLOAD=0?); call chela_plugin.register()"
    found = Counter(type(m.attn).__name__ for m in model.modules() if isinstance(getattr(m, "attn", None), nn.Module))
    held = ", ".join(f"{count} x {name}" for name, count in found.items())
    return f": its blocks hold {held}, which does not map [B, N, C] to [B, N, C]" if held else ""
