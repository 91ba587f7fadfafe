"""Times whole mixers, forward and forward with backward, interleaved in one process; writes JSON.

    python benchmarks/layers.py --out benchmarks/results/layers_h100.json

Every mixer has width 1,024, bf16 weights and about 4 D^2 parameters where its published form allows; 32,768 tokens a
call. Milliseconds are medians with 20 % and 80 % quantiles of CUDA-event times of eager calls; `path` is the
implementation that ran. fla's layers run fla's kernels, warmed up before they are timed; their autotune is left out.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path

import torch
from timing import conditions, event_times, peak_over_inputs, quantiles

from chela_plugin import create_mixer

DIM, TOKENS = 1024, 32768
SPECS = (
    "chela",
    "chela(long=modal)",
    "chela(long=none)",
    "conv",
    "attention",
    "linear_attention",
    "retnet",
    "mamba2(expand=1.25)",
    "mamba2",
)


def forward(mixer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return mixer(x)


def both(mixer: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(mixer(x), [x, *mixer.parameters()], dy, allow_unused=True)


def measure(tokens: int, specs: list[str], rounds: int) -> list[dict[str, object]]:
    batch = TOKENS // tokens
    x, dy = (torch.randn(batch, tokens, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x.requires_grad_()
    mixers, warm = {}, {}
    for spec in specs:
        torch.manual_seed(0)
        start = time.perf_counter()
        mixers[spec] = create_mixer(spec, DIM, causal=True, depth=24, device="cuda", dtype=torch.bfloat16)
        both(mixers[spec], x, dy)
        torch.cuda.synchronize()
        warm[spec] = round(time.perf_counter() - start, 2)
    f_times = event_times({spec: partial(forward, mixer, x) for spec, mixer in mixers.items()}, rounds)
    b_times = event_times({spec: partial(both, mixer, x, dy) for spec, mixer in mixers.items()}, rounds)
    return [
        {
            "B": batch, "T": tokens, "D": DIM, "mixer": spec,
            "path": mixer.path("cuda") if hasattr(mixer, "path") else "unknown",
            "parameters": sum(p.numel() for p in mixer.parameters()),
            "forward_ms": quantiles(f_times[spec]), "forward_backward_ms": quantiles(b_times[spec]),
            "peak_mib": peak_over_inputs(partial(both, mixer, x, dy)), "first_call_s": warm[spec],
        }
        for spec, mixer in mixers.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 32768])
    parser.add_argument("--fla", nargs="*", default=[], metavar="LAYER", help="fla layers to time beside ours")
    parser.add_argument("--revision", default=None, help="of the code, where there is no git repository")
    args = parser.parse_args()
    specs = [*SPECS, *(f"fla(layer={layer})" for layer in args.fla)]
    record: dict[str, object] = {**conditions(args.revision), "rounds": args.rounds, "results": []}
    rows: list[dict[str, object]] = []
    for tokens in args.tokens:
        for row in measure(tokens, specs, args.rounds):
            print(json.dumps(row), flush=True)
            rows.append(row)
        record["results"] = rows
        if args.out:
            args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
