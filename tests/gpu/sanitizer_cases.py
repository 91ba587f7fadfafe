"""Every Triton kernel once at small, uneven shapes, for compute-sanitizer; without it a plain run.

    compute-sanitizer --tool memcheck --error-exitcode 1 python tests/gpu/sanitizer_cases.py [PART ...]
    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/gpu/sanitizer_cases.py [PART ...]

memcheck with PYTORCH_NO_CUDA_MEMORY_CACHING=1: then each tensor ends where its memory ends. The exit code is 1 if a
part fails, or if all parts ran and some kernel was never launched. A new op is one more function with `@part`; its
kernels are found without being listed. `--list` names the parts, so that they can run beside one another.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import pkgutil
import sys
from collections.abc import Callable

import torch

from chela_plugin import kernels
from chela_plugin.kernels.add_norm import add_norm, add_rms_norm
from chela_plugin.kernels.folded_taps import folded_taps
from chela_plugin.kernels.gated_norm import gated_norm
from chela_plugin.kernels.linear_attention import linear_attention, linear_attention_step
from chela_plugin.kernels.long_conv import long_conv, modal_conv
from chela_plugin.kernels.rotary import rotary_qkv
from chela_plugin.layers import Chela, ShortLongConv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALL = (torch.bfloat16, torch.float16, torch.float32)
TWO = (torch.bfloat16, torch.float32)  # for kernels to which both of 16 bits are alike
PARTS: dict[str, Callable[[], None]] = {}


def part(**choices: tuple) -> Callable:
    """Registers a function as parts, one for each combination of its arguments' `choices`."""

    def register(cases: Callable) -> Callable:
        for values in itertools.product(*choices.values()):
            name = "-".join([cases.__name__, *(str(value).removeprefix("torch.") for value in values)])
            PARTS[name] = functools.partial(cases, **dict(zip(choices, values, strict=True)))
        return cases

    return register


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype).requires_grad_()


def both_ways(*outputs: torch.Tensor | None) -> None:
    there = [o for o in outputs if o is not None]
    torch.autograd.backward(there, [torch.randn_like(o) for o in there])


@part(decay=("none", "static", "token"), dtype=ALL)
def attention(decay: str, dtype: torch.dtype) -> None:
    """Odd lengths and widths; long enough for two levels of segments where heads are few."""
    cuts = torch.tensor([0, 1, 70, 70, 2101], device=DEVICE)
    for time, heads, K, V in ((67, 3, 40, 24), (2101, 1, 64, 64)):
        q, k = random(1, time, heads, K, dtype=dtype), random(1, time, heads, K, dtype=dtype)
        v = random(1, time, heads, V, dtype=dtype)
        shape = {"static": (heads,), "token": (1, time, heads)}.get(decay)
        d = None if shape is None else (-0.1 * torch.rand(shape, device=DEVICE)).requires_grad_()
        state = random(1, heads, K, V, dtype=torch.float32)
        both_ways(*linear_attention(q, k, v, d, initial_state=state, output_final_state=True))
        if time == 2101:
            both_ways(*linear_attention(q, k, v, d, cu_seqlens=cuts, output_final_state=True))
        with torch.no_grad():
            now = d if d is None or d.dim() == 1 else d[:, 0]
            linear_attention_step(q[:, 0], k[:, 0], v[:, 0], state, now)


@part(dtype=ALL)
def attention_that_looks_ahead(dtype: torch.dtype) -> None:
    cuts = torch.tensor([0, 1, 70, 70, 2101], device=DEVICE)
    for batch, time, heads, width in ((2, 67, 3, 40), (1, 2101, 1, 64)):
        q, k, v = (random(batch, time, heads, width, dtype=dtype) for _ in range(3))
        mask = torch.rand(batch, time, device=DEVICE) > 0.2
        both_ways(linear_attention(q, k, v, causal=False, mask=mask)[0])
        both_ways(*linear_attention(q, k, v, causal=False, output_final_state=True))
        if batch == 1:
            both_ways(linear_attention(q, k, v, causal=False, cu_seqlens=cuts)[0])


