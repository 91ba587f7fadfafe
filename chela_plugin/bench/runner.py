"""Runs the cases of a suite: builds, warms up within a budget, times interleaved, writes the record case by case."""

from __future__ import annotations

import gc
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console

from chela_plugin.bench import profile, timing
from chela_plugin.bench import record as files
from chela_plugin.bench.cases import Case, Unavailable, Work, selected
from chela_plugin.bench.graphs import Captured
from chela_plugin.harness.progress import progress_for

FEWEST_ROUNDS = 5


class OutOfTime(Exception):
    """A contender was not ready within its budget."""


def run_suite(
    suite: str,
    cases: list[Case],
    device: torch.device,
    console: Console,
    *,
    out: Path | None,
    filters: list[str],
    rounds: int,
    budget_s: float,
    revision: str | None,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """The record; on disk at `out` after every case.

    Args:
        filters: regular expressions, all of which must find something in a contender's label (`Case.label`).
        rounds: of interleaved timing; fewer (at least 5) where they would take longer than `budget_s`.
        budget_s: for building and warming up one contender (compilation and autotune), and for the timing of one case.
        settings: of the suite, for the record.
    """
    record: dict[str, Any] = {"format": files.FORMAT, "suite": suite, **timing.conditions(revision, device)}
    record |= {"bandwidth": timing.BANDWIDTH, "matmul_rate": timing.MATMUL_RATE, "rounds": rounds, **settings}
    record |= {"results": [], "skipped": [], "profile": []}
    chosen = [(case, dict(selected(case, filters))) for case in cases]
    total = sum(len(whats) for _, whats in chosen)
    with progress_for(console, total) as progress:
        for case, whats in chosen:
            for name in whats:
                progress.start(f"{suite} {case.label(name, '')}", 1)
            rows, skipped, profiles = run_case(case, whats, device, rounds, budget_s, progress.line)
            record["results"] += rows
            record["skipped"] += skipped
            record["profile"] += profiles
            if out is not None:
                files.write(out, record)
            for name in whats:
                times = [f"{row['what']} {row['ms'][0]:.3f} ms" for row in rows if row["name"] == name]
                reasons = [row["reason"] for row in skipped if row["name"] == name]
                progress.finish(f"{suite} {case.label(name, '')}", "; ".join(times + reasons))
    return record


def run_case(
    case: Case,
    whats: dict[str, list[str]],
    device: torch.device,
    rounds: int,
    budget_s: float,
    tell: Callable[[str], None],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of what was timed, of what was skipped (with the reason), and of the kernels of what is profiled.

    Args:
        tell: gets a line whenever a contender is ready to be timed, which can take minutes.
    """
    works: dict[str, Work] = {}
    first: dict[str, float] = {}
    peaks: dict[tuple[str, str], float | None] = {}
    estimates: dict[tuple[str, str], float] = {}
    skipped: list[dict[str, Any]] = []

    for name, wanted in whats.items():
        reason = None
        start = time.perf_counter()
        try:
            with at_most(budget_s):
                work = case.contenders[name]()
                work.runs = {what: run for what, run in work.runs.items() if what in wanted}
                for what, run in list(work.runs.items()):
                    try:
                        run()  # compiles, searches, captures
                    except Exception as error:
                        if not isinstance(run, Captured):
                            raise
                        why = f"{type(error).__name__}: {_first_line(error)}"
                        skipped.append({**case.axes, "name": name, "what": what, "reason": why})
                        del work.runs[what]
                        continue
                    timing.synchronize()
                    begin = time.perf_counter()
                    run()
                    timing.synchronize()
                    estimates[name, what] = time.perf_counter() - begin
            first[name] = round(time.perf_counter() - start, 2)
            for what, run in work.runs.items():
                allocates = device.type == "cuda" and not isinstance(run, Captured)
                peaks[name, what] = timing.peak_over_inputs(run) if allocates else None
            works[name] = work
            tell(f"{case.label(name, '').strip()}: ready after {first[name]:.1f} s")
        except Unavailable as error:
            reason = str(error)
        except OutOfTime:
            reason = f"not ready within {budget_s:g} s (compilation and autotune); raise --budget"
        except torch.OutOfMemoryError:
            reason = f"out of memory ({torch.cuda.get_device_properties(device).total_memory / 2**30:.0f} GiB)"
        except Exception as error:  # one contender's fault is a row, not the end of the run
            reason = f"{type(error).__name__}: {_first_line(error)}"
        if reason is not None:
            seconds = round(time.perf_counter() - start, 2)
            skipped.append({**case.axes, "name": name, "reason": reason, "after_s": seconds})
        work = None  # type: ignore[assignment]  # its memory, where it failed
        _free(device)

    runs = {(name, what): run for name, work in works.items() for what, run in work.runs.items()}
    if not runs:
        return [], skipped, []
    once = sum(estimates[key] for key in runs)
    rounds = max(FEWEST_ROUNDS, min(rounds, int(budget_s / max(once, 1e-9))))
    labels = {f"{name}\0{what}": run for (name, what), run in runs.items()}
    measure = timing.clock_times if case.clock else lambda r, n: timing.interleaved(r, n, device)
    try:
        times = measure(labels, rounds)
    except torch.OutOfMemoryError:
        gone = "out of memory while timed beside the others"
        skipped += [{**case.axes, "name": name, "reason": gone} for name in works]
        _free(device)
        return [], skipped, []
    rows = []
    for name, what in runs:
        work, ms = works[name], timing.quantiles(times[f"{name}\0{what}"])
        row: dict[str, Any] = {**case.axes, "name": name, "what": what, "ms": ms, "rounds": rounds}
        if what in case.units:
            count, unit = case.units[what]
            row[f"{unit}_per_second"] = round(count / ms[0] * 1e3, 1)
        if what in case.floor_ms and device.type == "cuda":
            row["floor_ms"] = round(case.floor_ms[what], 4)
            row["share_of_floor"] = round(case.floor_ms[what] / ms[0], 3)
        row["peak_mib"] = peaks[name, what]
        row |= {"resident_mib": work.resident_mib, "parameters": work.parameters, "path": work.path}
        row |= {"ready_s": first[name], **work.notes}
        rows.append({key: value for key, value in row.items() if value is not None})
    profiles = []
    for name in (name for name in case.profiled if name in works):
        what, run = list(works[name].runs.items())[-1]
        axes = {**case.axes, "name": name, "what": what}
        profiles += [{**axes, **row} for row in profile.kernels(run, device)]
    works.clear()
    del runs, labels
    _free(device)
    return rows, skipped, profiles


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else "no message"


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def ring(signum: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def at_most(seconds: float):
    """Raises OutOfTime in the block after so long; no limit where there are no alarms (Windows, another thread)."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        return nullcontext()
    return _alarm(seconds)
