"""Every Triton kernel once at small, uneven shapes, for compute-sanitizer; without it a plain run.

    compute-sanitizer --tool memcheck --error-exitcode 1 python tests/gpu/sanitizer_cases.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/gpu/sanitizer_cases.py

memcheck with PYTORCH_NO_CUDA_MEMORY_CACHING=1: then each tensor ends where its memory ends. The exit code is 1 if some
kernel was never launched.
"""

from __future__ import annotations

import importlib
import os
import sys

import torch

from chela_plugin.kernels.gated_norm import gated_norm
from chela_plugin.kernels.linear_attention import linear_attention, linear_attention_step
from chela_plugin.kernels.long_conv import long_conv, modal_conv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODULES = [
    "gated_norm.triton",
    "linear_attention.triton",
    "linear_attention.triton_bidirectional",
    "long_conv.triton",
    "long_conv.triton_modal",
]


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype).requires_grad_()


def both_ways(*outputs: torch.Tensor | None) -> None:
    there = [o for o in outputs if o is not None]
    torch.autograd.backward(there, [torch.randn_like(o) for o in there])


def attention() -> None:
    cuts = torch.tensor([0, 1, 70, 70, 2101], device=DEVICE)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for decay in ("none", "static", "token"):
            # Odd lengths and widths; long enough for two levels of segments where heads are few.
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
        for batch, time, heads, width in ((2, 67, 3, 40), (1, 2101, 1, 64)):
            q, k, v = (random(batch, time, heads, width, dtype=dtype) for _ in range(3))
            mask = torch.rand(batch, time, device=DEVICE) > 0.2
            both_ways(linear_attention(q, k, v, causal=False, mask=mask)[0])
            both_ways(*linear_attention(q, k, v, causal=False, output_final_state=True))
            if batch == 1:
                both_ways(linear_attention(q, k, v, causal=False, cu_seqlens=cuts)[0])


def convolutions() -> None:
    for time, D, dtype in ((67, 20, torch.bfloat16), (300, 32, torch.float16), (130, 17, torch.float32)):
        x = random(2, time, D, dtype=dtype)
        both_ways(long_conv(x, random(D, time, dtype=torch.float32), random(D, dtype=torch.float32)))
        both_ways(long_conv(x, random(D, 2 * 33 - 1, dtype=torch.float32), causal=False))
        packed = random(1, time, D, dtype=dtype)
        cuts = torch.tensor([0, 1, 40, time], device=DEVICE)
        both_ways(long_conv(packed, random(D, 50, dtype=torch.float32), cu_seqlens=cuts))
    for dtype in (torch.bfloat16, torch.float32):
        groups, modes, D = 2, 4, 32
        log_time, frequency = (random(groups, modes, dtype=torch.float32) for _ in range(2))
        residue = random(groups, modes, 2, dtype=torch.float32)
        for options in ({}, {"silu": True, "bias": random(D, dtype=torch.float32)}):
            both_ways(modal_conv(random(2, 131, D, dtype=dtype), log_time, frequency, residue, **options))
        long = random(1, 4200, D, dtype=dtype)
        both_ways(modal_conv(long, log_time, frequency, residue))
        cuts = torch.tensor([0, 3, 3, 700, 4200], device=DEVICE)
        both_ways(modal_conv(long, log_time, frequency, residue, cu_seqlens=cuts))


def norms() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for heads, width in ((3, 40), (2, 64)):
            o, v = random(2, 67, heads, width, dtype=dtype), random(2, 67, heads, width, dtype=dtype)
            weight, gate = random(heads, width, dtype=torch.float32), random(2, 67, heads * width, dtype=dtype)
            both_ways(gated_norm(o, weight, gate, v=v, skip=random(heads, dtype=torch.float32)))
            both_ways(gated_norm(o, weight, gate))


def never_launched() -> list[str]:
    """Kernels of ours without a compiled form, those aside that only other kernels call (`_name`)."""
    from triton.runtime.jit import JITFunction

    missing = []
    for name in MODULES:
        module = importlib.import_module(f"chela_plugin.kernels.{name}")
        for attribute, kernel in vars(module).items():
            if isinstance(kernel, JITFunction) and not attribute.startswith("_"):
                compiled = any(len(caches[0]) for caches in kernel.device_caches.values())
                missing += [] if compiled else [f"{name}:{attribute}"]
    return missing


def main() -> int:
    failed = []
    for part in (attention, convolutions, norms):
        try:
            part()
        except Exception as error:
            failed.append(f"{part.__name__}: {type(error).__name__}: {error}")
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        if os.environ.get("TRITON_INTERPRET", "0") != "1":
            failed += [f"never launched: {name}" for name in never_launched()]
    print("\n".join(failed) or "every kernel ran")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
