"""Triton kernels compiled for a GPU that is not here: the interpreter takes what the compiler refuses."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


def compiled_for_hopper(
    kernel: Any,
    constants: dict[str, Any],
    types: dict[str, str],
    *,
    aligned: Collection[str] = (),
    warps: int = 4,
    registers: int | None = None,
) -> Any:
    """What `triton.compile` makes of the kernel for an H100; needs no device.

    Args:
        constants: by name, those that the kernel doesn't take are left out; numbers that a launch would specialise
            (a stride of 1, one head) belong here too.
        types: of the others, such as '*bf16'; 'i32' where there is none.
        aligned: numbers that 16 divides, as a launch would find out; pointers always are.
        registers: at most, for each thread.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    whole = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if whole[name].startswith("*") or name in aligned
    }
    source = ASTSource(fn=kernel, signature=whole, constexprs=constants, attrs=divisible)
    options = {"num_warps": warps} | ({} if registers is None else {"maxnreg": registers})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
