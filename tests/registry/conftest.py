"""A mixer of one line, registered for the tests of this folder."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import nn

from chela_plugin.registry import MixerSpec, create_mixer, installed


class Toy(nn.Module):
    """Scale of every channel."""

    def __init__(self, dim: int, scale: float, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), scale, device=device, dtype=dtype))

    def forward(self, x, **_arguments):
        return x * self.weight


def toy(
    dim: int,
    *,
    causal: bool,
    depth=None,
    layer_idx=None,
    device=None,
    dtype=None,
    heads: int | None = None,
    scale: float = 1.0,
    kind: Literal["plain", "fancy"] = "plain",
    taps: tuple[int, ...] = (3, 7),
    label: str = "",
    on: bool = True,
) -> nn.Module:
    """A toy.

    Not this line.
    """
    if heads is not None and dim % heads:
        raise ValueError(f"dim {dim} is not divisible by heads {heads}")
    return Toy(dim, scale, device, dtype)


def both(
    dim: int, *, causal: bool, depth=None, layer_idx=None, device=None, dtype=None, mixer: MixerSpec, share: bool = True
) -> nn.Module:
    if causal:
        raise ValueError("it sees both directions and can't be causal")
    return create_mixer(mixer, dim, causal=True, device=device, dtype=dtype)


def wide(dim: int, *, causal: bool, depth=None, layer_idx=None, device=None, dtype=None, **options) -> nn.Module:
    return Toy(dim, 1.0)


def check_wide(options: dict) -> None:
    if "layer" not in options:
        raise ValueError("it needs layer=...")


wide.check_options = check_wide  # type: ignore[attr-defined]  # the registry's protocol for **options


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """`toy` (every kind of option), `both` (a mixer as option), `wide` (any option)."""
    monkeypatch.setattr(installed, "at_run_time", {"toy": toy, "both": both, "wide": wide})
