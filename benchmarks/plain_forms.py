"""Times plain PyTorch forms on one CPU core against what they were chosen over; writes JSON.

    OMP_NUM_THREADS=1 python benchmarks/plain_forms.py --out benchmarks/results/plain_forms_cpu.json

Three choices rest on it: `CausalConv` as shifted products and not `F.conv1d`, the chunk of `selective_scan`, and the
number of tokens up to which `long_conv` multiplies by a Toeplitz matrix. fp32, forward and backward, milliseconds:
median, 20 % and 80 %, the contenders of a case one after the other in every round.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from chela_plugin import create_mixer
from chela_plugin.bench.timing import clock_times, conditions, quantiles
from chela_plugin.kernels.long_conv.reference import direct, fft
from chela_plugin.kernels.selective_scan import reference as scan
from chela_plugin.layers.causal_conv import CausalConv


def both(forward: Callable[..., Tensor], leaves: list[Tensor]) -> Callable[[], object]:
    """Forward and backward, to `leaves` and the module's parameters."""
    live = [x.detach().requires_grad_() for x in leaves]
    weights = list(forward.parameters()) if isinstance(forward, torch.nn.Module) else []
    return lambda: torch.autograd.grad(forward(*live).sum(), [*live, *weights])


def conv1d(conv: CausalConv, x: Tensor, _state: None, _length: None) -> tuple[Tensor, Tensor]:
    """`CausalConv.forward` without a cache, through cuDNN's and oneDNN's operator."""
    padded = F.pad(x, (0, 0, conv.taps - 1, 0))
    y = F.conv1d(padded.transpose(1, 2), conv.weight[:, None], conv.bias, groups=len(conv.weight))
    return y.transpose(1, 2), padded[:, x.shape[1] :]


def through(forward: Callable[..., object], run: Callable[[], object]) -> Callable[[], object]:
    """`run` with another `CausalConv.forward`."""

    def patched() -> object:
        with patch.object(CausalConv, "forward", forward):
            return run()

    return patched


def causal_conv_cases() -> dict[str, dict[str, Callable[[], object]]]:
    """Inside whole mixers: a form also costs what its memory order costs the operations around it."""
    cases = {}
    for spec in ("mamba2", "mamba", "gated_deltanet"):
        for batch, tokens, dim in ((32, 64, 64), (16, 256, 128), (2, 1024, 256)):
            mixer = create_mixer(spec, dim, causal=True)
            leaves = [torch.randn(batch, tokens, dim)]
            run = both(mixer, leaves)
            cases[f"{spec}, B {batch}, T {tokens}, C {dim}"] = {
                "shifted products": through(CausalConv.forward, run),
                "conv1d": through(conv1d, run),
            }
    return cases


def in_chunks_of(chunk: int, run: Callable[[], object]) -> Callable[[], object]:
    def patched() -> object:
        with patch.object(scan, "CHUNK", chunk):
            return run()

    return patched


def scan_cases() -> dict[str, dict[str, Callable[[], object]]]:
    cases = {}
    for batch, tokens, channels, states in ((8, 256, 256, 16), (1, 1024, 512, 16)):
        u, delta = torch.randn(batch, tokens, channels), torch.rand(batch, tokens, channels)
        b, c = torch.randn(2, batch, tokens, states)
        leaves = [u, delta, -torch.rand(channels, states), b, c]
        name = f"selective_scan, B {batch}, T {tokens}, D {channels}, N {states}"
        run = both(lambda *live: scan.chunked(*live)[0], leaves)
        cases[name] = {f"chunk {n}": in_chunks_of(n, run) for n in (16, 32, 64)}
    return cases


def long_conv_cases() -> dict[str, dict[str, Callable[[], object]]]:
    cases = {}
    for batch, tokens in ((512, 8), (256, 16), (128, 32), (64, 64), (8, 16), (8, 64), (8, 128)):
        leaves = [torch.randn(batch, tokens, 256), torch.randn(256, tokens)]
        cases[f"long_conv, B {batch}, T {tokens}, D 256"] = {
            "direct": both(partial(direct, causal=True), leaves),
            "fft": both(partial(fft, causal=True), leaves),
        }
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--revision", help="of the code, where there is no git repository")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cases = causal_conv_cases() | scan_cases() | long_conv_cases()
    results = []
    for name, runs in cases.items():
        times = clock_times(runs, args.rounds)
        results.append({"case": name, "ms": {form: quantiles(ms) for form, ms in times.items()}})
        print(json.dumps(results[-1]), flush=True)
    record = {**conditions(args.revision, "cpu"), "rounds": args.rounds, "results": results}
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
