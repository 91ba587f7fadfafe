"""Launches a Triton kernel with less work on the host: what Triton finds out anew at each launch is remembered."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from types import BuiltinFunctionType
from typing import Any

import torch
from torch import Tensor

from chela_plugin.kernels.backend import set_allocator

Form = Callable[[Sequence[int]], None]  # the launch of a compiled kernel, all but the addresses


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
        self.compiled: dict[tuple, Form] = {}

    def __call__(self, grid: tuple[int, ...], pointers: Sequence[Tensor], numbers: tuple, **constants: Any) -> None:
        addresses = [x.data_ptr() for x in pointers]
        if pointers[0].is_cuda and aligned(addresses):
            key = self._key(grid, pointers, numbers, constants)
            form = self.compiled.get(key)
            if form is not None:
                form(addresses)
                return
        else:
            key = None
        compiled = self.kernel[grid](*pointers, *numbers, **constants)
        if key is not None and compiled is not None:  # None where it is interpreted
            if len(self.compiled) >= self.LARGEST_TABLE:
                self.compiled.clear()
            names = self.kernel.arg_names[len(pointers) + len(numbers) :]
            rest = (*numbers, *[constants[name] for name in names])
            self.compiled[key] = form_of(compiled, grid, pointers[0].get_device(), rest)

    @staticmethod
    def _key(grid: tuple[int, ...], pointers: Sequence[Tensor], numbers: tuple, constants: dict[str, Any]) -> tuple:
        return (pointers[0].get_device(), grid, numbers, *constants.values(), *[x.dtype for x in pointers])

    def prepared(self, grid: tuple[int, ...], numbers: tuple, **constants: Any) -> Prepared:
        """The launch of what differs in its pointers alone, all of one device, dtypes as ever, aligned to 16 bytes:
        without the look into the table, for a caller that keeps it."""
        return Prepared(self, grid, numbers, constants)


class Prepared:
    """A launch that waits for its pointers. `form` is there after the first one, None where it is interpreted: it takes
    their addresses, for a caller that has them at hand."""

    __slots__ = ("constants", "form", "grid", "launcher", "numbers")

    def __init__(self, launcher: Launcher, grid: tuple[int, ...], numbers: tuple, constants: dict[str, Any]) -> None:
        self.launcher, self.grid, self.numbers, self.constants = launcher, grid, numbers, constants
        self.form: Form | None = None

    def __call__(self, pointers: Sequence[Tensor]) -> None:
        if self.form is not None:
            self.form([x.data_ptr() for x in pointers])
            return
        self.launcher(self.grid, pointers, self.numbers, **self.constants)
        if pointers[0].is_cuda:
            key = self.launcher._key(self.grid, pointers, self.numbers, self.constants)
            self.form = self.launcher.compiled.get(key)


def aligned(addresses: Sequence[int]) -> bool:
    """Whether all are multiples of 16."""
    return not functools.reduce(operator.or_, addresses) & 15


def form_of(compiled: Any, grid: tuple[int, ...], device: int, rest: tuple) -> Form:
    """The launch of Triton's compiled kernel on the current stream of `device`, the current one; `rest` follows the
    addresses."""
    grid = (*grid, 1, 1)[:3]  # a compiled kernel wants all three
    by_triton = compiled[grid]

    def launch(addresses: Sequence[int]) -> None:
        set_allocator()
        by_triton(*addresses, *rest)

    return _straight(compiled, grid, device, rest, launch) or launch


def _straight(compiled: Any, grid: tuple[int, ...], device: int, rest: tuple, by_triton: Form) -> Form | None:
    """The same by the function that Triton 3.6 compiles for a signature, or None for another version.

    Triton's way there makes a record for hooks, calls both chains of them, though empty, and has the driver asked what
    the address of the room for tensor descriptors is.
    """
    import triton

    launcher: Any = getattr(compiled, "run", None)
    if not triton.__version__.startswith("3.6.") or type(launcher).__name__ != "CudaLauncher":
        return None
    # A launch with tensor descriptors that the host makes is wrapped in a function of Python.
    if launcher.profile_scratch_size or type(launcher.launch) is not BuiltinFunctionType:
        return None
    from triton import knobs

    start, function, packed = launcher.launch, compiled.function, compiled.packed_metadata
    x, y, z = grid
    cooperative, dependent = launcher.launch_cooperative_grid, launcher.launch_pdl
    room = x * y * z * launcher.num_ctas * launcher.global_scratch_size
    where = torch.device("cuda", device)
    stream_of, hooks = torch._C._cuda_getCurrentRawStream, knobs.runtime

    def launch(addresses: Sequence[int]) -> None:
        try:
            hooked = hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls  # a profiler's
        except AttributeError:  # one set in the chain's place
            hooked = True
        if hooked:
            by_triton(addresses)
            return
        scratch = None
        if room:
            held = torch.empty(room, dtype=torch.int8, device=where)  # freed in the stream's order, behind the kernel
            scratch = held.data_ptr()
        start(x, y, z, stream_of(device), function, cooperative, dependent, scratch, None, packed, None, None, None,
              *addresses, *rest)  # fmt: skip

    return launch
