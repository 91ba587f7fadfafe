"""`create_mixer`: one module from one string."""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING

from chela_plugin.registry.errors import MixerSpecError
from chela_plugin.registry.installed import load
from chela_plugin.registry.spec import NATIVE, MixerSpec

if TYPE_CHECKING:
    from torch import device as Device
    from torch import dtype as Dtype
    from torch import nn


def create_mixer(
    spec: str | MixerSpec,
    dim: int,
    *,
    causal: bool,
    depth: int | None = None,
    layer_idx: int | None = None,
    dims: int = 1,
    device: Device | str | None = None,
    dtype: Dtype | None = None,
) -> nn.Module:
    """The mixer that `spec` names, a module that maps `[B, T, dim]` to `[B, T, dim]`.

    Args:
        spec: 'chela(head_dim=64)' or a MixerSpec, checked here too, since one can be built by hand.
        dim: channels.
        causal: whether token t may see only tokens up to t. Never guessed: a language model says True, vision False.
        depth, layer_idx: number of blocks in the host and this block's place, for mixers whose initialisation asks.
        dims: 2 where the host's tokens lie on a grid. It reaches only a factory with an option of that name, so that a
            mixer with a two-dimensional form takes it in an image; `chela(dims=1)` in the spec goes before.
        device, dtype: as for any torch module.

    Raises:
        MixerSpecError, UnknownMixerError, MixerUnavailableError: as `MixerSpec.parse`.
        ValueError: the mixer refuses `dim` or `causal`; the message names the spec.
        TypeError: the factory returned something that is no nn.Module.
    """
    if not isinstance(dim, int) or isinstance(dim, bool) or dim < 1:
        raise ValueError(f"dim is a whole number of channels, at least 1, got {dim!r}")
    spec = MixerSpec.parse(str(spec) if isinstance(spec, MixerSpec) else spec)
    if spec.name == NATIVE:
        raise MixerSpecError("'native' is the host model's own mixer; only a host can build it", str(spec), 0)
    factory = load(spec.name)
    options = dict(spec.options)
    if dims != 1 and "dims" in inspect.signature(factory).parameters:
        options.setdefault("dims", dims)
    try:
        mixer = factory(dim, causal=causal, depth=depth, layer_idx=layer_idx, device=device, dtype=dtype, **options)
    except MixerSpecError:
        raise
    except ValueError as error:
        raise ValueError(f"{spec}: {error}") from error
    torch = sys.modules.get("torch")  # a factory that returns a module has imported it
    if torch is None or not isinstance(mixer, torch.nn.Module):
        raise TypeError(f"the factory of '{spec.name}' must return an nn.Module, got {type(mixer).__name__}")
    return mixer
