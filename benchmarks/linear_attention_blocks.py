"""Measures the Triton blocks of linear attention anew: prints every time and writes the winners to `h100.json`.

    python benchmarks/linear_attention_blocks.py [--out FILE] [--write] [--compile-only]
        [--widths 64 128] [--decays none static token] [--parts walks cuts]

At 32,768 bf16 tokens in 2,048 / width heads. Walks: forward and backward alone, all candidates of a length in turn; the
table gets a row for each number of (segment, head) pairs from which another candidate wins by more than 1 %. Cuts: how
many programs the cut of a long sequence aims at, and the blocks of its first level. Bidirectional passes and widths 32
and 256 keep their rows. `--compile-only` compiles all candidates in parallel; it may run beside other work.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
from torch import Tensor

from chela_plugin.bench.timing import event_times, quantiles
from chela_plugin.kernels.backend import ready_for
from chela_plugin.kernels.linear_attention import configs, launch
from chela_plugin.kernels.linear_attention.configs import DECAYS, Blocks

TOKENS = 32768
TIMES = (1024, 2048, 8192)
LONG = 32768
TABLE = Path(configs.__file__).parent / "h100.json"
chosen: dict[tuple[str, int, str], Blocks] = {}  # what a run takes in place of the table, by (pass, width, decay)
target: list[int] = []


def candidates(kernel: str, width: int, decay: str) -> list[Blocks]:
    """What is worth a try; NOTES-linear_attention.md has what has lost everywhere (8 warps, chunks of 128, ...)."""
    if kernel == "gather":
        return [Blocks(64, 64, 4, 4), Blocks(64, width, 4, 3)]
    if width == 64:
        few_registers = [Blocks(64, 64, 4, 2, 168)] if kernel == "backward" and decay != "none" else []
        return [Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 2), *few_registers]
    whole = [Blocks(64, 128, 4, 3)] if decay == "none" or (kernel, decay) == ("forward", "static") else []
    return [Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 3), *whole]


def problem(time: int, width: int, decay: str) -> tuple[Tensor, ...]:
    g = torch.Generator("cuda").manual_seed(0)
    batch, heads = TOKENS // time, 2048 // width
    q, k, v, do = (torch.randn(batch, time, heads, width, device="cuda", generator=g).bfloat16() for _ in range(4))
    log_decay = -0.1 * torch.rand([batch, time, heads] if decay == "token" else [heads], device="cuda", generator=g)
    return q, k, v, do, log_decay


def passes(time: int, width: int, decay: str) -> dict[str, Callable[[], object]]:
    """The passes, each with the blocks that are chosen when it runs; `saving` is forward ahead of a backward pass."""
    q, k, v, do, log_decay = problem(time, width, decay)
    d = None if decay == "none" else log_decay
    scale = width**-0.5
    kept: dict[tuple, tuple] = {}  # what a forward pass keeps depends on the cut alone

    def forward() -> object:
        launch.forget_blocks()  # it remembers what the table said
        return launch.causal_forward(q, k, v, d, None, None, scale, False, False)

    def backward() -> object:
        launch.forget_blocks()
        cut = (tuple(target), chosen.get(("forward", width, decay)))
        if cut not in kept:
            kept[cut] = saving()
        return launch.causal_backward(q, k, v, d, None, None, *kept[cut], do, None, scale)

    def saving() -> tuple:
        launch.forget_blocks()
        return launch.causal_forward(q, k, v, d, None, None, scale, d is None, True)[1:]

    return {"forward": forward, "backward": backward, "saving": saving}


def with_blocks(run: Callable[[], object], programs: int | None, **blocks: Blocks) -> Callable[[], object]:
    """`run` with these blocks (`kernel=blocks`, of any width and decay) and this aim of the cut."""

    def call() -> object:
        chosen.clear()
        chosen.update(
            {(kernel, width, decay): b for kernel, b in blocks.items() for width in (64, 128) for decay in DECAYS}
        )
        target[:] = [] if programs is None else [programs]
        with ready_for(torch.empty(0, device="cuda")):
            return run()

    return call


def choose_blocks() -> None:
    """Let the launches ask `chosen` and `target` before the table."""
    table, aim = configs.blocks_for, configs.target_programs

    def blocks_for(kernel: str, K: int, V: int, element_size: int, decay: int, pairs: int = 0) -> Blocks:
        return chosen.get((kernel, K, DECAYS[decay])) or table(kernel, K, V, element_size, decay, pairs)

    launch.blocks_for = blocks_for
    launch.target_programs = lambda *args: target[0] if target else aim(*args)


def runs(width: int, decay: str, time: int) -> Iterator[tuple[str, dict, Callable[[], object]]]:
    """(pass, what it runs with, the run) of every candidate: of the walks, or at LONG of the cut."""
    run = passes(time, width, decay)
    for kernel in ("forward", "backward"):
        if time != LONG:
            for blocks in candidates(kernel, width, decay):
                yield kernel, {"blocks": blocks}, with_blocks(run[kernel], None, **{kernel: blocks})
        else:
            for programs, blocks in itertools.product((128, 256), candidates("gather", width, decay)):
                what = {"programs": programs, "blocks": blocks}
                yield kernel, what, with_blocks(run[kernel], programs, gather=blocks)


def compile_candidates(case: tuple[int, str, int, bool]) -> None:
    """Run each once; where walks are measured too, which wins is not known yet, and each meets each of its uses."""
    width, decay, time, walks = case
    choose_blocks()
    for *_, candidate in runs(width, decay, time):
        attempt(candidate)
    if walks:
        run = passes(time, width, decay)
        for uses, kernel in ((("forward", "saving"), "forward"), (("backward",), "backward")):
            for use, blocks in itertools.product(uses, candidates(kernel, width, decay)):
                attempt(with_blocks(run[use], 128 if time == LONG else None, **{kernel: blocks}))
    torch.cuda.synchronize()


def attempt(run: Callable[[], object]) -> bool:
    try:
        run()
    except triton.runtime.errors.OutOfResources:  # more shared memory than the card has
        return False
    return True


def measure(width: int, decay: str, time: int, rounds: int) -> list[dict]:
    named = {str(i): entry for i, entry in enumerate(runs(width, decay, time)) if attempt(entry[2])}
    times = event_times({name: entry[2] for name, entry in named.items()}, rounds, warm_ups=1)
    rows = []
    for name, (kernel, what, _) in named.items():
        row = {"pass": kernel, "width": width, "decay": decay, "T": time, **what, "ms": quantiles(times[name])[0]}
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def walk_rows(found: list[dict], kernel: str, width: int, decay: str) -> list[dict]:
    """Rows of the table for one pass: fewest pairs first, a row where another candidate wins by more than 1 %."""
    rows: list[dict] = []
    for time in sorted(TIMES, reverse=True):
        times = {tuple(r["blocks"]): r["ms"] for r in found if (r["pass"], r["T"]) == (kernel, time)}
        best = min(times, key=lambda blocks: times[blocks])
        if rows and times.get(rows[-1]["key"], 9e9) <= 1.01 * times[best]:
            continue
        least = (TOKENS // time) * (2048 // width) if rows else 0
        rows.append({"least": least, "key": best})
    return [entry(kernel, width, decay, row["least"], Blocks(*row["key"])) for row in rows]


def entry(kernel: str, width: int, decay: str, least: int, blocks: Blocks) -> dict:
    row = {"pass": kernel, "width": width, "decay": decay, "least": least, **blocks._asdict()}
    return {name: value for name, value in row.items() if value is not None}


def write(table: dict) -> None:
    rows = ",\n".join("    " + json.dumps(row) for row in table["blocks"])
    head = f'{{\n  "device": "{table["device"]}",\n  "programs": {json.dumps(table["programs"])},\n'
    written = TABLE.with_suffix(".new")
    written.write_text(f'{head}  "blocks": [\n{rows}\n  ]\n}}\n')
    os.replace(written, TABLE)
    for remembered in (configs._file, configs._table, configs._rows):
        remembered.cache_clear()


def with_rows(table: dict, width: int, decay: str, kernels: tuple[str, ...], new: list[dict]) -> dict:
    """The table with `new` in place of these kernels' rows."""
    kept = [r for r in table["blocks"] if (r["width"], r["decay"]) != (width, decay) or r["pass"] not in kernels]
    order = sorted(kept + new, key=lambda r: (DECAYS.index(r["decay"]), r["pass"], r["width"], r["least"]))
    return table | {"blocks": order}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="every time, one JSON line each")
    parser.add_argument("--write", action="store_true", help="the winners to the table that the kernels read")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--decays", nargs="+", default=list(DECAYS), choices=DECAYS)
    parser.add_argument("--parts", nargs="+", default=["walks", "cuts"], choices=["walks", "cuts"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile-only", action="store_true")
    options = parser.parse_args()
    kinds = list(itertools.product(options.widths, options.decays))
    walks, cuts = "walks" in options.parts, "cuts" in options.parts
    if options.compile_only:
        times = ([LONG] if cuts else []) + ([2048, 8192] if walks else [])
        with multiprocessing.get_context("spawn").Pool(min(9, os.cpu_count() or 1)) as pool:
            pool.map(compile_candidates, [(*kind, time, walks) for kind in kinds for time in times], chunksize=1)
        return
    choose_blocks()
    table = json.loads(TABLE.read_text())
    table["device"] = torch.cuda.get_device_name()
    found: list[dict] = []
    for width, decay in kinds:
        if walks:
            short = [row for time in TIMES for row in measure(width, decay, time, options.rounds)]
            new = [row for kernel in ("forward", "backward") for row in walk_rows(short, kernel, width, decay)]
            table = with_rows(table, width, decay, ("forward", "backward"), new)
            found += short
            if options.write:
                write(table)  # the cuts are measured with these
        if cuts:
            long = measure(width, decay, LONG, options.rounds)
            sums: dict[tuple, float] = {}
            for row in long:
                key = (row["programs"], tuple(row["blocks"]))
                sums[key] = sums.get(key, 0.0) + row["ms"]
            programs, gather = min(sums, key=lambda key: sums[key])
            table["programs"][f"{width} {decay}"] = programs
            table = with_rows(table, width, decay, ("gather",), [entry("gather", width, decay, 0, Blocks(*gather))])
            found += long
            if options.write:
                write(table)
        if options.out:
            options.out.write_text("\n".join(json.dumps(row) for row in found) + "\n")


if __name__ == "__main__":
    main()
