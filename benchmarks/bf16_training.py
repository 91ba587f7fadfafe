"""Whether training under bf16 autocast follows training in fp32: the same runs in both, over several seeds.

    python benchmarks/bf16_training.py [--steps N] [--seeds N] [--dim D] [--depth N] [--out FILE] [--work FOLDER]

A byte-level language model of Python's standard library whose every block is `chela`, through `chela ablate`: 2,000
steps, the same batches and initial weights in both precisions. It follows where, at every reading of the curves in the
second half of the run, the mean over seeds under bf16 lies no further from fp32's mean than fp32's own seeds spread
(largest less smallest). The folder keeps its runs: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from chela_plugin.harness.results import read_records

PRECISIONS = ("32-true", "bf16-mixed")
CURVES = ("train_loss", "validation_loss")


def start(precision: str, folder: Path, options: argparse.Namespace) -> subprocess.Popen:
    overrides = [
        f"mixers=[{options.mixer}]",
        f"baseline={options.mixer}",
        f"seeds={list(range(options.seeds))}",
        f"backbone.dim={options.dim}",
        f"backbone.depth={options.depth}",
        f"backbone.mlp_hidden={2 * options.dim}",
        f"training.steps={options.steps}",
        f"training.evaluate_every={max(1, options.steps // 20)}",
        f"training.precision={precision}",
    ]
    command = [sys.executable, "-m", "chela_plugin.cli", "ablate", "bytes", *overrides, "--out", str(folder)]
    return subprocess.Popen([*command, "--workers", str(options.workers)])


def compared(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Of each curve: the readings of all seeds, and over its second half how far the means lie apart."""
    found: dict[str, Any] = {}
    for curve in CURVES:
        readings = {p: [run["history"][curve] for run in of] for p, of in runs.items()}
        exact, half = (list(zip(*readings[p], strict=True)) for p in PRECISIONS)  # by reading, then by seed
        second = range(len(exact) // 2, len(exact))
        distance = [abs(mean(half[i]) - mean(exact[i])) for i in second]
        spread = [max(exact[i]) - min(exact[i]) for i in second]
        found[curve] = {
            **{p: [[round(x, 5) for x in seed] for seed in readings[p]] for p in PRECISIONS},
            "distance_of_means": [round(x, 5) for x in distance],
            "spread_of_fp32_seeds": [round(x, 5) for x in spread],
            "follows": all(d <= s for d, s in zip(distance, spread, strict=True)),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--mixer", default="chela")
    parser.add_argument("--workers", type=int, default=4, help="runs of one precision side by side")
    parser.add_argument("--work", type=Path, help="the runs' folder; default one that is removed")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "bf16_training_h100.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as removed:
        work = options.work or Path(removed)
        started = [start(precision, work / precision, options) for precision in PRECISIONS]
        codes = [process.wait() for process in started]
        if any(codes):
            sys.exit("a run failed; its reason is above")
        runs = {}
        for precision in PRECISIONS:
            records, _ = read_records(work / precision / "results.jsonl")
            runs[precision] = sorted((r for r in records if r["record"] == "run"), key=lambda r: r["seed"])
    first = runs["bf16-mixed"][0]
    record = {key: first[key] for key in ("device", "versions", "revision", "parameters", "tokens", "path")}
    record |= {"steps": options.steps, "seeds": options.seeds, "dim": options.dim, "depth": options.depth}
    record |= {"mixer": options.mixer, "read_at": first["history"]["step"], "curves": compared(runs)}
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    for curve, found in record["curves"].items():
        far, spread = max(found["distance_of_means"]), min(found["spread_of_fp32_seeds"])
        verdict = "follows" if found["follows"] else "DOES NOT FOLLOW"
        print(f"{curve}: largest distance of the means {far}, smallest spread of fp32's seeds {spread}: {verdict}")


if __name__ == "__main__":
    main()
