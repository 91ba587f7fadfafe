"""What a host does between two branches of a block where the mixer offers no `sum_and_norm` of its own."""

from __future__ import annotations

from torch import Tensor, nn


def in_turn(x: Tensor, branch: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """`(s, norm(s))` with s = x + branch."""
    x = x if branch is None else x + branch
    return x, norm(x)
