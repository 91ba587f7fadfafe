"""A mixer for a timm model, whose patches have no order and which may be scripted or exported."""

from __future__ import annotations

import functools
import warnings

from timm.layers import is_exportable, is_scriptable
from torch import nn

from chela_plugin.registry import MixerSpec, MixerSpecError, create_mixer


def create_unordered_mixer(
    spec: str | MixerSpec,
    dim: int,
    *,
    depth: int | None = None,
    layer_idx: int | None = None,
    dims: int = 1,
    device=None,
    dtype=None,
) -> nn.Module:
    """`create_mixer` with `causal=False`; a mixer that is only causal is built as such, with one warning for its spec.

    Under timm's `scriptable` and `exportable` switches (`create_model` has them, and `timm.layers.set_scriptable`) a
    mixer that has a plain form comes in it: the same weights, in operations that TorchScript and ONNX know.

    Raises as `create_mixer`; the error of a mixer that is refused both ways is that of `causal=False`.
    """
    place = {"depth": depth, "layer_idx": layer_idx, "device": device, "dtype": dtype}
    try:
        mixer = create_mixer(spec, dim, causal=False, dims=dims, **place)
    except MixerSpecError:
        raise
    except ValueError as refusal:
        try:
            mixer = create_mixer(spec, dim, causal=True, **place)
        except ValueError:
            raise refusal from None
        warn_of_order(str(spec))
    plain = getattr(mixer, "plain", None)
    return plain() if plain is not None and (is_scriptable() or is_exportable()) else mixer


@functools.cache
def warn_of_order(spec: str) -> None:
    warnings.warn(
        f"{spec} is causal: a patch sees only those before it in reading order. bidirectional({spec}) sees all",
        stacklevel=3,
    )
