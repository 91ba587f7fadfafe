"""Any layer of flash-linear-attention (https://github.com/fla-org/flash-linear-attention), by its class name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from chela_plugin.layers.mixer import Cache
from chela_plugin.mixers.recurrent import RecurrentMixer
from chela_plugin.registry import MixerUnavailableError

# What stands for these in a mixer string is `dim` and `layer_idx`, which the host gives.
HOST_OPTIONS = ("self", "hidden_size", "d_model", "layer_idx", "kwargs")

NOT_ALONE = {
    "RWKV7Attention": "its later layers need the values of the first",
    "RodimusAttention": "its layers share keys and values through the model",
    "YOCOCrossAttention": "it reads keys and values of another layer",
    "YOCOGatedRetention": "it is one half of a pair of layers",
    "YOCOSharedKVBuilder": "it builds keys and values for other layers",
}


class FlaLayer(RecurrentMixer):
    """A causal layer of fla, on a GPU.

    fla runs Triton kernels that have no CPU form, so `forward` refuses a CPU tensor. Rows with padding, and packed
    sequences, run with the padding behind their tokens, where a causal layer can't see it: the same for every layer,
    those that ignore `cu_seqlens` (Mamba's) included. No cache: fla keeps its own, which only its own models can use.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool,
        layer: str,
        options: Mapping[str, object],
        layer_idx: int | None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(dim, causal=causal, name=f"fla(layer={layer})")
        check_options({"layer": layer, **options})
        self.layer_name, self.options, self.layer_idx = layer, dict(options), layer_idx or 0
        self.layer = self._built(device).to(dtype=dtype)

    def _built(self, device: torch.device | str | None) -> nn.Module:
        build = layer_class(self.layer_name)
        place = {"layer_idx": self.layer_idx} if "layer_idx" in inspect.signature(build.__init__).parameters else {}
        with nullcontext() if device is None else torch.device(device):
            return build(hidden_size=self.dim, **place, **self.options)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """All weights and buffers as the class's constructor makes them; few of fla's layers can do it in place."""
        fresh = self._built(next(self.layer.parameters()).device)
        for new, old in ((fresh.parameters(), self.layer.parameters()), (fresh.buffers(), self.layer.buffers())):
            for source, target in zip(new, old, strict=True):
                target.copy_(source)

    def path(self, device: torch.device | str) -> str:
        return "fla"

    def scan(self, x: Tensor, length: Tensor | None, cache: Cache | None) -> Tensor:
        if x.device.type == "cpu":
            raise ValueError(
                f"fla(layer={self.layer_name}) runs on a GPU only and its input is on the CPU; move the model, or use "
                "a mixer with a CPU form: attention, linear_attention, gla, retnet, mamba, mamba2, gated_deltanet"
            )
        if cache is not None:
            raise ValueError(f"fla(layer={self.layer_name}) has no cache here; call it on the whole sequence")
        out = self.layer(x)
        return out[0] if isinstance(out, tuple) else out


def layer_class(name: str) -> type[nn.Module]:
    """The class in `fla.layers`. Raises MixerUnavailableError without fla, ValueError where there is no such layer."""
    try:
        import fla.layers as layers
    except Exception as error:  # a mismatch of fla with torch, triton or transformers takes many forms
        reason = f"fla can't be imported ({type(error).__name__}: {error})"
        raise MixerUnavailableError("fla", reason, "pip install 'chela-plugin[lm]'") from error
    if name in NOT_ALONE:
        raise ValueError(f"fla's {name} can't stand alone: {NOT_ALONE[name]}")
    names = [each for each in layers.__all__ if each not in NOT_ALONE]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"fla has no layer {name!r}; {hint}Known: {', '.join(sorted(names))}")
    return getattr(layers, name)


def check_options(options: Mapping[str, object]) -> None:
    """Raise ValueError unless `layer` names a layer and the rest are parameters of its constructor.

    Checked by name even where the constructor takes `**kwargs`: fla's swallow a misspelt one without a word.
    """
    if "layer" not in options:
        raise ValueError("name a layer of fla: fla(layer=GatedLinearAttention)")
    name = str(options["layer"])
    parameters = inspect.signature(layer_class(name).__init__).parameters
    valid = [key for key in parameters if key not in HOST_OPTIONS]
    lacking = [key for key in valid if parameters[key].default is inspect.Parameter.empty and key not in options]
    if lacking:
        raise ValueError(f"fla's {name} needs {', '.join(lacking)}: fla(layer={name}, {lacking[0]}=...)")
    for key in options:
        if key != "layer" and key not in valid:
            near = difflib.get_close_matches(key, valid, n=1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            raise ValueError(f"fla's {name} has no option '{key}'; {hint}valid options: {', '.join(valid)}")


def fla(
    dim: int,
    *,
    causal: bool,
    layer: str,
    depth: int | None = None,
    layer_idx: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: object,
) -> FlaLayer:
    """A layer of flash-linear-attention by its class name; GPU only, causal.

    Args:
        layer: a class in `fla.layers`, `fla(layer=GatedLinearAttention, num_heads=4)`.
        options: what the class's constructor takes.
    """
    return FlaLayer(dim, causal=causal, layer=layer, options=options, layer_idx=layer_idx, device=device, dtype=dtype)


fla.check_options = check_options  # type: ignore[attr-defined]  # the registry looks for it here
