"""`token_mixer='<pattern>'` on the configs of flash-linear-attention: any of its models with the registry's mixers.

Importing this file makes `token_mixer` a checked attribute of every config that fla exports, and has the blocks of the
families in `FAMILIES` build the mixer that the pattern names instead of their own. Nothing else of fla changes, and
nothing at all where `token_mixer` is not set; but for one name that fla's `generate` needs under newer transformers
(`translate_cache`).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from types import FunctionType
from typing import Any

from fla import models
from fla.models.utils import FLAGenerationMixin
from torch import nn

import chela_plugin.lm.fla_cpu  # noqa: F401  # for its registrations
from chela_plugin.lm.cache import CACHE_NAME
from chela_plugin.lm.distributions import distributions, parse_saved
from chela_plugin.lm.fla_mixer import FlaMixer
from chela_plugin.registry import MixerSpec, parse_pattern
from chela_plugin.registry.spec import NATIVE


@dataclass(frozen=True)
class Family:
    """How the blocks of one fla model hold their mixer.

    Attributes:
        block: class in the file of the family's models.
        slot: attribute of the block that holds the mixer.
        builders: what the block's constructor calls to make it.
        note: what a user should know who swaps it; empty where there is nothing (else the family is "adapted").
    """

    block: str
    slot: str = "attn"
    builders: tuple[str, ...] = ("get_attention",)
    note: str = ""

    @property
    def status(self) -> str:
        return "adapted" if self.note else "supported"


NO_MLP = "its blocks have no MLP: the mixer is all there is in one"
LOWER_BOUND = "the lower bounds that it learns for its forget gates reach native blocks only (use_lower_bound=False)"

# fla 0.6, by the name of the config class.
FAMILIES = {
    "ABCConfig": Family("ABCBlock"),
    "BitNetConfig": Family(
        "BitNetBlock", builders=("BitAttention",), note="the mixer's weights are not ternary; the MLP's are"
    ),
    "CombaConfig": Family("CombaBlock"),
    "CyclicFlowAttentionConfig": Family("CyFABlock", builders=("CyclicFlowAttention",)),
    "DeltaFormerConfig": Family("DeltaFormerBlock", builders=("DeltaFormerAttention",)),
    "DeltaNetConfig": Family("DeltaNetBlock"),
    "ForgettingTransformerConfig": Family("ForgettingTransformerBlock", builders=("ForgettingAttention",)),
    "GLAConfig": Family("GLABlock"),
    "GSAConfig": Family("GSABlock"),
    "GatedDeltaNetConfig": Family("GatedDeltaNetBlock"),
    "GatedDeltaProductConfig": Family("GatedDeltaProductBlock"),
    "HGRN2Config": Family("HGRN2Block", note=LOWER_BOUND),
    "HGRNConfig": Family("HGRNBlock", note=LOWER_BOUND),
    "KDAConfig": Family("KDABlock"),
    "LightNetConfig": Family("LightNetBlock", builders=("Attention", "LightNetAttention")),
    "LinearAttentionConfig": Family("LinearAttentionBlock"),
    "LogLinearMamba2Config": Family("LogLinearMamba2Block", "mixer", ("LogLinearMamba2",)),
    "MLAConfig": Family("MLABlock", builders=("MultiheadLatentAttention",)),
    "Mamba2Config": Family("Mamba2Block", "mixer", ("Mamba2",), NO_MLP),
    "Mamba3Config": Family("Mamba3Block", "mixer", ("Mamba3",), NO_MLP),
    "MambaConfig": Family("MambaBlock", "mixer", ("Mamba",), NO_MLP),
    "MesaNetConfig": Family("MesaNetBlock"),
    "MoBAConfig": Family("MoBABlock", builders=("MoBA",)),
    "NSAConfig": Family("NSABlock", builders=("NativeSparseAttention",)),
    "PaTHAttentionConfig": Family("PaTHAttentionBlock", builders=("PaTHAttention",)),
    "ParallaxConfig": Family("ParallaxBlock", builders=("Parallax",)),
    "PrecondGatedDeltaNetConfig": Family("PrecondGatedDeltaNetBlock", builders=("Attention", "PrecondGatedDeltaNet")),
    "PrecondKDAConfig": Family("PrecondKDABlock", builders=("Attention", "PrecondKDA")),
    "RWKV6Config": Family(
        "RWKV6Block", note="its feed-forward layer mixes each token with the one before, swapped or not"
    ),
    "RavenConfig": Family("RavenBlock"),
    "RetNetConfig": Family("RetNetBlock"),
    "SambaConfig": Family("SambaBlock", "mixer"),
    "StickBreakingAttentionConfig": Family("StickBreakingAttentionBlock", builders=("StickBreakingAttention",)),
    "TransformerConfig": Family("TransformerBlock", builders=("Attention",)),
    "WallTransformerConfig": Family("WallTransformerBlock", builders=("WallAttention",)),
}

REFUSED = {
    "CATConfig": "its attention takes rotary tables and a block mask of compressed chunks, not a sequence",
    "MomConfig": "its blocks expect a fourth value of the mixer, the router's logits, for the loss",
    "RWKV7Config": "its blocks expect a fourth value of the mixer, the first block's values, in all later ones",
    "RodimusConfig": "its blocks chain two mixers that share keys and values through the model",
    "YOCOConfig": "its upper half reads keys and values that the lower half made",
}


class TokenMixer:
    """`config.token_mixer`: a pattern string, checked and made canonical when it is set, or None.

    It is saved with the config; beside it goes `mixer_distributions` where a mixer is not ours.
    """

    def __init__(self, config_class: str, refusal: str):
        self.config_class, self.refusal = config_class, refusal

    def __get__(self, config: Any, owner: type | None = None) -> Any:
        return self if config is None else config.__dict__.get("token_mixer")

    def __set__(self, config: Any, text: str | None) -> None:
        if text is None:
            config.__dict__.pop("token_mixer", None)
            return
        if self.refusal:
            raise ValueError(f"{self.config_class} takes no token_mixer: {self.refusal}")
        # transformers writes keys in alphabetical order and sets them in the order read: this one comes first.
        pattern = parse_saved(text, config.__dict__.get("mixer_distributions"))
        config.__dict__["token_mixer"] = str(pattern)
        config.__dict__.pop("mixer_distributions", None)
        if strangers := distributions(pattern):
            config.__dict__["mixer_distributions"] = strangers


def spec_of(config: Any, layer_idx: int) -> MixerSpec | None:
    """The mixer that block `layer_idx` takes; None for the family's own."""
    text = getattr(config, "token_mixer", None)
    if text is None:
        return None
    spec = parse_pattern(text).expand(config.num_hidden_layers)[layer_idx]
    return None if spec.name == NATIVE else spec


