"""`report.md`, `curves.png` and `report.html` out of a results folder's JSON lines."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chela_plugin.harness.extras import need
from chela_plugin.harness.results import Record, open_for_reading, write_atomically
from chela_plugin.harness.table import METRICS, Table, collect, tables, unedited


@dataclass(frozen=True)
class Report:
    """Where the three files are, and the tables in them."""

    markdown: Path
    curves: Path
    page: Path
    tables: list[Table]


def write_report(folder: Path) -> Report:
    """Write the report of a results folder into it. Raises ResultsError, or MissingPackage with the pip line."""
    need("matplotlib", "harness")
    manifest, records = open_for_reading(folder)
    found = tables(manifest, records)
    report = Report(folder / "report.md", folder / "curves.png", folder / "report.html", found)
    with unedited():
        picture = curves(manifest, records)
        page = _page(manifest, records, found, picture)
    write_atomically(report.curves, picture)
    write_atomically(report.markdown, _markdown(found, report.curves.name).encode())
    write_atomically(report.page, page.encode())
    return report


def _markdown(found: Sequence[Table], picture: str) -> str:
    parts = ["# Comparison of token mixers"]
    for table in found:
        parts += [f"## {table.key}", table.conditions, table.markdown()]
        if table.notes:
            parts.append("Runs without a result:\n\n" + "\n".join(f"- {note}" for note in table.notes))
    parts += [LEGEND, f"![Curves]({picture})"]
    return "\n\n".join(parts) + "\n"


LEGEND = (
    "Results are mean ± sample standard deviation (seeds); differences are paired by seed, with their 95 % interval "
    "(Student's t). Decoding state: numbers kept for one sequence, all blocks together, T for each token seen. "
    "Path: the implementation that ran, as each mixer names it."
)


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
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
div.wide { overflow-x: auto; } img { max-width: 100%; } pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; }
"""


def _page(manifest: dict[str, Any], records: Sequence[Record], found: Sequence[Table], picture: bytes) -> str:
    """One file that needs no network: styles and picture are inside."""
    e = html.escape
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Comparison of token mixers</title>',
        f"<style>{STYLE}</style></head><body><h1>Comparison of token mixers</h1>",
    ]
    for table in found:
        parts.append(f"<h2>{e(table.key)}</h2><p>{e(table.conditions)}</p><div class=wide><table><thead>")
        parts.append("<tr>" + "".join(f"<th>{e(cell)}</th>" for cell in table.header) + "</tr></thead><tbody>")
        for row in table.rows:
            parts.append("<tr>" + "".join(f"<td>{e(cell)}</td>" for cell in row) + "</tr>")
        parts.append("</tbody></table></div>")
        if table.notes:
            parts.append("<p>Runs without a result:</p><ul>")
            parts.append("".join(f"<li>{e(note)}</li>" for note in table.notes) + "</ul>")
    parts.append(f"<p>{e(LEGEND)}</p>")
    parts.append(f'<img alt="Curves" src="data:image/png;base64,{base64.b64encode(picture).decode()}">')
    origins = {json.dumps([r["versions"], r["revision"], r["device"]]): r for r in records if r["record"] == "run"}
    origin = [{key: r[key] for key in ("device", "revision", "versions")} for r in origins.values()]
    for title, value in (("Config", manifest["ablations"]), ("Versions, code revision and device", origin)):
        parts.append(f"<details><summary>{title}</summary><pre>{e(json.dumps(value, indent=1))}</pre></details>")
    return "\n".join(parts) + "</body></html>\n"
