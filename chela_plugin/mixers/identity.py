"""The mixer that mixes nothing: the floor of every ablation (IdentityFormer, arXiv:2210.13452)."""

from __future__ import annotations

import torch
from torch import Tensor

from chela_plugin.layers.mixer import Cache, Mixer


class Identity(Mixer):
    """`[B, T, C]` to itself; no parameters, causal and bidirectional alike, nothing to remember when decoding."""

    def mix(self, x: Tensor, *, mask: Tensor | None, cache: Cache | None, grid: tuple[int, int] | None) -> Tensor:
        return x

    def init_cache(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Cache:
        return {}

    def reset_parameters(self) -> None:
        """There is nothing to reset."""


def identity(
    dim: int,
    *,
    causal: bool,
    depth: int | None = None,
    layer_idx: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Identity:
    """No mixing: what remains is the block's MLP. Zero parameters."""
    return Identity(dim, causal=causal)
