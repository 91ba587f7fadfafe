"""Every table of training results on one GPU, in slices: `python benchmarks/training.py --seconds 540`.

The same command goes on where it stopped, and ends with exit code 75 as long as something is left. Runs work under
`runs/training/`; after each slice, manifest, results, report and curves lie under `benchmarks/results/<table>_h100/`,
from which another machine goes on: a run that was read on the test split is never made again.

Runs share the card, and the peers' kernels take one configuration instead of searching (`first_configuration/`), so the
tokens a second in these tables compare nothing; `chela bench` does that.

Tables come in the order of what they tell a second: MQAR, MAD, CHELA's own choices, images, language models, long
sequences. Steps are fewer than published where that is said below; nothing else differs from the shipped ablations.
Fashion-MNIST's four files are read from data/fashion-mnist.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
PUBLISHED = ("manifest.json", "results.jsonl", "report.md", "curves.png", "slices.png")
OUT_OF_TIME = 75


@dataclass(frozen=True)
class Table:
    """A results folder: a shipped ablation and what is changed in it."""

    name: str
    ablation: str
    overrides: tuple[str, ...] = ()
    workers: int | None = None  # at most so many side by side, where more don't fit the card


TABLES = (
    # zoology: 64 epochs of 180,000 examples over four learning rates. Here 6 epochs at one rate.
    Table("mqar", "mqar", ("training.steps=4000", "training.batch_size=256", "learning_rates=[2.0e-3]"), 4),
    # MAD: 200 epochs, 20,000 steps, over three learning rates.
    Table("mad", "mad", ("training.steps=3000", "learning_rates=[1.0e-3]")),
    Table("mad_compression", "mad_compression", ("training.steps=3000", "learning_rates=[1.0e-3]")),
    Table("chela_design", "chela_design"),
    Table("fashion_images", "fashion_images"),
    Table("bytes_25m", "bytes_25m"),
    Table(
        "fashion_pixels",
        "pixels",
        (
            "tasks=[fashion_pixels]",
            "backbone.dim=128",
            "backbone.depth=4",
            "backbone.mlp_hidden=341",
            "training.steps=4300",
            "training.batch_size=128",
            "training.warmup_steps=200",
            "training.evaluate_every=430",
            "training.precision=bf16-mixed",
            "learning_rates=[2.0e-3]",
            "seeds=[0,1,2]",
        ),
    ),
    # S4: 120,000 and 500,000 steps over several learning rates; for chela and two peers.
    Table(
        "lra_listops",
        "lra_listops",
        (
            "mixers=[chela,attention,bidirectional(gated_deltanet)]",
            "training.steps=30000",
            "training.warmup_steps=3000",
            "learning_rates=[2.0e-3]",
        ),
    ),
    Table(
        "lra_pathfinder32",
        "lra_pathfinder32",
        (
            "mixers=[chela,attention,bidirectional(gated_deltanet)]",
            "training.steps=100000",
            "training.warmup_steps=5000",
            "learning_rates=[1.0e-3]",
        ),
    ),
)


def restore(published: Path, work: Path) -> None:
    """Take over what an earlier slice on another machine published, but for runs whose weights stayed there unread."""
    if work.exists() or not (published / "results.jsonl").exists():
        return
    work.mkdir(parents=True)
    lines = (published / "results.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    tested = {(r["ablation"], r["task"], r["mixer"]) for r in records if r["record"] == "test"}
    read = {r["cell"] for r in records if r["record"] == "test"}
    rates: dict[tuple[str, str], set[float]] = {}
    for r in records:
        rates.setdefault((r["ablation"], r["task"]), set()).add(r["learning_rate"])

    def known(r: dict) -> bool:
        chosen = len(rates[r["ablation"], r["task"]]) > 1 and (r["ablation"], r["task"], r["mixer"]) in tested
        return r["record"] == "test" or r["cell"] in read or chosen or r["status"] != "finished"

    kept = [line for line, r in zip(lines, records, strict=True) if known(r)]
    (work / "results.jsonl").write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    shutil.copy(published / "manifest.json", work)


def publish(work: Path, published: Path) -> None:
    """Write the report and copy what is to be committed."""
    from chela_plugin.harness.report import write_report

    write_report(work)
    published.mkdir(parents=True, exist_ok=True)
    for name in PUBLISHED:
        if (work / name).exists():  # no slices where no task has parts
            shutil.copy(work / name, published)


def prune(work: Path) -> None:
    """Remove the weights of runs whose test split has been read: nothing asks for them again."""
    for line in (work / "results.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["record"] == "test":
            shutil.rmtree(work / "cells" / record["cell"], ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [table.name for table in TABLES]
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of this slice")
    parser.add_argument("--workers", type=int, default=8, help="runs side by side on the GPU")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="TABLE", help=", ".join(names))
    parser.add_argument("--work", type=Path, default=Path("runs/training"))
    parser.add_argument("--results", type=Path, default=HERE / "results")
    given = parser.parse_args(arguments)
    deadline = time.monotonic() + given.seconds
    # Read by the workers' Python at its start.
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(HERE / "first_configuration"), *filter(None, [os.environ.get("PYTHONPATH")])]
    )

    from rich.console import Console

    from chela_plugin.harness.ablation import run_ablations
    from chela_plugin.harness.config import ConfigError, load_ablation
    from chela_plugin.harness.results import ResultsError

    console, left = Console(highlight=False), []
    for table in [table for table in TABLES if table.name in given.only]:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            left.append(table.name)
            continue
        work, published = given.work / table.name, given.results / f"{table.name}_h100"
        restore(published, work)
        name, ablation = load_ablation(table.ablation, table.overrides)
        try:
            workers = min(given.workers, table.workers or given.workers)
            stopped = run_ablations({name: ablation}, work, console, workers, max_seconds=remaining)
        except (ConfigError, ResultsError) as error:  # data that is not here, results of other terms: the others go on
            console.print(f"{table.name}: {error}", markup=False)
            left.append(table.name)
            continue
        if (work / "results.jsonl").exists():
            publish(work, published)
            prune(work)
        if stopped is not None:
            left.append(table.name)
            if stopped != OUT_OF_TIME:
                return stopped
    console.print(f"left: {', '.join(left)}" if left else "all tables are finished", markup=False)
    return OUT_OF_TIME if left else 0


if __name__ == "__main__":
    sys.exit(main())
