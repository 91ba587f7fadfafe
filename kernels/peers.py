"""Kernels of other packages that compute our ops on a CUDA device: flash-linear-attention's and mamba-ssm's.

They take fp16 and bf16: in fp32 theirs multiply in tf32, so there the plain PyTorch definitions run. None of them can
be traced whole by `torch.compile(fullgraph=True)`: what is traced gets the definitions, or an operator that torch does
not look into (`untraced.py`), in which they run.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any

import torch
from packaging.version import Version

from chela_plugin.kernels.backend import requested

HOMES = {
    "chunk_gla": "fla.ops.gla",
    "chunk_gated_delta_rule": "fla.ops.gated_delta_rule",
    "chunk_kda": "fla.ops.kda",
    "causal_conv1d": "fla.modules.causal_conv1d",
    "mamba_chunk_scan_combined": "mamba_ssm.ops.triton.ssd_combined",
}


def peer(name: str, device: torch.device | str, dtype: torch.dtype) -> Callable[..., Any] | None:
    """The function `name` if it is to compute inputs of `dtype` on `device`, else None.

    None on other devices than CUDA, for other dtypes than fp16 and bf16, under `CHELA_BACKEND=reference`, while
    tracing, and where its package can't be imported; `CHELA_BACKEND=peer` makes the last a RuntimeError.
    """
    asked = requested()
    if torch.device(device).type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or asked == "reference":
        return None
    if torch.compiler.is_exporting() or torch.compiler.is_dynamo_compiling():
        return None
    function, reason = find(name)
    if function is None and asked == "peer":
        raise RuntimeError(f"CHELA_BACKEND=peer, but {HOMES[name]}.{name} can't be imported: {reason}")
    return function


@functools.cache
def find(name: str) -> tuple[Callable[..., Any] | None, str]:
    """The function and '', or None and why not. A package that is there but can't be imported is a warning, once."""
    home = HOMES[name]
    package = home.partition(".")[0]
    spec = importlib.util.find_spec(package)
    if spec is None:
        return None, f"{package} is not installed"
    try:
        return getattr(_import(home, spec), name), ""
    except Exception as error:  # a mismatch with torch, triton or a compiled extension takes many forms
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(f"{home} is installed but can't be imported, so plain PyTorch runs ({reason})", stacklevel=3)
        return None, reason


def bare_mamba_ssm(spec: ModuleSpec) -> types.ModuleType:
    """A parent for mamba_ssm's Triton modules that, unlike the package's own code, asks for no CUDA extension."""
    bare = types.ModuleType("mamba_ssm")
    bare.__path__ = list(spec.submodule_search_locations or ())
    bare.__spec__ = spec  # without one `find_spec` raises from then on
    return bare


def _import(home: str, spec: ModuleSpec) -> types.ModuleType:
    package = home.partition(".")[0]
    if package != "mamba_ssm" or package in sys.modules:
        return importlib.import_module(home)
    # Under a bare parent, and the name is then left to whoever imports the package itself.
    sys.modules[package] = bare_mamba_ssm(spec)
    try:
        return importlib.import_module(home)
    finally:
        del sys.modules[package]


@functools.cache
def gated_backward_refused() -> bool:
    """Whether fla refuses the gradient of the gated delta rule here.

    On Hopper Triton 3.4 to 3.7.0 compiles a product in that kernel wrongly, so fla raises (its issue 640) unless
    tilelang is there to compute it.
    """
    import triton

    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    wrong = Version("3.4") <= Version(triton.__version__) < Version("3.7.1")
    return hopper and wrong and importlib.util.find_spec("tilelang") is None
