"""A backbone with a given mixer in every block, its parameter count, its decoding state, and the path that runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from chela_plugin.harness.config import LanguageBackbone, SequenceBackbone, VisionBackbone
from chela_plugin.harness.extras import need
from chela_plugin.harness.tasks import Examples

Backbone = VisionBackbone | LanguageBackbone | SequenceBackbone
Build = Callable[[int], nn.Module]  # the MLP's hidden width -> a model


class UnmatchedParameters(ValueError):
    """No MLP width brings a mixer's model to the baseline's parameter count."""


class Logits(nn.Module):
    """A language model from tokens to logits alone: `[B, T, V]`, or `[N, V]` at N places of `[B * T]`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model: Any = model

    def forward(self, tokens: Tensor, places: Tensor | None = None) -> Tensor:
        if places is None:
            return self.model(input_ids=tokens, use_cache=False).logits
        features = self.model.model(tokens, use_cache=False, return_dict=True).last_hidden_state
        return self.model.lm_head(features.flatten(0, 1)[places])


def build(config: Backbone, data: Examples, mixer: str, mlp_hidden: int) -> nn.Module:
    """A model from a batch of inputs to logits. `data` gives the input's shape and the number of classes."""
    if isinstance(config, LanguageBackbone):
        need("transformers", "lm")
        from chela_plugin.lm import ChelaForCausalLM

        return Logits(ChelaForCausalLM(_language_config(config, data, mixer, mlp_hidden)))
    if isinstance(config, SequenceBackbone):
        need("transformers", "lm")
        return _sequence_model(config, data, mixer, mlp_hidden)
    import timm

    import chela_plugin.vision  # noqa: F401  # registers chela_vit_*, also where the autoload hook is switched off

    _, channels, height, width = data.inputs.shape
    if height != width:
        raise ValueError(f"backbone.kind vision takes square images, the task has {height} x {width}")
    return timm.create_model(
        "chela_vit_tiny",  # all sizes by which the chela_vits differ are given
        img_size=height,
        patch_size=config.patch_size,
        in_chans=channels,
        num_classes=data.classes,
        embed_dim=config.dim,
        depth=config.depth,
        mixer=mixer,
        weight_init=config.weight_init,
        # timm takes int(dim * ratio): half a unit keeps the product from rounding below the width that was asked for.
        mlp_ratio=(mlp_hidden + 0.5) / config.dim,
    )


def pixels(images: Tensor) -> str:
    """'32 px': the size of images `[N, C, H, W]`."""
    return f"{images.shape[-1]} px"


def resize(model: nn.Module, images: Tensor) -> None:
    """Carry a vision model to the size of `images` `[N, C, H, W]`, in place: its position embedding is resampled."""
    model.set_input_size(img_size=tuple(images.shape[-2:]))  # type: ignore[operator]


def _language_config(config: LanguageBackbone | SequenceBackbone, data: Examples, mixer: str, mlp_hidden: int) -> Any:
    """The ChelaConfig of either's blocks."""
    from chela_plugin.lm import ChelaConfig

    return ChelaConfig(
        vocab_size=data.vocabulary or data.classes,
        hidden_size=config.dim,
        num_hidden_layers=config.depth,
        intermediate_size=mlp_hidden,
        mixer=mixer,
    )


def _sequence_model(config: SequenceBackbone, data: Examples, mixer: str, mlp_hidden: int) -> nn.Module:
    from chela_plugin.harness.sequence_model import SequenceModel

    signal = data.inputs.is_floating_point()
    return SequenceModel(
        _language_config(config, data, mixer, mlp_hidden),
        data.classes,
        channels=data.inputs.shape[2] if signal else 0,
        causal=config.causal,
        pooling=config.pooling,
        positions=config.positions == "sinusoidal",
        padding=data.padding,
        pair=not signal and data.inputs.ndim == 3,
        reconstruct=data.targets.ndim == 2,
    )


