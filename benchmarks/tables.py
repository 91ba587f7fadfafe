"""README's speed tables, from the JSON under `results/`: `python benchmarks/tables.py`. A test compares the two."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def linear_attention() -> str:
    """Forward / forward + backward ms and peak MiB of both, H = 16, K = V = 128, 32,768 tokens."""
    with_fla = load("linear_attention_fla_h100")["results"]  # the last run that had fla beside it
    rows = load("linear_attention_h100")["results"] + [row for row in with_fla if row["who"] == "fla"]
    found = {
        (row["who"], row["variant"], row["T"], row["what"]): row
        for row in rows
        if (row["H"], row["K"], row["V"]) == (16, 128, 128)
    }
    named = {
        "ours, no decay": ("ours", "none"),
        "ours, static decay": ("ours", "static"),
        "ours, decay per token": ("ours", "token"),
        "ours, bidirectional": ("ours", "bidirectional"),
        "fla chunk_simple_gla, no decay (an earlier run)": ("fla", "none"),
        "torch SDPA, flash, causal": ("flash", "causal"),
    }
    times = sorted({row["T"] for row in rows})
    floor = {what: found["ours", "none", times[0], what]["floor_ms"] for what in ("forward", "both")}
    table = []
    for name, (who, variant) in named.items():
        cells = [
            "{:.3f} / {:.3f}".format(*(found[who, variant, T, what]["ms"][0] for what in ("forward", "both")))
            for T in times
        ]
        table.append([name, *cells, f"{found[who, variant, times[1], 'both']['MiB']:,.0f}"])
    table.append(["floor, no decay", *[f"{floor['forward']:.3f} / {floor['both']:.3f}"] * len(times), ""])
    return markdown(["ms forward / forward + backward", *(f"T = {T:,}" for T in times), "peak MiB at 2,048"], table)


def long_conv() -> str:
    """Forward / forward + backward ms, D = 1,024, 32,768 tokens, a filter as long as the sequence: two records of one
    revision and device, what makes its taps itself and what is given them."""
    rows = [
        row
        for name in ("long_conv_modal_h100", "long_conv_h100")
        for row in load(name)["results"]
        if row["D"] == 1024 and row["B"] * row["T"] == 32768
    ]
    times = sorted({row["T"] for row in rows})
    found = {(row["name"], row["T"]): row for row in rows}

    def cell(name: str, T: int) -> str:
        row = found.get((name, T))
        return f"{row['forward_ms'][0]:.2f} / {row['forward_backward_ms'][0]:.2f}" if row else "-"

    table = [
        [name.replace("long_conv", "ours,").replace("rfft", "rfft,"), *(cell(name, T) for T in times)]
        for name in dict.fromkeys(row["name"] for row in rows)
    ]
    return markdown(["ms forward / forward + backward", *(f"T = {T:,}" for T in times)], table)


def lengths(name: str, axis: str, what: str, cell: Callable[[dict], str]) -> str:
    """One row a contender, one column a length, of what `chela bench` wrote; '-' where one was skipped."""
    rows = [row for row in load(name)["results"] if row["what"] == what and axis in row]
    found = {(row["name"], row[axis]): row for row in rows}
    columns = sorted({row[axis] for row in rows})
    table = [
        [who, *(cell(found[who, at]) if (who, at) in found else "-" for at in columns)]
        for who in dict.fromkeys(row["name"] for row in rows)
    ]
    return markdown([what.replace("_", " + "), *(f"{axis} = {at:,}" for at in columns)], table)


def layers() -> str:
    """ms of forward + backward, 32,768 tokens, D = 1,024."""
    return lengths("layers_h100", "T", "forward_backward", lambda row: f"{row['ms'][0]:.2f}")


def eager_and_graph(found: dict, name: str, at: int, what: str, unit: str) -> str:
    """Units a second of `what`, launched one by one / as a CUDA graph; '-' where there is none."""
    both = [found.get((name, at, kind)) for kind in (what, f"{what}_graph")]
    return " / ".join(f"{row[f'{unit}_per_second']:,.0f}" if row else "-" for row in both)


def language_models() -> str:
    """Training tokens a second and peak GiB of the eager step, weights and optimizer included. Lengths beyond the first
    from an earlier record."""
    rows = [row for row in load("lm_h100")["results"] if row["what"].startswith("train_step")]
    rows += [row for row in load("lm_long_h100")["results"] if row["T"] not in {row["T"] for row in rows}]
    found = {(row["name"], row["T"], row["what"]): row for row in rows}
    columns = sorted({row["T"] for row in rows})

    def cell(name: str, T: int) -> str:
        speeds = eager_and_graph(found, name, T, "train_step", "tokens")
        row = found.get((name, T, "train_step"))
        peak = f", {(row['peak_mib'] + row['resident_mib']) / 1024:.1f}" if row else ""
        return "-" if speeds == "- / -" else speeds + peak

    table = [[name, *(cell(name, T) for T in columns)] for name in dict.fromkeys(row["name"] for row in rows)]
    return markdown(["eager / graph, peak", *(f"T = {T:,}" for T in columns)], table)


def decoding() -> str:
    """Tokens a second: launched step by step / as a CUDA graph of a step."""
    rows = load("decoding_h100")["results"]
    speed = {(row["model"], row["B"], row["prompt"], row["how"]): row["tokens_per_s"] for row in rows}
    columns = sorted({(row["B"], row["prompt"]) for row in rows if row["prompt"] >= 2048})
    table = []
    for model in dict.fromkeys(row["model"] for row in rows):
        cells = []
        for B, prompt in columns:
            # GLA's state has one size whatever was read; its prompt had 64 tokens.
            at = 64 if (model, B, 64, "graph") in speed and prompt == 2048 else prompt
            found = [speed.get((model, B, at, how)) for how in ("eager", "graph")]
            cells.append(" / ".join("-" if x is None else f"{x:,.0f}" for x in found) if any(found) else "-")
        table.append([model, *cells])
    return markdown(["eager / graph", *(f"batch {B}, after {prompt:,}" for B, prompt in columns)], table)


def vision() -> str:
    """Images a second, launched one by one / as a CUDA graph; for training the first's peak GiB, too."""
    rows = load("vision_h100")["results"]
    found = {(row["name"], row["pixels"], row["what"]): row for row in rows}
    columns = sorted({row["pixels"] for row in rows})

    def cell(name: str, pixels: int, what: str) -> str:
        speeds, row = eager_and_graph(found, name, pixels, what, "images"), found.get((name, pixels, what))
        return speeds + (f", {row['peak_mib'] / 1024:.1f}" if row and what == "training" else "")

    tables = []
    for what, header in (("inference", "inference, eager / graph"), ("training", "training, eager / graph, peak")):
        table = [
            [name, *(cell(name, at, what) for at in columns)] for name in dict.fromkeys(row["name"] for row in rows)
        ]
        tables.append(markdown([header, *(f"{at:,} px" for at in columns)], table))
    return "\n\n".join(tables)


if __name__ == "__main__":
    print(linear_attention(), long_conv(), layers(), language_models(), decoding(), vision(), sep="\n\n")
