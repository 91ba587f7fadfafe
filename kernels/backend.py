"""Which code runs an operator, Triton or plain PyTorch, and what every launch of a Triton kernel needs."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def backend(device: torch.device | str, dtype: torch.dtype = torch.float32) -> str:
    """'triton' or 'reference': what runs on `device`.

    Triton on CUDA, and under `TRITON_INTERPRET=1` on a CPU too; plain PyTorch elsewhere and for fp64.
    `CHELA_BACKEND=reference|triton` overrides (`peer` is for mixers whose authors publish kernels, `peers.py`). Raises
    ValueError if CHELA_BACKEND is none of these, RuntimeError if it asks for Triton where Triton can't run.
    """
    asked = requested()
    if asked == "reference" or dtype == torch.float64:
        return "reference"
    kind = device.type if isinstance(device, torch.device) else torch.device(device).type
    runs = _triton_installed() and (
        kind == "cuda" or environment("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")
    )
    if asked == "triton" and not runs:
        raise RuntimeError(
            "CHELA_BACKEND=triton, but Triton needs a CUDA device, or TRITON_INTERPRET=1 to be interpreted on a CPU"
        )
    return "triton" if runs else "reference"


def requested() -> str:
    """What CHELA_BACKEND asks for: 'reference', 'triton', 'peer', or '' for the default."""
    asked = environment("CHELA_BACKEND")
    if asked not in ("", "reference", "triton", "peer"):
        raise ValueError(f"CHELA_BACKEND must be 'reference', 'triton' or 'peer', got {asked!r}")
    return asked


# On POSIX a dict of bytes. A variable that is not set takes `os.environ` two exceptions, a microsecond at every call.
_variables = getattr(os.environ, "_data", None) if os.name == "posix" else None


def environment(name: str, default: str = "") -> str:
    """`os.environ.get(name, default)`, as it is now."""
    if torch.compiler.is_compiling() or type(_variables) is not dict:
        return os.environ.get(name, default)
    found = _variables.get(_encoded(name))
    return default if found is None else os.fsdecode(found)


@functools.cache
def _encoded(name: str) -> bytes:
    return os.fsencode(name)


def computed_dtype(weight: Tensor, device: torch.device | str) -> torch.dtype:
    """Dtype of what a linear layer of `weight` returns on `device`: autocast's where that is on."""
    kind = torch.device(device).type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


@functools.cache
def _triton_installed() -> bool:
    """Triton with tensor descriptors, 3.4 or newer."""
    try:
        import triton.language
    except ImportError:
        return False
    return hasattr(triton.language, "make_tensor_descriptor")


def traced(x: Tensor) -> bool:
    """Whether something records operators instead of running them."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0  # a FLOP counter, selective checkpointing
    )


def may_read(x: Tensor) -> bool:
    """Whether the values of `x` can be looked at without stalling a stream or breaking a graph."""
    if torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" or environment("CHELA_CHECK") == "1"


def precision(dtype: torch.dtype) -> str:
    """How fp32 tiles are multiplied: exactly, unless torch was told that tf32 will do."""
    return "ieee" if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest" else "tf32"


def multiplied_as(x: Tensor) -> torch.dtype:
    """x's dtype; for bf16 on a CPU fp32: Triton's interpreter runs on numpy and would multiply bf16's bit patterns."""
    return torch.float32 if x.dtype == torch.bfloat16 and not x.is_cuda else x.dtype


def ceil_div(a: int, b: int) -> int:
    """What `triton.cdiv` is, without the wrapping that makes it several microseconds a call on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Likewise; at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Device memory for the tensor descriptors that a kernel makes; Triton asks for it at each launch."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


_nothing = nullcontext()


def ready_for(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device and asks an allocator for memory: make both x's device."""
    if not x.is_cuda:
        return _nothing
    set_allocator()
    # Entering a device costs some microseconds; where a CUDA tensor is, CUDA is initialised.
    return _nothing if x.get_device() == torch._C._cuda_getDevice() else torch.cuda.device(x.device)


def set_allocator() -> None:
    """For the launches of this thread: Triton keeps one for each, and autograd has threads of its own."""
    _triton_allocator()(scratch)


@functools.cache
def _triton_allocator() -> Callable:
    import triton

    return triton.set_allocator
