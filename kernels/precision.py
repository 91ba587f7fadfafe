"""Recurrences in full precision: autocast would round their states and decays to bf16."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Autocast off on the device of `x` (the meta device has none to turn off)."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


def at_least_fp32(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors in fp32, or all in fp64 when one of them is."""
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    dtype = torch.float64 if double else torch.float32
    return [None if t is None else t.to(dtype) for t in tensors]