@part(dtype=ALL)
def convolutions(dtype: torch.dtype) -> None:
    for time, D in ((67, 20), (130, 17), (300, 32)):
        x = random(2, time, D, dtype=dtype)
        both_ways(long_conv(x, random(D, time, dtype=torch.float32), random(D, dtype=torch.float32)))
        both_ways(long_conv(x, random(D, 2 * 33 - 1, dtype=torch.float32), causal=False))
        packed = random(1, time, D, dtype=dtype)
        cuts = torch.tensor([0, 1, 40, time], device=DEVICE)
        both_ways(long_conv(packed, random(D, 50, dtype=torch.float32), cu_seqlens=cuts))


@part(dtype=TWO)
def modal_convolutions(dtype: torch.dtype) -> None:
    groups, modes, D = 2, 4, 32
    log_time, frequency = (random(groups, modes, dtype=torch.float32) for _ in range(2))
    residue = random(groups, modes, 2, dtype=torch.float32)
    short, scale, bias = (random(*shape, dtype=torch.float32) for shape in ((D, 7), (D,), (D,)))
    whole = {"silu": True, "short": short, "scale": scale, "bias": bias}
    for options in ({}, {"silu": True, "bias": bias}, whole):
        both_ways(modal_conv(random(2, 131, D, dtype=dtype), log_time, frequency, residue, **options))
    long = random(1, 4200, D, dtype=dtype)
    both_ways(modal_conv(long, log_time, frequency, residue), modal_conv(long, log_time, frequency, residue, **whole))
    aside = random(1, 4200, 2 * D, dtype=dtype)[..., :D]  # a stride of time that is not the width
    both_ways(modal_conv(aside, log_time, frequency, residue, **whole))
    cuts = torch.tensor([0, 3, 3, 700, 4200], device=DEVICE)
    both_ways(modal_conv(long, log_time, frequency, residue, cu_seqlens=cuts, **whole))


@part(long=("modal", "multiscale", "explicit"), dtype=TWO)
def decoding(long: str, dtype: torch.dtype) -> None:
    """Steps from an empty cache on, over the ends of several blocks; channels that fill no block of a kernel."""
    for dim, group, short in ((70, 7, (3, 7)), (8, 8, (2,)), (128, 16, (4,))):
        layer = ShortLongConv(dim, causal=True, short=short, long=long, group_size=group, device=DEVICE).eval()
        for folded in (False, True):
            if folded:
                layer.reparameterize()
            with torch.no_grad():
                cache = layer.init_cache(3, dtype=dtype)
                for _ in range(40):
                    layer(random(3, 1, dim, dtype=dtype), cache=cache)


@part(long=("modal", "multiscale"), dtype=TWO)
def layers(long: str, dtype: torch.dtype) -> None:
    """CHELA as a whole, whose kernels around the attention have no operator of their own; widths that fill no block."""
    for dim, time in ((96, 131), (64, 9)):
        layer = Chela(dim, causal=True, long=long, device=DEVICE)
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            both_ways(layer(random(2, time, dim, dtype=torch.float32)))


@part(dtype=ALL)
def grids(dtype: torch.dtype) -> None:
    """Grids that are no squares, kernels wider than the grid, channels that fill no block; products of matrices."""
    from chela_plugin.kernels.grid_conv import grid_conv, grid_conv_norm

    def fp32(*shape: int) -> torch.Tensor:
        return random(*shape, dtype=torch.float32)

    for h, w, D, groups in ((5, 7, 24, 3), (2, 3, 8, 8), (17, 14, 40, 5), (34, 41, 12, 2)):
        x, shorts, cross = random(2, h, w, D, dtype=dtype), [fp32(D, k, k) for k in (3, 7)], fp32(4, groups, max(h, w))
        both_ways(grid_conv(x, shorts[1], cross, scale=fp32(D), bias=fp32(D), silu=True))
        both_ways(grid_conv(x, shorts[0]))
        both_ways(grid_conv(x, None, cross))
        for silu in (False, True):
            weights, biases = ([fp32(D) for _ in range(3)] for _ in range(2))
            running = [(torch.zeros(D, device=DEVICE), torch.ones(D, device=DEVICE)) for _ in range(3)]
            both_ways(grid_conv_norm(x, shorts, cross, weights, biases, running=running, silu=silu))


