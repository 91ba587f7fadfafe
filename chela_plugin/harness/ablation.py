"""Runs an ablation: every mixer on equal terms, chosen on the validation split, read on the test split once.

Equal by construction: data order, steps, batch, schedule, optimiser, gradient clip, seeds and the grid of learning
rates are the ablation's, never a mixer's; parameters are matched to the baseline's. A run that fails is recorded with
its reason and the others go on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path

from rich.console import Console

from chela_plugin.harness.cell import CellRunner
from chela_plugin.harness.config import Ablation, ConfigError, identity
from chela_plugin.harness.environment import revision
from chela_plugin.harness.extras import need
from chela_plugin.harness.grid import Cell, cells, choose_learning_rate, is_settled, latest_runs
from chela_plugin.harness.progress import PlainProgress, progress_for
from chela_plugin.harness.results import Record, ResultsError, ResultsFolder
from chela_plugin.harness.tasks import cache, prepare
from chela_plugin.harness.trackers import check_trackers
from chela_plugin.harness.training import Interrupted
from chela_plugin.harness.workers import Reading, default_workers, read, run_here, run_in_processes, stop_on_signals


def run_ablations(
    ablations: dict[str, Ablation],
    out: Path,
    console: Console,
    workers: int | None = 1,
    *,
    max_seconds: float = math.inf,
    ray: str | None = None,
    trackers: Sequence[str] = (),
) -> int | None:
    """Run what is not finished in `out`. Returns None when all is done, or the exit code of what stopped it (`Stop`).

    Args:
        ablations: by name.
        out: the results folder, new or of an earlier call.
        console: shows progress.
        workers: processes that run cells side by side; 1 is this process, None as many as the machine has room for.
            Only this process knows mixers that were registered at run time.
        max_seconds: after so many, save and stop; a later call goes on. Each call makes at least one step of a run.
        ray: address of a Ray cluster (`ray_cluster`) whose slots run the cells, in place of `workers`.
        trackers: of `trackers.TRACKERS`, beside TensorBoard.

    Raises ResultsError or ConfigError before any work where it can't start, MissingPackage with the pip line.
    """
    deadline = time.monotonic() + max_seconds
    check_trackers(trackers)
    for ablation in ablations.values():
        _check(ablation)
    grid = [cell for name, ablation in ablations.items() for cell in cells(name, ablation)]
    manifest = {name: identity(ablation) for name, ablation in ablations.items()}
    with ExitStack() as stack:
        if ray is not None:
            from chela_plugin.harness.ray_cluster import ray_cluster, run_on_ray

            stack.enter_context(ray_cluster(ray))  # it takes signals for itself; ours come after
        results = stack.enter_context(ResultsFolder(out, manifest))
        stop = stack.enter_context(stop_on_signals(deadline))
        display = stack.enter_context(progress_for(console, len(grid)))
        if results.torn:
            display.line("the last line of results.jsonl was half written; that run is done again")
        choosing = {name: len(ablation.learning_rates) > 1 for name, ablation in ablations.items()}
        pending = [c for c in grid if not is_settled(c, results.records, choosing=choosing[c.ablation])]
        display.skip(len(grid) - len(pending))
        _tell_of_other_code(results.records, display)
        events = _Events(results, display, ablations, pending)
        runner = lru_cache(None)(lambda name: CellRunner(ablations[name], results.path, trackers))
        for name, task in dict.fromkeys((cell.ablation, cell.task) for cell in pending):
            with cache.reporting(_Generation(task, display)):
                prepare(next(config for config in ablations[name].tasks if config.task == task))
        if pending:
            _check_data(runner, results.records)
        workers = min(workers or default_workers(list(ablations.values())), len(pending))
        try:
            if ray is not None:
                run_on_ray(pending, ablations, results.path, events, stop, trackers)
            elif workers > 1:
                run_in_processes(pending, ablations, results.path, workers, events, stop, trackers, events.readings)
            else:
                run_here(pending, runner, events, stop)
        except Interrupted:
            return stop.exit_code
        readings = events.readings()  # where runs end in processes, most are done by now
        workers = min(workers, len(readings))
        if workers > 1 and ray is None:
            try:
                run_in_processes(readings, ablations, results.path, workers, events, stop, trackers)
            except Interrupted:
                return stop.exit_code
        else:
            for done, reading in enumerate(readings):
                if stop.signal is not None or (done and stop.asked):  # a short time is enough for one
                    return stop.exit_code
                events.done(reading, read(runner(reading.ablation), reading))
    if events.unread:
        raise ResultsError(
            "these runs are finished, and their models failed on the test split; mend it and start again:\n  "
            + "\n  ".join(events.unread)
        )
    return None


class _Generation:
    """Says every ten seconds how far the making of a task's data is."""

    def __init__(self, task: str, display: PlainProgress):
        self.task, self.display, self.said = task, display, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self.said >= 10:
            self.said = time.monotonic()
            self.display.line(f"making the data of {self.task}: {done:,} of {total:,} examples")


