"""What the gated recurrences share: the default scale, and the check of a state."""

from __future__ import annotations

from torch import Tensor


def scale_or_default(scale: float | None, k: Tensor) -> float:
    """`scale`, or `K^-0.5`."""
    return k.shape[-1] ** -0.5 if scale is None else scale


def check_state(state: Tensor | None, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless `state` is `[B, H, K, V]` for one token's k `[B, H, K]` and v `[B, H, V]`, or None."""
    expected = (*k.shape, v.shape[-1])
    if state is not None and state.shape != expected:
        raise ValueError(f"the state must be [B, H, K, V] = {list(expected)}, got {list(state.shape)}")
