"""`report.md`, `curves.png` (and other pictures) and `report.html` out of a results folder's JSON lines."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chela_plugin.harness.extras import need
from chela_plugin.harness.figures import pictures
from chela_plugin.harness.results import Record, open_for_reading, write_atomically
from chela_plugin.harness.table import Table, tables, unedited
from chela_plugin.harness.terms import violations


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
        drawn = pictures(manifest, records)
        terms = _terms(manifest, records)
        page = _page(manifest, records, found, drawn, terms)
    for name, picture in drawn.items():
        write_atomically(folder / name, picture)
    write_atomically(report.markdown, _markdown(found, list(drawn), terms).encode())
    write_atomically(report.page, page.encode())
    return report


def _terms(manifest: dict[str, Any], records: Sequence[Record]) -> list[str]:
    """Whether the runs had equal terms: a sentence, and one for each that had others."""
    count, wrong = violations(manifest, records)
    said = (
        f"Equal terms: {count} finished runs were compared by parameters, data, order of examples, steps, schedule, "
        f"device, versions, learning rate and readings of the test split; violations: {len(wrong)}."
    )
    return [said, *wrong]


def _markdown(found: Sequence[Table], drawn: Sequence[str], terms: Sequence[str]) -> str:
    parts = ["# Comparison of token mixers"]
    for table in found:
        parts += [f"## {table.key}", table.conditions, table.markdown()]
        if table.notes:
            parts.append("Runs without a result:\n\n" + "\n".join(f"- {note}" for note in table.notes))
    parts += [LEGEND, "\n".join([terms[0], *(f"- {sentence}" for sentence in terms[1:])])]
    parts += [f"![{name.removesuffix('.png').capitalize()}]({name})" for name in drawn]
    return "\n\n".join(parts) + "\n"


LEGEND = (
    "Results are mean ± sample standard deviation (seeds); differences are paired by seed, with their 95 % interval "
    "(Student's t). Decoding state: numbers kept for one sequence, all blocks together, T for each token seen. "
    "Path: the implementation that ran, as each mixer names it."
)


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
div.wide { overflow-x: auto; } img { max-width: 100%; } pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; }
"""


def _page(
    manifest: dict[str, Any],
    records: Sequence[Record],
    found: Sequence[Table],
    drawn: dict[str, bytes],
    terms: Sequence[str],
) -> str:
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
    parts.append(f"<p>{'<br>'.join(e(sentence) for sentence in terms)}</p>")
    for name, picture in drawn.items():
        alt = e(name.removesuffix(".png").capitalize())
        parts.append(f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(picture).decode()}">')
    origins = {json.dumps([r["versions"], r["revision"], r["device"]]): r for r in records if r["record"] == "run"}
    origin = [{key: r[key] for key in ("device", "revision", "versions")} for r in origins.values()]
    for title, value in (("Config", manifest["ablations"]), ("Versions, code revision and device", origin)):
        parts.append(f"<details><summary>{title}</summary><pre>{e(json.dumps(value, indent=1))}</pre></details>")
    return "\n".join(parts) + "</body></html>\n"