@part(dtype=ALL)
def vision_mlp(dtype: torch.dtype) -> None:
    """Rows and hidden channels that fill no block."""
    from timm.layers import Mlp

    from chela_plugin.layers.gelu_mlp import mlp_of, stands_for

    mlp = Mlp(24, 270, device=DEVICE)
    x = random(2, 37, 24, dtype=dtype)
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        assert stands_for(mlp, x) or DEVICE == "cpu"
        both_ways(mlp_of(mlp, x))


@part()
def taps() -> None:
    """Generated and given long filters, one-sided and two-sided, of more than one block of columns."""
    for causal in (True, False):
        sides, short = 1 if causal else 2, [random(6, k, dtype=torch.float32) for k in (3, 7)]
        scales = random(3, 6, dtype=torch.float32)
        for length in (9, 1300):
            source, ratio = random(2 * sides, 5, 4, dtype=torch.float32), random(2 * sides, dtype=torch.float32)
            both_ways(folded_taps(source, ratio, length=length, scales=scales, kernels=short, causal=causal))
            given = random(2 * sides, length, dtype=torch.float32)
            both_ways(folded_taps(given, length=length, scales=scales, kernels=short, causal=causal))
        both_ways(folded_taps(None, length=9, scales=random(2, 6, dtype=torch.float32), kernels=short, causal=causal))


@part(dtype=TWO)
def norms(dtype: torch.dtype) -> None:
    for heads, width in ((3, 40), (2, 64)):
        o, v = random(2, 67, heads, width, dtype=dtype), random(2, 67, heads, width, dtype=dtype)
        weight, gate = random(heads, width, dtype=torch.float32), random(2, 67, heads * width, dtype=dtype)
        both_ways(gated_norm(o, weight, gate, v=v, skip=random(heads, dtype=torch.float32)))
        both_ways(gated_norm(o, weight, gate))
        x, branch = random(3, 5, 72, dtype=torch.float32), random(3, 5, 72, dtype=dtype)
        scale, shift = random(72, dtype=torch.float32), random(72, dtype=torch.float32)
        both_ways(*add_norm(x, branch, scale, shift, dtype=dtype))
        both_ways(*add_norm(branch, None, scale, shift))
        both_ways(*add_rms_norm(x, branch, scale))
        position = torch.arange(67, device=DEVICE)
        both_ways(*rotary_qkv(random(2, 67, 3, heads, width, dtype=dtype), position))


def never_launched() -> list[str]:
    """Kernels of ours without a compiled form, those aside that only other kernels call (`_name`)."""
    from triton.runtime.jit import JITFunction

    missing = []
    for found in pkgutil.walk_packages(kernels.__path__, "chela_plugin.kernels."):
        if not found.name.rpartition(".")[-1].startswith("triton"):
            continue
        for attribute, kernel in vars(importlib.import_module(found.name)).items():
            if isinstance(kernel, JITFunction) and not attribute.startswith("_"):
                compiled = any(len(caches[0]) for caches in kernel.device_caches.values())
                missing += [] if compiled else [f"{found.name}:{attribute}"]
    return missing


def main(names: list[str]) -> int:
    if names == ["--list"]:
        print("\n".join(PARTS))
        return 0
    failed = []
    for name in names or PARTS:
        try:
            PARTS[name]()
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {error}")
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        if not names and os.environ.get("TRITON_INTERPRET", "0") != "1":
            failed += [f"never launched: {name}" for name in never_launched()]
    print("\n".join(failed) or "every kernel ran" + (f" of {', '.join(names)}" if names else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