def parameters(model: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@dataclass(frozen=True)
class Match:
    """The MLP width found, the parameters it gives, and their ratio to the target."""

    mlp_hidden: int
    parameters: int
    ratio: float


def match_parameters(build: Build, target: int, tolerance: float, start: int) -> Match:
    """Find the MLP width at which a mixer's model has `target` parameters.

    The MLP's width is the knob, because all else that could move is part of the comparison: the model's dim sets what a
    mixer can carry from token to token, the depth how often it mixes. A step of the width is also fine enough (2 or 3
    times dim parameters a block), and a total is linear in it, so two counts give the answer and a third confirms it.

    Raises UnmatchedParameters where even the best width is off by more than `tolerance`: the mixer alone is too large.
    """
    low, high = parameters(build(start)), parameters(build(2 * start))
    slope = (high - low) / start
    hidden = max(1, round(start + (target - low) / slope)) if slope > 0 else start
    found = parameters(build(hidden))
    if abs(found / target - 1) > tolerance:
        raise UnmatchedParameters(
            f"{found:,} parameters at an MLP width of {hidden}, {found / target:.3f} of the baseline's {target:,}; "
            f"allowed is {1 - tolerance:g} to {1 + tolerance:g}. Make mlp_hidden or depth larger, or the mixer smaller"
        )
    return Match(hidden, found, found / target)


def paths(model: nn.Module, device: torch.device) -> str:
    """Which implementations the model's mixers run on `device`, as they say: 'torch', 'triton', 'sdpa', ..."""
    found = set()
    for module in model.modules():
        path = getattr(module, "path", None)
        if callable(path):
            found.add(str(path(device)))
    return ", ".join(sorted(found)) or "unknown"


@dataclass(frozen=True)
class State:
    """What decoding keeps for one sequence, all blocks together, in numbers (not bytes).

    fixed: kept at any length. per_token: what each further token adds (0 for a recurrent mixer).
    """

    fixed: int
    per_token: float


def decoding_state(model: nn.Module, dim: int, device: torch.device) -> State | None:
    """Measure the caches of a causal model's mixers after 8 and 16 tokens; None if one of them can't decode.

    `device` is where the model is.
    """
    sizes = [0, 0]
    mixers = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "mixer"]
    if not mixers or not all(hasattr(mixer, "init_cache") for mixer in mixers):
        return None
    model.eval()  # as a model decodes: batch norms refuse a cache while they train
    with torch.no_grad():
        for mixer in mixers:
            try:
                cache = mixer.init_cache(1, device=device)
            except NotImplementedError:
                return None
            for i in range(2):
                mixer(torch.zeros(1, 8, dim, device=device), cache=cache)
                sizes[i] += sum(_numbers(tensor) for tensor in cache.values())
    per_token = (sizes[1] - sizes[0]) / 8
    return State(round(sizes[0] - 8 * per_token), per_token)


def _numbers(tensor: Tensor) -> int:
    """Real numbers that a cached tensor holds; a position or a length, kept as an integer, is none of them."""
    return tensor.numel() * (2 if tensor.is_complex() else 1) * (tensor.is_floating_point() or tensor.is_complex())


def loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross-entropies in nats, in float32; logits `[..., classes]`, targets `[...]`."""
    return nn.functional.cross_entropy(logits.flatten(0, -2).float(), targets.flatten().long(), reduction="sum")


def bits(nats: float) -> float:
    """Nats to bits."""
    return nats / math.log(2)


def tokens_per_example(config: Backbone, data: Examples) -> int:
    """Tokens that a mixer sees of one example at most: patches of an image, or the sequence's length with padding."""
    if isinstance(config, LanguageBackbone):
        return data.inputs.shape[1]
    if isinstance(config, SequenceBackbone):
        return data.inputs.shape[1] * (
            data.inputs.shape[2] if not data.inputs.is_floating_point() and data.inputs.ndim == 3 else 1
        )
    return (data.inputs.shape[2] // config.patch_size) * (data.inputs.shape[3] // config.patch_size)
