"""The report's pictures: validation against steps and time, test against size, by slice; speed and memory against T."""

from __future__ import annotations

import io
import json
import re
import statistics
from collections.abc import Sequence
from typing import Any

from chela_plugin.harness.grid import latest_runs
from chela_plugin.harness.results import Record
from chela_plugin.harness.table import METRICS, collect


def pictures(manifest: dict[str, Any], records: Sequence[Record]) -> dict[str, bytes]:
    """PNG files by name: curves.png always, slices.png and scaling.png where the records hold them."""
    found = {"curves.png": curves(manifest, records)}
    for name, draw in (("slices.png", slices), ("scaling.png", scaling)):
        picture = draw(manifest, records)
        if picture is not None:
            found[name] = picture
    return found


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def curves(manifest: dict[str, Any], records: Sequence[Record]) -> bytes:
    """A PNG: for each task, validation against steps and against seconds, and test against parameters.

    Lines are means over seeds at the chosen learning rate, bands reach from the worst seed to the best.
    """
    from matplotlib.figure import Figure

    panels = [(a, t["task"], c) for a, c in manifest["ablations"].items() for t in c["tasks"]]
    mixers = list(dict.fromkeys(mixer for _, _, config in panels for mixer in config["mixers"]))
    figure = Figure(figsize=(13, 3.6 * len(panels) + 0.4), layout="constrained")
    axes = figure.subplots(len(panels), 3, squeeze=False)
    for (ablation, task, config), (by_step, by_second, by_size) in zip(panels, axes, strict=True):
        rows = [row for row in collect(records, ablation, task, config["mixers"]) if row.tests]
        metric = next((t["metric"] for row in rows for t in row.tests.values()), "")
        name, scale, _ = METRICS.get(metric, ("result", 1.0, 3))
        for row in rows:
            look = {"color": f"C{mixers.index(row.mixer) % 10}", "label": row.mixer}
            histories = [run["history"] for run in row.runs.values()]
            values = [[v * scale for v in h["validation"]] for h in histories]
            mean = [sum(column) / len(column) for column in zip(*values, strict=True)]
            seconds = [sum(column) / len(column) for column in zip(*(h["seconds"] for h in histories), strict=True)]
            low, high = [min(c) for c in zip(*values, strict=True)], [max(c) for c in zip(*values, strict=True)]
            for axis, places in ((by_step, histories[0]["step"]), (by_second, seconds)):
                axis.plot(places, mean, marker=".", **look)
                axis.fill_between(places, low, high, alpha=0.15, color=look["color"], linewidth=0)
            tests = [test["test"] * scale for test in row.tests.values()]
            sizes = [run["parameters"] / 1e3 for run in row.runs.values()]
            by_size.plot(sizes, tests, linestyle="none", marker="o", **look)
        if rows:  # as wide as the tolerance: a smaller range would make nothing look like much
            target = next(run["parameters"] / run["parameter_ratio"] for run in rows[0].runs.values()) / 1e3
            by_size.set_xlim(target * (1 - config["parameter_tolerance"]), target * (1 + config["parameter_tolerance"]))
        by_step.set(xlabel="steps", ylabel=f"validation {name}", title=f"{ablation}/{task}")
        by_second.set(xlabel="seconds of training", ylabel=f"validation {name}")
        by_size.set(xlabel="parameters, thousands", ylabel=f"test {name}")
        for axis in (by_step, by_second, by_size):
            axis.grid(alpha=0.3)
        if rows:
            by_step.legend(fontsize="small")
    return _png(figure)


def slices(manifest: dict[str, Any], records: Sequence[Record]) -> bytes | None:
    """A PNG: accuracy on each named part of the test split; None if no test has any."""
    from matplotlib.figure import Figure

    panels = []
    for ablation, config in manifest["ablations"].items():
        for task in config["tasks"]:
            rows = [r for r in collect(records, ablation, task["task"], config["mixers"]) if r.tests]
            parts = list(dict.fromkeys(name for r in rows for t in r.tests.values() for name in t.get("slices", {})))
            if parts:
                panels.append((f"{ablation}/{task['task']}", config["mixers"], rows, parts))
    if not panels:
        return None
    figure = Figure(figsize=(13, 3.8 * len(panels) + 0.4), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False)
    for (title, mixers, rows, parts), axis in zip(panels, axes[:, 0], strict=True):
        for row in rows:
            columns = [[t["slices"][p] * 100 for t in row.tests.values() if p in t["slices"]] for p in parts]
            places = [i for i, column in enumerate(columns) if column]
            columns = [column for column in columns if column]
            color = f"C{mixers.index(row.mixer) % 10}"
            axis.plot(places, [statistics.fmean(c) for c in columns], marker="o", color=color, label=row.mixer)
            axis.fill_between(
                places, [min(c) for c in columns], [max(c) for c in columns], alpha=0.15, color=color, linewidth=0
            )
        many = len(parts) > 6
        axis.set_xticks(range(len(parts)), parts, rotation=30 if many else 0, ha="right" if many else "center")
        axis.set(ylabel="test accuracy, %", title=f"{title}, by part of the test split")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    return _png(figure)


def scaling(manifest: dict[str, Any], records: Sequence[Record]) -> bytes | None:
    """A PNG: tokens a second and peak memory against the sequence length T, log-log; None without several T.

    One panel for each task and backbone that was run at more than one T, on one device, also where each T is an
    ablation of its own; names that differ in numbers only ('bytes_256', 'bytes_1024') count as one task.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    groups: dict[str, dict[str, dict[int, list[Record]]]] = {}
    for run in latest_runs(records):
        if run["status"] == "finished" and run.get("sequence_length"):
            backbone = manifest["ablations"][run["ablation"]]["backbone"]
            task = re.sub(r"[_-]?\d+", "", run["task"])
            key = f"{task}, dim {backbone['dim']}, depth {backbone['depth']}, {run['device']}"
            key += json.dumps([backbone, manifest["ablations"][run["ablation"]]["training"]["precision"]])
            lengths = groups.setdefault(key, {}).setdefault(run["mixer"], {})
            lengths.setdefault(run["sequence_length"], []).append(run)
    groups = {key: g for key, g in groups.items() if len({t for lengths in g.values() for t in lengths}) > 1}
    if not groups:
        return None
    figure = Figure(figsize=(13, 3.8 * len(groups) + 0.4), layout="constrained")
    axes = figure.subplots(len(groups), 2, squeeze=False)
    for (key, mixers), (speed, memory) in zip(groups.items(), axes, strict=True):
        for axis, field, scale in ((speed, "tokens_per_second", 1.0), (memory, "peak_bytes", 2**-20)):
            for i, (mixer, lengths) in enumerate(mixers.items()):
                points = {t: [r[field] * scale for r in runs if r[field]] for t, runs in sorted(lengths.items())}
                points = {t: values for t, values in points.items() if values}
                means = [statistics.fmean(v) for v in points.values()]
                axis.plot(list(points), means, marker="o", color=f"C{i % 10}", label=mixer)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.xaxis.set_major_formatter(ScalarFormatter())
            axis.grid(alpha=0.3, which="both")
        speed.set(xlabel="T, tokens a sequence", ylabel="tokens/s, training", title=key.partition("[")[0])
        memory.set(xlabel="T, tokens a sequence", ylabel="peak MiB, training")
        speed.legend(fontsize="small")
        if not memory.lines or not any(len(line.get_xdata()) for line in memory.lines):
            memory.set_axis_off()
            memory.text(0.5, 0.5, "no peak memory: a CPU's runs record none", ha="center", transform=memory.transAxes)
    return _png(figure)
