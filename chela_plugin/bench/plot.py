"""Curves of a benchmark's record: time and memory against length, log-log, one line a contender."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chela_plugin.bench import record as files
from chela_plugin.harness.config import ConfigError
from chela_plugin.harness.extras import need

# The axis that a record's lengths stand on, by what its rows have.
LENGTHS = {"pixels": "pixels a side", "T": "tokens T", "prompt": "tokens of the prompt"}


def draw(path: Path, out: Path | None = None) -> Path:
    """Write a PNG beside `path` (or at `out`) and return where. Raises ConfigError where there is nothing to draw."""
    record = files.read(path)
    panels = panels_of(record["results"])
    if not panels:
        raise ConfigError(f"{path} holds no results to draw")
    need("matplotlib", "harness")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["name"] for row in record["results"]))
    styles = {name: {"color": f"C{i % 10}", "marker": "osv^D"[i // 10 % 5]} for i, name in enumerate(names)}
    # A CPU's record has no peak memory.
    quantities = [("ms", "ms, median"), ("peak_mib", "peak MiB above inputs and weights")]
    quantities = [(key, label) for key, label in quantities if any(row.get(key) for row in record["results"])]
    size = (4.6 * len(panels), 4.2 * len(quantities))
    figure, axes = plt.subplots(
        len(quantities), len(panels), figsize=size, squeeze=False, sharex="col", layout="constrained"
    )
    for column, (title, axis, rows) in enumerate(panels):
        for place, (key, label) in zip(axes[:, column], quantities, strict=True):
            for name in names:
                points = sorted((row[axis], median(row[key])) for row in rows if row["name"] == name and row.get(key))
                if points:
                    place.plot(*zip(*points, strict=True), label=name, markersize=4, linewidth=1.2, **styles[name])
            floors = sorted({(row[axis], row["floor_ms"]) for row in rows if row.get("floor_ms")})
            if key == "ms" and floors:
                place.plot(*zip(*floors, strict=True), "k--", linewidth=0.8, label="floor")
            place.set_xscale("log", base=2)
            place.set_yscale("log")
            place.grid(True, which="major", alpha=0.3)
            place.set_ylabel(label)
        axes[0][column].set_title(title, fontsize=10)
        axes[-1][column].set_xlabel(LENGTHS[axis])
    handles, labels = [], []
    for place in axes[0]:
        for handle, label in zip(*place.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(f"{record['suite']}, {record['device']}, torch {record['versions'].get('torch', '?')}", fontsize=10)
    target = out or path.with_suffix(".png")
    figure.savefig(target, dpi=110, metadata={"Software": ""})
    plt.close(figure)
    return target


def median(value: Any) -> float:
    """Of a row's `ms` (median first) or its one number."""
    return float(value[0] if isinstance(value, list) else value)


def panels_of(rows: list[dict[str, Any]]) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """`(title, length axis, rows)`: one panel for each thing timed at each set of the other sizes."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        axis = next((axis for axis in LENGTHS if axis in row), None)
        if axis is not None:
            others = " ".join(f"{key}={row[key]}" for key in ("op", "H", "K", "V", "D", "depth") if key in row)
            if axis == "prompt":
                others += f" B={row['B']}"
            found.setdefault((row["what"].replace("_", " + "), axis, others), []).append(row)
    return [(f"{what}, {others}".rstrip(", "), axis, rows) for (what, axis, others), rows in found.items()]