class _Events:
    """Keeps records, moves the bars, and knows what the test split may be read for."""

    def __init__(
        self, results: ResultsFolder, display: PlainProgress, ablations: dict[str, Ablation], pending: Sequence[Cell]
    ):
        self.results, self.display, self.ablations = results, display, ablations
        self.left = set(pending)
        self.asked: set[str] = set()  # cells whose test reading was given out
        self.unread: list[str] = []

    def start(self, cell: Cell | Reading) -> None:
        if isinstance(cell, Cell):
            self.display.start(str(cell), self.ablations[cell.ablation].training.steps)

    def step(self, cell: Cell | Reading, step: int, loss: float) -> None:
        self.display.step(str(cell), step, loss)

    def done(self, cell: Cell | Reading, record: Record) -> None:
        if isinstance(cell, Reading):
            if record["record"] == "test":
                self.results.append(record)
            else:
                self.unread.append(f"{cell}: {record['reason']}")
            return
        self.left.discard(cell)
        self.results.append(record)
        self.results.drop_checkpoint(cell.id)
        if record["status"] == "finished":
            speed = record["tokens_per_second"]
            outcome = f"validation {record['validation']:.4f}" + (f", {speed:,.0f} tokens/s" if speed else "")
        else:
            outcome = f"{record['status']}: {record['reason']}"
        self.display.finish(str(cell), outcome)

    def readings(self) -> list[Reading]:
        """What has become ready to be read since the last call: its mixer's learning rate on its task is chosen.

        It is once all runs of the mixer on the task have ended, and from the start where there is one rate only.
        """
        open_groups = {cell.group for cell in self.left if len(self.ablations[cell.ablation].learning_rates) > 1}
        found = [
            run
            for run in _to_test(self.ablations, self.results.records)
            if run["cell"] not in self.asked and (run["ablation"], run["task"], run["mixer"]) not in open_groups
        ]
        self.asked |= {run["cell"] for run in found}
        return [Reading(run) for run in found]


def _tell_of_other_code(records: Sequence[Record], display: PlainProgress) -> None:
    """Say that earlier runs are of another revision. They count as finished: most changes change no result."""
    now = revision()["commit"]
    others = [r for r in latest_runs(records) if r["status"] == "finished" and r["revision"]["commit"] != now]
    if others:
        commits = sorted({str(r["revision"]["commit"])[:9] for r in others})
        display.line(
            f"{len(others)} finished runs are of another revision of this code ({', '.join(commits)}) and are kept; "
            "to have them run again, give another --out"
        )


def _check(ablation: Ablation) -> None:
    """Raise what can be known before any work: a missing package, a mixer string that nobody understands."""
    for package in ("lightning", "tensorboard", "matplotlib"):
        need(package, "harness")
    if ablation.backbone.kind != "vision":
        need("transformers", "lm")
    for task in ablation.tasks:
        for package, extra in task.packages:
            need(package, extra)
    from chela_plugin.registry import MixerSpecError, MixerUnavailableError, parse_pattern

    models: dict[tuple[str, ...], str] = {}
    for mixer in ablation.mixers:
        try:
            model = tuple(str(spec) for spec in parse_pattern(mixer).expand(ablation.backbone.depth))
        except MixerUnavailableError as error:
            if mixer == ablation.baseline:  # nothing can be matched to it
                raise ConfigError(f"baseline: {error}") from None
            continue  # recorded with its reason when its turn comes
        except MixerSpecError as error:
            raise ConfigError(f"mixers: {error}") from None
        if model in models:
            raise ConfigError(f"mixers: {models[model]!r} and {mixer!r} are the same model: two cells would collide")
        models[model] = mixer


def _check_data(runner: Callable[[str], CellRunner], records: list[Record]) -> None:
    """Raise ResultsError where runs of earlier calls saw other data than those to come would.

    A task reads an installed package (bytes: Python's own library; digits: scikit-learn), which may have changed since.
    """
    finished = {(r["ablation"], r["task"]): r for r in latest_runs(records) if r["status"] == "finished"}
    for (ablation, task), run in finished.items():
        for split, digest in run["data"].items():
            if runner(ablation).data(task, split).sha256() != digest:
                raise ResultsError(
                    f"the {split} split of task {task!r} is not what the finished runs saw (they ran with Python "
                    f"{run['versions']['python']}); go back to the versions in results.jsonl, or give another --out"
                )


def _to_test(ablations: dict[str, Ablation], records: list[Record]) -> list[Record]:
    """The finished runs, one a seed at each mixer's chosen learning rate, whose test split is still unread."""
    read = {r["cell"] for r in records if r["record"] == "test"}
    chosen = []
    for name, ablation in ablations.items():
        for task in ablation.tasks:
            for mixer in ablation.mixers:
                group = (name, task.task, mixer)
                runs = [r for r in latest_runs(records) if (r["ablation"], r["task"], r["mixer"]) == group]
                runs = [r for r in runs if r["status"] == "finished"]
                rate = choose_learning_rate(runs) if runs else None
                chosen += sorted((r for r in runs if r["learning_rate"] == rate), key=lambda r: r["seed"])
    return [run for run in chosen if run["cell"] not in read]