def let_blocks_choose(config_class: str) -> None:
    """Wrap the constructor of the family's block, once."""
    family = FAMILIES[config_class]
    model = getattr(models, config_class.removesuffix("Config") + "Model")
    block = getattr(sys.modules[model.__module__], family.block)
    own = block.__init__
    if getattr(own, "chooses", False):
        return

    @wraps(own)
    def init(self: nn.Module, config: Any, layer_idx: int) -> None:
        spec = spec_of(config, layer_idx)
        if spec is None:
            own(self, config, layer_idx)
            return
        mixer = FlaMixer(spec, config.hidden_size, depth=config.num_hidden_layers, layer_idx=layer_idx)
        with_names(own, dict.fromkeys(family.builders, lambda *args, **kwargs: mixer))(self, config, layer_idx)
        if getattr(self, family.slot, None) is not mixer:
            raise RuntimeError(f"{family.block} of this fla builds its mixer in a way that chela-plugin doesn't know")

    init.chooses = True  # type: ignore[attr-defined]  # a mark for the check above
    block.__init__ = init


def with_names(function: Callable, names: Mapping[str, Any]) -> Callable:
    """`function` with some global names meaning something else, for itself alone; its module stays as it is.

    The block's own mixer is never built: it may need a package that is missing here (flash-attn), and would draw
    random numbers.
    """
    code: Any = function
    copy = FunctionType(
        code.__code__, {**code.__globals__, **names}, code.__name__, code.__defaults__, code.__closure__
    )
    copy.__kwdefaults__ = code.__kwdefaults__
    return copy


def swappable(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module, str]]:
    """`(owner, block, slot)` of every block in `model` that takes a mixer, in order; for `swap_mixers`.

    The owner is the module that has the blocks and a config. Raises ValueError for a refused family.
    """
    for owner in model.modules():
        config_class = type(getattr(owner, "config", None)).__name__
        if config_class in REFUSED and isinstance(
            owner, getattr(models, config_class.removesuffix("Config") + "Model")
        ):
            raise ValueError(f"{type(owner).__name__} takes no mixer of ours: {REFUSED[config_class]}")
        if config_class in FAMILIES:
            family = FAMILIES[config_class]
            for block in getattr(owner, "layers", ()):
                if type(block).__name__ == family.block:
                    yield owner, block, family.slot


def translate_cache() -> None:
    """Let fla's models generate under transformers 5.24 and later, which hands them their cache as `cache`.

    fla 0.6 reads `past_key_values` and passes over the other name, so that each step would forget what went before.
    """
    own = FLAGenerationMixin.prepare_inputs_for_generation
    if CACHE_NAME != "cache" or "cache" in inspect.signature(own).parameters:
        return

    @wraps(own)
    def prepare(self: Any, *args: Any, cache: Any = None, **kwargs: Any) -> dict[str, Any]:
        if cache is not None:
            kwargs["past_key_values"] = cache
        inputs = own(self, *args, **kwargs)
        if "cache" in inputs:
            inputs["past_key_values"] = inputs.pop("cache")
        return inputs

    FLAGenerationMixin.prepare_inputs_for_generation = prepare


translate_cache()
for name in models.__all__:
    if name.endswith("Config"):
        unknown = "" if name in FAMILIES else "this version of chela-plugin doesn't know the family"
        getattr(models, name).token_mixer = TokenMixer(name, REFUSED.get(name, unknown))
        if name in FAMILIES:
            let_blocks_choose(name)
