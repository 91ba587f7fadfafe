"""Launches a Triton kernel with less work on the host: what Triton finds out anew at each launch is remembered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


class Launcher:
    """`Launcher(kernel)(grid, pointers, numbers, **constants)` is `kernel[grid](*pointers, *numbers, **constants)`.

    A Triton launch looks at every argument to choose among the compiled forms of a kernel: some 20 microseconds for
    forty arguments (H100 host, `benchmarks/NOTES-linear_attention.md`). Here one look into a table finds the form. Its
    key is all that the choice depends on: numbers, constants, dtypes, the device, and that every pointer is aligned to
    16 bytes (a launch with another one goes to Triton itself, as does every interpreted one).

    The kernel's parameters must come in this order, and each call must name the same constants in the same order.
    """

    LARGEST_TABLE = 4096  # every length of a sequence makes an entry of its own

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiled: dict[tuple, tuple[Any, tuple]] = {}  # the form at its grid, and what follows the addresses

    def __call__(self, grid: tuple[int, ...], pointers: Sequence[Tensor], numbers: tuple, **constants: Any) -> None:
        first = pointers[0]
        addresses = [x.data_ptr() for x in pointers]
        if first.is_cuda and not any(address & 15 for address in addresses):
            key = self._key(grid, pointers, numbers, constants)
            found = self.compiled.get(key)
            if found is not None:
                run, rest = found
                run(*addresses, *rest)
                return
        else:
            key = None
        compiled = self.kernel[grid](*pointers, *numbers, **constants)
        if key is not None and compiled is not None:  # None where it is interpreted
            if len(self.compiled) >= self.LARGEST_TABLE:
                self.compiled.clear()
            names = self.kernel.arg_names[len(pointers) + len(numbers) :]
            whole_grid = (*grid, 1, 1)[:3]  # a compiled kernel wants all three
            self.compiled[key] = compiled[whole_grid], (*numbers, *[constants[name] for name in names])

    @staticmethod
    def _key(grid: tuple[int, ...], pointers: Sequence[Tensor], numbers: tuple, constants: dict[str, Any]) -> tuple:
        return (pointers[0].device.index, grid, numbers, *constants.values(), *[x.dtype for x in pointers])

    def prepared(self, grid: tuple[int, ...], numbers: tuple, **constants: Any) -> Callable[[Sequence[Tensor]], None]:
        """The launch of what differs in its pointers alone, all of one device, dtypes as ever, aligned to 16 bytes:
        without the look into the table, for a caller that keeps it."""
        form: list[tuple[Any, tuple]] = []

        def launch(pointers: Sequence[Tensor]) -> None:
            if form:
                run, rest = form[0]
                run(*[x.data_ptr() for x in pointers], *rest)
                return
            self(grid, pointers, numbers, **constants)
            if self.compiled and pointers[0].is_cuda:
                found = self.compiled.get(self._key(grid, pointers, numbers, constants))
                if found is not None:
                    form.append(found)

        return launch
