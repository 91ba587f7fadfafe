"""Times the convolution on a grid against cuDNN's 7 x 7 depthwise and 1-D convolutions doing the same work.

    python benchmarks/grid_conv.py --out benchmarks/results/grid_conv_h100.json

Both take bf16 activations and fp32 taps: a 7 x 7 kernel, a row and a column kernel as long as the grid both ways, each
channel its own, bias and SiLU; ours from `[B, h, w, D]`, where a model has them, cuDNN from the same memory seen as
`[B, D, h, w]` (channels last) and from a dense `[B, D, h, w]`. Milliseconds are medians with 20 % and 80 % quantiles of
CUDA-event times of whole calls through autograd, interleaved; backward means the gradients of x and of all taps.

`branches` is what a CHELA layer trains: 3 x 3, 7 x 7 and cross, each under a batch norm of its own, summed, SiLU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from chela_plugin.bench.timing import BANDWIDTH, conditions, event_times, passes, peak_over_inputs, quantiles
from chela_plugin.kernels.grid_conv import grid_conv, grid_conv_norm

CASES = [(64, 32, 32, 384), (64, 64, 64, 384), (256, 14, 14, 384)]  # (B, h, w, D)


def cudnn(x: Tensor, kernel: Tensor, row: Tensor, column: Tensor, bias: Tensor) -> Tensor:
    """x `[B, D, h, w]`, as one writes it with torch alone."""
    y = sum(
        F.conv2d(x, taps.to(x.dtype), padding=(taps.shape[2] // 2, taps.shape[3] // 2), groups=x.shape[1])
        for taps in (kernel, row, column)
    )
    return F.silu(y + bias.to(x.dtype)[:, None, None])


def runs_of(batch: int, h: int, w: int, dim: int) -> tuple[dict[str, Callable[[], object]], float]:
    """Runs by name, and the largest difference of cuDNN's result from ours over the largest number."""
    torch.manual_seed(0)
    x = torch.randn(batch, h, w, dim, dtype=torch.bfloat16, device="cuda")
    kernels = [torch.randn(dim, k, k, device="cuda") / k for k in (3, 7)]
    cross = torch.randn(4, dim, max(h, w), device="cuda") / 8
    bias = torch.zeros(dim, device="cuda")
    dy = torch.randn_like(x)
    right, left, down, up = cross
    row = torch.cat([left[:, 1:w].flip(1), right[:, :w]], 1)[:, None, None, :].flip(3)
    column = torch.cat([up[:, 1:h].flip(1), down[:, :h]], 1)[:, None, :, None].flip(2)
    parts = [part.contiguous() for part in (kernels[1].flip(1, 2)[:, None], row, column, bias)]
    last = x.permute(0, 3, 1, 2)
    first = last.contiguous()
    norms = [torch.full((dim,), float(i), device="cuda") for i in (1, 1, 1, 0, 0, 0)]

    def ours(x: Tensor, kernel: Tensor, cross: Tensor, bias: Tensor) -> Tensor:
        return grid_conv(x, kernel, cross, bias=bias, silu=True)

    def branches(x: Tensor, small: Tensor, large: Tensor, cross: Tensor, *norms: Tensor) -> Tensor:
        return grid_conv_norm(x, [small, large], cross, norms[:3], norms[3:], silu=True)

    forms: dict[str, tuple[Callable[..., Tensor], list[Tensor], Tensor]] = {
        "ours": (ours, [x, kernels[1], cross, bias], dy),
        "branches": (branches, [x, *kernels, cross, *norms], dy),
        "cudnn, channels last": (cudnn, [last, *parts], dy.permute(0, 3, 1, 2)),
        "cudnn, channels first": (cudnn, [first, *parts], dy.permute(0, 3, 1, 2).contiguous()),
    }
    runs: dict[str, Callable[[], object]] = {}
    for name, (function, leaves, given) in forms.items():
        both = passes(function, leaves, given)
        runs |= {f"{name}\0forward": both["forward"], f"{name}\0forward+backward": both["forward_backward"]}
    with torch.no_grad():
        found = ours(x, kernels[1], cross, bias).permute(0, 3, 1, 2).float()
        expected = cudnn(first, *parts).float()
        return runs, ((found - expected).abs().max() / expected.abs().max()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--revision")
    args = parser.parse_args()
    record = {**conditions(args.revision), "rounds": args.rounds, "results": []}
    for shape in CASES:
        runs, difference = runs_of(*shape)
        times = event_times(runs, args.rounds, warm_ups=1)
        batch, h, w, dim = shape
        for label, run in runs.items():
            name, what = label.split("\0")
            passes = 2 if what == "forward" else 5  # x read, y written; then x and dy read, dx written
            row = {"B": batch, "h": h, "w": w, "D": dim, "name": name, "what": what, "ms": quantiles(times[label])}
            row |= {"floor_ms": round(passes * 2 * batch * h * w * dim / BANDWIDTH * 1e3, 4)}
            record["results"].append(row | {"peak_mib": peak_over_inputs(run), "difference": round(difference, 5)})
            print(json.dumps(record["results"][-1]), flush=True)
        del runs
        torch.cuda.empty_cache()
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
