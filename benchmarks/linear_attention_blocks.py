"""Measures the Triton blocks of linear attention anew and prints the rows of `h100.json` that won.

    python benchmarks/linear_attention_blocks.py [--out FILE] [--widths 64 128] [--times 2048 8192 32768]

Every pass is timed alone, at 32,768 bf16 tokens in 2,048 / width heads. The table takes one row for few
(segment, head) pairs and one for many; which `least` to write is read off the times at short and long T.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch import Tensor

from chela_plugin.kernels.backend import ready_for
from chela_plugin.kernels.linear_attention import configs, launch
from chela_plugin.kernels.linear_attention.configs import Blocks

TOKENS = 32768
DECAYS = ["none", "static", "token"]


def candidates(width: int, kernel: str) -> list[Blocks]:
    """What is worth a try: chunks of 64, full or half columns, and the stages that fit."""
    columns = sorted({width, max(width // 2, 32)})
    warps = (4,) if width <= 64 else (4, 8)
    stages: tuple[int, ...] = (2, 3) if width <= 128 else (1, 2)
    if kernel in ("gather", "read"):
        stages = (2, 3, 4)
    return [Blocks(64, x, w, s) for x in columns for w in warps for s in stages]


def problem(time: int, heads: int, width: int, decay: str) -> tuple[Tensor, ...]:
    g = torch.Generator("cuda").manual_seed(0)
    batch = TOKENS // time
    q, k, v, do = (torch.randn(batch, time, heads, width, device="cuda", generator=g).bfloat16() for _ in range(4))
    shape = [batch, time, heads] if decay == "token" else [heads]
    log_decay = -0.1 * torch.rand(shape, device="cuda", generator=g)
    return q, k, v, do, log_decay


def passes(time: int, heads: int, width: int, decay: str) -> dict[str, Callable[[], object]]:
    """Causal forward and backward, and bidirectional where there is no decay."""
    q, k, v, do, log_decay = problem(time, heads, width, decay)
    d = None if decay == "none" else log_decay
    scale = width**-0.5
    _, state, saved = launch.causal_forward(q, k, v, d, None, None, scale, d is None, True)
    runs: dict[str, Callable[[], object]] = {
        "forward": lambda: launch.causal_forward(q, k, v, d, None, None, scale, False, False),
        "backward": lambda: launch.causal_backward(q, k, v, d, None, None, state, saved, do, None, scale),
    }
    if d is None:
        _, both = launch.bidirectional_forward(q, k, v, None, None, None, scale, True)
        assert both is not None
        runs["bidirectional"] = lambda: (
            launch.bidirectional_forward(q, k, v, None, None, None, scale, True),
            launch.bidirectional_backward(q, k, v, None, None, None, both, do, None, scale),
        )
    return runs


def main(milliseconds: Callable[[Callable[[], object]], float]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--times", type=int, nargs="+", default=[2048, 8192, 32768])
    options = parser.parse_args()
    table = configs.blocks_for
    found: list[dict] = []
    for width in options.widths:
        for decay in DECAYS:
            for time in options.times:
                heads = max(1, 2048 // width)
                for kernel in ["forward", "backward", "gather"] + (
                    ["bidirectional", "read"] if decay == "none" else []
                ):
                    # A gather and a read are timed inside the pass that they are a part of.
                    timed = {"gather": "forward", "read": "bidirectional"}.get(kernel, kernel)
                    for blocks in candidates(width, kernel):

                        def chosen(name: str, *rest, kernel=kernel, blocks=blocks) -> Blocks:
                            return blocks if name == kernel else table(name, *rest)

                        launch.blocks_for = chosen
                        launch._forward_blocks.cache_clear()  # it remembers what the table said
                        row = {"pass": kernel, "width": width, "decay": decay, "T": time, **blocks._asdict()}
                        try:
                            with ready_for(torch.empty(0, device="cuda")):
                                row["ms"] = round(milliseconds(passes(time, heads, width, decay)[timed]), 4)
                        except triton.runtime.errors.OutOfResources:
                            row["ms"] = None  # more shared memory than the card has
                        found.append(row)
                        print(json.dumps(row), flush=True)
    launch.blocks_for = table
    launch._forward_blocks.cache_clear()
    if options.out:
        options.out.write_text("\n".join(json.dumps(row) for row in found) + "\n")
    best: dict[tuple, dict] = {}
    for row in found:
        key = (row["pass"], row["width"], row["decay"], row["T"])
        if row["ms"] is not None and row["ms"] < best.get(key, {"ms": float("inf")})["ms"]:
            best[key] = row
    for row in best.values():
        print(json.dumps(row))


if __name__ == "__main__":
    main(lambda run: triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median"))
