"""What a host does around a block's branches where the mixer offers no `sum_and_norm` or `mlp_of` of its own."""

from __future__ import annotations

from torch import Tensor, nn


def in_turn(x: Tensor, branch: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """`(s, norm(s))` with s = x + branch."""
    x = x if branch is None else x + branch
    return x, norm(x)


def called(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`."""
    return module(x)
