"""A causal mixer run in both directions, for hosts that see the whole sequence at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from chela_plugin.layers.mixer import Cache, Mixer
from chela_plugin.registry import MixerSpec, create_mixer


class Bidirectional(Mixer):
    """`Y = w_f * f(X) + w_b * flip(b(flip(X)))`, flipped along the sequence, the weights per channel and 1/2 at first.

    With `share` (the default) f and b are one causal mixer, run on both directions as one batch: the comparison with a
    mixer that is bidirectional by itself is then at equal parameters, the 2 C weights aside, which keep the two
    directions from being mirror images. Without, each direction has its own mixer and the parameters double.
    """

    def __init__(
        self,
        dim: int,
        mixers: list[nn.Module],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(dim, causal=False)
        self.mixers = nn.ModuleList(mixers)
        self.weight = nn.Parameter(torch.empty(2, dim, device=device, dtype=dtype))
        nn.init.constant_(self.weight, 0.5)

    def reset_parameters(self) -> None:
        """All weights; those of a mixer that has no `reset_parameters` are left as they are."""
        nn.init.constant_(self.weight, 0.5)
        for mixer in self.mixers:
            reset = getattr(mixer, "reset_parameters", None)
            if reset is not None:
                reset()

    def reparameterize(self) -> Bidirectional:
        """Fold the branches of the mixer's convolution, where it has some, in place; for inference."""
        for mixer in self.mixers:
            fold = getattr(mixer, "reparameterize", None)
            if fold is not None:
                fold()
        return self

    def path(self, device: torch.device | str) -> str:
        path = getattr(self.mixers[0], "path", None)
        return "torch" if path is None else path(device)

    def mix(self, x: Tensor, *, mask: Tensor | None, cache: Cache | None, grid: tuple[int, int] | None) -> Tensor:
        back_x, back_mask = x.flip(1), None if mask is None else mask.flip(1)
        if len(self.mixers) == 1:
            masks = None if mask is None or back_mask is None else torch.cat((mask, back_mask))
            ahead, back = self.mixers[0](torch.cat((x, back_x)), attention_mask=masks).chunk(2)
        else:
            ahead = self.mixers[0](x, attention_mask=mask)
            back = self.mixers[1](back_x, attention_mask=back_mask)
        weight = self.weight.to(ahead.dtype)
        return weight[0] * ahead + weight[1] * back.flip(1)


def bidirectional(
    dim: int,
    *,
    causal: bool,
    mixer: MixerSpec,
    depth: int | None = None,
    layer_idx: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    share: bool = True,
) -> Bidirectional:
    """Any causal mixer run forwards and backwards, outputs averaged; for bidirectional hosts only.

    Args:
        mixer: the causal mixer, `bidirectional(mamba2(d_state=64))`.
        share: one set of weights for both directions (parameters stay those of `mixer`, plus 2 C); False doubles them.
    """
    if causal:
        raise ValueError(f"bidirectional looks ahead, and this host is causal; use {mixer} itself")
    mixers = [
        create_mixer(mixer, dim, causal=True, depth=depth, layer_idx=layer_idx, device=device, dtype=dtype)
        for _ in range(1 if share else 2)
    ]
    return Bidirectional(dim, mixers, device=device, dtype=dtype)
