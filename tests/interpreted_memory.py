"""A pytest plugin for TRITON_INTERPRET=1: a kernel that reads or writes outside of its arguments' memory fails.

The interpreter follows any address, so that a wrong mask goes unnoticed until a GPU stops at it. Here every access of a
lane that its mask lets through is held against the storages of the tensors that the launch was given.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter


def ranges_of(arguments: Any) -> np.ndarray:
    """`[n, 2]` addresses: first byte, and the one behind the last, of each tensor's storage (descriptors' too)."""
    found: set[tuple[int, int]] = set()

    def add(argument: Any) -> None:
        if isinstance(argument, (tuple, list)):
            for part in argument:
                add(part)
            return
        tensor = getattr(argument, "base", argument)
        if isinstance(tensor, torch.Tensor):
            storage = tensor.untyped_storage()
            found.add((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))

    add(list(arguments))
    return np.array(sorted(found), dtype=np.uint64).reshape(-1, 2)


class Watched:
    """The interpreter's own memory operations, behind a look at each address."""

    def __init__(self) -> None:
        self.native = interpreter._interpreter
        self.ranges = np.empty((0, 2), np.uint64)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.native, name)

    def check(self, pointers: np.ndarray, mask: np.ndarray, size: int, what: str) -> None:
        live = pointers[np.broadcast_to(mask, pointers.shape).astype(bool)].astype(np.uint64)
        if not live.size:
            return
        # Storages may share memory and so overlap; none is large enough in a test for that to hide much.
        place = np.searchsorted(self.ranges[:, 0], live, side="right").astype(np.int64) - 1
        inside = (place >= 0) & (live + np.uint64(size) <= self.ranges[place.clip(0), 1])
        if not inside.all():
            raise IndexError(f"{what} of {int((~inside).sum())} of {live.size} numbers outside of every argument")

    def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        self.check(pointers, mask, np.dtype(dtype).itemsize, "load")
        return self.native.load(pointers, mask, other, dtype)

    def store(self, pointers: Any, value: Any, mask: Any) -> Any:
        self.check(pointers, mask, value.dtype.itemsize, "store")
        return self.native.store(pointers, value, mask)

    def atomic_rmw(self, operation: Any, pointers: Any, value: Any, mask: Any, order: Any) -> Any:
        self.check(pointers, mask, value.dtype.itemsize, "atomic")
        return self.native.atomic_rmw(operation, pointers, value, mask, order)


def watch() -> None:
    watched = Watched()
    interpreter._interpreter = watched
    inner = interpreter.GridExecutor._init_args_hst

    def arguments(self: Any, *args: Any) -> Any:
        hosts = inner(self, *args)
        watched.ranges = ranges_of([*hosts[0], *hosts[1].values()])
        return hosts

    interpreter.GridExecutor._init_args_hst = arguments


watch()
