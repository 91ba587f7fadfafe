"""Dtypes: what is computed in fp32 at least, whatever the model or autocast has (states, decays, generated taps)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Autocast off on the device of `x` (the meta device has none to turn off)."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


def precise(x: Tensor) -> Tensor:
    """`x` in fp32, or as it is in fp64."""
    return x if x.dtype == torch.float64 else x.float()


def at_least_fp32(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors in fp32, or all in fp64 when one of them is."""
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    dtype = torch.float64 if double else torch.float32
    return [None if t is None else t.to(dtype) for t in tensors]


def as_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, which takes the host half a microsecond where it does nothing."""
    return x if x.dtype == dtype else x.to(dtype)
