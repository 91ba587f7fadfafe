"""From JSON records to the rows of a published table, and back: checking a published table digit by digit."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from chela_plugin.harness.results import Record, ResultsError

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom; beyond, the normal one is within 2 %.
T_95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)

METRICS = {"accuracy": ("accuracy, %", 100.0, 2), "bits_per_byte": ("bits/byte", 1.0, 3)}


@dataclass(frozen=True)
class Table:
    """One task of one ablation."""

    key: str  # 'ablation/task', also the marker by which a published copy is found
    conditions: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str]

    def markdown(self) -> str:
        """The table under its marker, as `check` expects to find it."""
        lines = [marker(self.key), _line(self.header), _line(["---"] + ["---:"] * (len(self.header) - 1))]
        return "\n".join(lines + [_line(row) for row in self.rows])


def marker(key: str) -> str:
    """The comment above a table that a report wrote; it ties a published copy to its records."""
    return f"<!-- chela report: {key} -->"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


@dataclass(frozen=True)
class Row:
    """What is known of one mixer: its runs at the chosen learning rate and their test readings, by seed."""

    mixer: str
    runs: dict[int, Record]
    tests: dict[int, Record]


def collect(records: Sequence[Record], ablation: str, task: str, mixers: Sequence[str]) -> list[Row]:
    """One Row a mixer, in the ablation's order."""
    runs = {r["cell"]: r for r in records if r["record"] == "run"}
    rows = []
    for mixer in mixers:
        key = (ablation, task, mixer)
        tests = {
            r["seed"]: r for r in records if r["record"] == "test" and (r["ablation"], r["task"], r["mixer"]) == key
        }
        rows.append(Row(mixer, {seed: runs[test["cell"]] for seed, test in tests.items()}, tests))
    return rows


def tables(manifest: dict[str, Any], records: Sequence[Record]) -> list[Table]:
    """Every table that a results folder gives, from its records alone. Raises ResultsError for edited ones."""
    found = []
    with unedited():
        for ablation, config in manifest["ablations"].items():
            for task in config["tasks"]:
                found.append(_table(records, ablation, task["task"], config))
                found += _by_slice(records, ablation, task["task"], config)
    return found


@contextmanager
def unedited() -> Iterator[None]:
    """What reads records written by hand may meet anything; the user meets one ResultsError."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, StopIteration, TypeError, ValueError) as error:
        if isinstance(error, ResultsError):
            raise
        raise ResultsError(
            "the records do not fit their manifest: files of this folder were edited by hand or by another program "
            f"({type(error).__name__}: {str(error)[:200]}); restore them"
        ) from error


def _table(records: Sequence[Record], ablation: str, task: str, config: dict[str, Any]) -> Table:
    rows = collect(records, ablation, task, config["mixers"])
    metric = next((t["metric"] for row in rows for t in row.tests.values()), None)
    name, scale, digits = METRICS.get(metric or "", ("result", 1.0, 3))
    baseline = next(row for row in rows if row.mixer == config["baseline"])
    header = [
        "mixer",
        f"test {name}",
        f"minus {config['baseline']}",
        f"validation {name}",
        "learning rate",
        "parameters",
        "of baseline's",
        "decoding state",
        "tokens/s",
        "peak MiB",
        "path",
    ]
    body = []
    for row in rows:
        if not row.tests:
            body.append([row.mixer] + ["-"] * (len(header) - 1))
            continue
        run = next(iter(row.runs.values()))
        speeds = [r["tokens_per_second"] for r in row.runs.values() if r["tokens_per_second"]]
        peaks = [r["peak_bytes"] for r in row.runs.values() if r["peak_bytes"]]
        body.append(
            [
                row.mixer,
                mean_and_spread([t["test"] * scale for t in row.tests.values()], digits),
                paired_difference(row, baseline, scale, digits),
                mean_and_spread([r["validation"] * scale for r in row.runs.values()], digits),
                f"{run['learning_rate']:g}",
                f"{run['parameters']:,}",
                f"{run['parameter_ratio']:.4f}",
                _state(run["state"]),
                f"{statistics.fmean(speeds):,.0f}" if speeds else "-",
                f"{max(peaks) / 2**20:,.0f}" if peaks else "-",
                run["path"],
            ]
        )
    return Table(
        f"{ablation}/{task}", _conditions(config, records, ablation), header, body, _notes(records, ablation, task)
    )


def _by_slice(records: Sequence[Record], ablation: str, task: str, config: dict[str, Any]) -> list[Table]:
    """The accuracy of each part of the test split that has a name; no table where none has."""
    rows = [row for row in collect(records, ablation, task, config["mixers"]) if row.tests]
    names = list(dict.fromkeys(name for row in rows for test in row.tests.values() for name in test.get("slices", {})))
    if not names:
        return []
    body = []
    for row in rows:
        values = [[t["slices"][name] * 100 for t in row.tests.values() if name in t["slices"]] for name in names]
        body.append([row.mixer, *(mean_and_spread(v, 2) if v else "-" for v in values)])
    said = "Accuracy, %, of each part of the test split, at the learning rate that the whole validation split chose."
    return [Table(f"{ablation}/{task} by slice", said, ["mixer", *names], body, [])]


def mean_and_spread(values: Sequence[float], digits: int) -> str:
    """'97.22 ± 0.39 (3)': mean, sample standard deviation, number of seeds; one seed has no spread."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f} ({len(values)})" if len(values) > 1 else f"{mean} (1)"


def paired_difference(row: Row, baseline: Row, scale: float, digits: int) -> str:
    """Mean over the seeds that both have, and its 95 % interval by Student's t: '+0.28 [-0.10, +0.66]'."""
    if row.mixer == baseline.mixer:
        return "0"
    seeds = sorted(row.tests.keys() & baseline.tests.keys())
    if not seeds:
        return "-"
    differences = [(row.tests[s]["test"] - baseline.tests[s]["test"]) * scale for s in seeds]
    mean = statistics.fmean(differences)
    if len(seeds) == 1:
        return f"{mean:+.{digits}f}"
    quantile = T_95[len(seeds) - 2] if len(seeds) - 2 < len(T_95) else 1.96
    half = quantile * statistics.stdev(differences) / math.sqrt(len(seeds))
    return f"{mean:+.{digits}f} [{mean - half:+.{digits}f}, {mean + half:+.{digits}f}]"


def _state(state: dict[str, Any] | None) -> str:
    if state is None:
        return "-"
    parts = [f"{state['fixed']:,}"] if state["fixed"] else []
    parts += [f"{state['per_token']:,g} T"] if state["per_token"] else []
    return " + ".join(parts) or "0"


def _conditions(config: dict[str, Any], records: Sequence[Record], ablation: str) -> str:
    training = config["training"]
    devices = sorted({r["device"] for r in records if r["record"] == "run" and r["ablation"] == ablation} - {"none"})
    grid = ", ".join(f"{rate:g}" for rate in config["learning_rates"])
    return (
        f"Every mixer: {training['steps']:,} steps of {training['batch_size']} examples in the same order, "
        f"learning rate from {{{grid}}} by validation, seeds {', '.join(map(str, config['seeds']))}, parameters within "
        f"{config['parameter_tolerance']:.0%} of {config['baseline']}'s by the MLP's width. "
        f"The test split was read once. "
        f"Device: {'; '.join(devices) or 'none yet'}. Code: {', '.join(_revisions(records, ablation)) or 'none yet'}."
    )


def _revisions(records: Sequence[Record], ablation: str) -> list[str]:
    """Revisions that trained an ablation's runs, by first use; '+' where the work tree differed from its commit."""
    runs = (r for r in records if r["record"] == "run" and r["ablation"] == ablation and r["status"] == "finished")
    found = (r["revision"] for r in runs)
    names = (f"{r['commit'][:9]}{'+' if r.get('dirty') else ''}" if r["commit"] else "not in git" for r in found)
    return list(dict.fromkeys(names))


def _notes(records: Sequence[Record], ablation: str, task: str) -> list[str]:
    latest = {r["cell"]: r for r in records if r["record"] == "run" and (r["ablation"], r["task"]) == (ablation, task)}
    notes = []
    for r in latest.values():
        if r["status"] != "finished":
            reason = " ".join(r["reason"].split())
            notes.append(
                f"`{r['mixer']}`, learning rate {r['learning_rate']:g}, seed {r['seed']}: {r['status']}: {reason}"
            )
    return notes


def check(published: str, derived: Sequence[Table]) -> tuple[int, list[str]]:
    """Compare the tables in a Markdown text with those that the records give.

    Returns how many tables were found under a marker, and one sentence for each cell, row or column that differs.
    """
    known = {table.key: table for table in derived}
    lines = published.splitlines()
    count, wrong = 0, []
    for number, line in enumerate(lines):
        found = re.fullmatch(r"\s*<!-- chela report: (.+?) -->\s*", line)
        if not found:
            continue
        count += 1
        key = found[1]
        if key not in known:
            wrong.append(f"{key}: the results hold no such table; they hold {', '.join(known) or 'none'}")
            continue
        block = []
        for row in lines[number + 1 :]:
            if not row.strip().startswith("|"):
                break
            block.append(_cells(row))
        table = known[key]
        expected = [table.header, *table.rows]
        given = block[:1] + block[2:]
        if len(given) != len(expected):
            wrong.append(f"{key}: {len(given)} lines are published, the records give {len(expected)}")
        for theirs, ours in zip(given, expected, strict=False):
            if len(theirs) != len(ours):
                wrong.append(f"{key}, {ours[0]}: {len(theirs)} columns are published, the records give {len(ours)}")
            for column, a, b in zip(table.header, theirs, ours, strict=False):
                if a != b:
                    wrong.append(f"{key}, {ours[0]}, {column}: published {a!r}, the records give {b!r}")
    return count, wrong


def _cells(line: str) -> list[str]:
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
