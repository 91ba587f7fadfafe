"""Runs an ablation: every mixer on equal terms, chosen on the validation split, read on the test split once.

Equal by construction: data order, steps, batch, schedule, optimiser, gradient clip, seeds and the grid of learning
rates are the ablation's, never a mixer's; parameters are matched to the baseline's. A run that fails is recorded with
its reason and the others go on.
"""

from __future__ import annotations

import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from torch import Tensor, nn

from chela_plugin.harness import backbones, environment, training
from chela_plugin.harness.config import Ablation, ConfigError, Strict, digest, identity
from chela_plugin.harness.extras import MissingPackage, need
from chela_plugin.harness.progress import PlainProgress, progress_for
from chela_plugin.harness.results import Record, ResultsError, ResultsFolder, load_tensors
from chela_plugin.harness.tasks import Examples, Split, augment, examples


@dataclass(frozen=True)
class Cell:
    """One run: its place in the grid. Equal cells of equal configs have equal ids."""

    ablation: str
    task: str
    mixer: str
    learning_rate: float
    seed: int
    id: str

    @property
    def group(self) -> tuple[str, str, str]:
        return self.ablation, self.task, self.mixer

    def __str__(self) -> str:
        return f"{self.task} | {self.mixer} | learning rate {self.learning_rate:g} | seed {self.seed}"


def cells(name: str, ablation: Ablation) -> list[Cell]:
    """The grid in the order in which it is run: seeds outermost, so that an early look compares all mixers."""
    grid = []
    for task in ablation.tasks:
        for seed in ablation.seeds:
            for learning_rate in ablation.learning_rates:
                for mixer in ablation.mixers:
                    key = identity(ablation) | {"tasks": task.model_dump(mode="json"), "mixers": mixer}
                    key |= {"learning_rates": learning_rate, "seeds": seed}
                    grid.append(Cell(name, task.task, mixer, learning_rate, seed, digest(key)))
    return grid


def check_mixers(ablation: Ablation) -> None:
    """Raise ConfigError for a mixer string that no installed mixer understands. One that can't run here passes."""
    from chela_plugin.registry import MixerSpecError, MixerUnavailableError, parse_pattern

    for mixer in ablation.mixers:
        try:
            parse_pattern(mixer)
        except MixerUnavailableError:
            continue  # recorded with its reason when its turn comes
        except MixerSpecError as error:
            raise ConfigError(f"mixers: {error}") from None


@dataclass
class Stop:
    """Set by SIGINT or SIGTERM; a run looks at it between two steps, so it never stops in the middle of an update."""

    signal: int | None = None


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """First SIGINT or SIGTERM: stop after this step. Second: at once, which costs the steps since the checkpoint."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.signal is not None:
            raise KeyboardInterrupt
        stop.signal = number

    for number in before:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Watcher:
    """Passes what a run tells to the progress display and to TensorBoard."""

    def __init__(self, display: PlainProgress, stop: Stop, board: Any):
        self.display, self._stop, self.board = display, stop, board

    def step(self, step: int, loss: float) -> None:
        self.display.step(step, loss)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def stop(self) -> bool:
        return self._stop.signal is not None


class _Ablation:
    """One ablation at work in an open results folder."""

    def __init__(self, name: str, config: Ablation, results: ResultsFolder, display: PlainProgress, stop: Stop):
        self.name, self.config, self.results, self.display, self.stop = name, config, results, display, stop
        self.fabric = training.new_fabric(config.training)
        self.tasks: dict[str, Strict] = {task.task: task for task in config.tasks}
        self.data: Callable[[str, Split], Examples] = lru_cache(None)(self._read)
        self.match: Callable[[str, str], backbones.Match] = lru_cache(None)(self._match)
        self.target: Callable[[str], int] = lru_cache(None)(self._target)

    def _read(self, task: str, split: Split) -> Examples:
        return examples(self.tasks[task], split)  # type: ignore[arg-type]  # every Task is a Strict

    def model(self, task: str, mixer: str, mlp_hidden: int) -> nn.Module:
        return backbones.build(self.config.backbone, self.data(task, "train"), mixer, mlp_hidden)

    def _target(self, task: str) -> int:
        return backbones.parameters(self.model(task, self.config.baseline, self.config.backbone.mlp_hidden))

    def _match(self, task: str, mixer: str) -> backbones.Match:
        start, target = self.config.backbone.mlp_hidden, self.target(task)
        if mixer == self.config.baseline:
            return backbones.Match(start, target, 1.0)
        return backbones.match_parameters(
            lambda hidden: self.model(task, mixer, hidden), target, self.config.parameter_tolerance, start
        )

    def run(self, cell: Cell) -> None:
        """One cell, from wherever it stands to its record."""
        self.display.start(str(cell), self.config.training.steps)
        record = {"record": "run", **vars(cell)}
        record["cell"] = record.pop("id")
        record |= {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        record |= {"versions": environment.versions(), "revision": environment.revision()}
        record |= {"device": environment.device_name(self.fabric.device)}
        try:
            record |= self._train(cell) | {"status": "finished"}
        except (ResultsError, training.Interrupted, MissingPackage):
            raise
        except training.Diverged as error:
            record |= {"status": "diverged", "reason": str(error)}
        except Exception as error:
            record |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
        self.results.append(record)
        (self.results.cell(cell.id) / "run.safetensors").unlink(missing_ok=True)
        if record["status"] == "finished":
            self.display.finish(f"validation {record['validation']:.4f}, {record['tokens_per_second']:,.0f} tokens/s")
        else:
            self.display.finish(f"{record['status']}: {record['reason']}")

    def _train(self, cell: Cell) -> Record:
        from torch.utils.tensorboard import SummaryWriter

        task, config = self.tasks[cell.task], self.config
        match = self.match(cell.task, cell.mixer)
        train, validation = self.data(cell.task, "train"), self.data(cell.task, "validation")
        probe = self.model(cell.task, cell.mixer, match.mlp_hidden)
        language = config.backbone.kind == "language"
        state = backbones.decoding_state(probe, config.backbone.dim) if language else None
        tokens = backbones.tokens_per_example(config.backbone, train) * config.training.batch_size

        def augmented(inputs: Tensor, generator: Any) -> Tensor:
            return augment(task, inputs, generator)  # type: ignore[arg-type]  # every Task is a Strict

        board = SummaryWriter(str(self.results.path / "tensorboard" / cell.ablation / cell.task / f"{cell.id}"))
        try:
            board.add_text("run", str(cell))
            done = training.run(
                lambda: self.model(cell.task, cell.mixer, match.mlp_hidden),
                train,
                validation,
                augmented,
                config.training,
                learning_rate=cell.learning_rate,
                seed=cell.seed,
                folder=self.results.cell(cell.id),
                checkpoint_seconds=config.checkpoint_seconds,
                fabric=self.fabric,
                watcher=_Watcher(self.display, self.stop, board),
            )
        finally:
            board.close()
        chosen = done.history["step"].index(done.best_step)
        return {
            "metric": train.metric,
            "validation": done.history["validation"][chosen],
            "validation_loss": done.history["validation_loss"][chosen],
            "best_step": done.best_step,
            "steps": done.step,
            "tokens": done.step * tokens,
            "tokens_per_second": done.timed_steps * tokens / done.timed_seconds if done.timed_steps else None,
            "seconds": done.seconds,
            "peak_bytes": done.peak_bytes,
            "history": done.history,
            "parameters": match.parameters,
            "parameter_ratio": match.ratio,
            "mlp_hidden": match.mlp_hidden,
            "state": vars(state) if state else None,
            "path": backbones.paths(probe, self.fabric.device),
            "data": {"train": train.sha256(), "validation": validation.sha256()},
        }

    def read_test(self, task: str, mixer: str) -> None:
        """Choose the learning rate by validation, then read the test split once for each seed."""
        runs = [r for r in latest_runs(self.results.records) if (r["ablation"], r["task"]) == (self.name, task)]
        runs = [r for r in runs if r["mixer"] == mixer and r["status"] == "finished"]
        if not runs:
            return
        read = {r["cell"] for r in self.results.records if r["record"] == "test"}
        rate = choose_learning_rate(runs)
        for run in sorted((r for r in runs if r["learning_rate"] == rate), key=lambda r: r["seed"]):
            if run["cell"] in read:
                continue
            saved = load_tensors(self.results.cell(run["cell"]) / "best.safetensors")
            if saved is None:
                raise ResultsError(
                    f"{self.results.path}/cells/{run['cell']}/best.safetensors is missing or damaged, and the test "
                    f"split was not read yet for {mixer}; restore it, or remove that run's line from results.jsonl"
                )
            model = self.model(task, mixer, run["mlp_hidden"])
            model.load_state_dict(saved[0])
            model = self.fabric.setup(model)
            data = self.data(task, "test")
            score = training.evaluate(model, data, self.config.training.batch_size, self.fabric.device)
            self.results.append(
                {
                    "record": "test",
                    "ablation": self.name,
                    "task": task,
                    "mixer": mixer,
                    "seed": run["seed"],
                    "learning_rate": rate,
                    "cell": run["cell"],
                    "metric": data.metric,
                    "test": score.metric,
                    "test_loss": score.loss,
                    "data": {"test": data.sha256()},
                }
            )


def choose_learning_rate(runs: Iterable[Record]) -> float:
    """Best mean validation over seeds; ties go to the smaller validation loss.

    A rate at which a seed is missing (it failed or diverged) comes after all that have more seeds.
    """
    rates: dict[float, list[Record]] = {}
    for run in runs:
        rates.setdefault(run["learning_rate"], []).append(run)

    def rank(rate: float) -> tuple[float, ...]:
        score = training.Score(
            statistics.fmean(r["validation"] for r in rates[rate]),
            statistics.fmean(r["validation_loss"] for r in rates[rate]),
        )
        return (len(rates[rate]), *score.rank(rates[rate][0]["metric"]))

    return max(rates, key=rank)


def latest_runs(records: Iterable[Record]) -> list[Record]:
    """The last run record of each cell: a failed one may have been tried again."""
    return list({r["cell"]: r for r in records if r["record"] == "run"}.values())


def tested(records: Iterable[Record]) -> set[tuple[str, str, str]]:
    """(ablation, task, mixer) whose test split has been read."""
    return {(r["ablation"], r["task"], r["mixer"]) for r in records if r["record"] == "test"}


def is_settled(cell: Cell, records: Iterable[Record]) -> bool:
    """Whether a cell is never run again: it ended, or the test split has been read for its mixer.

    A failure (a package that was missing, memory that ran out) may mend, so it is tried again, but not after the test
    split was read: what is known from it must not choose a learning rate.
    """
    ended = {r["cell"] for r in latest_runs(records) if r["status"] in ("finished", "diverged")}
    return cell.id in ended or cell.group in tested(records)


def run_ablations(ablations: dict[str, Ablation], out: Path, console: Console) -> int | None:
    """Run what is not finished in `out`. Returns None when all is done, or the signal that stopped it.

    Raises ResultsError or ConfigError before any work where it can't start, MissingPackage with the pip line.
    """
    for package in ("lightning", "tensorboard", "matplotlib"):
        need(package, "harness")
    for ablation in ablations.values():
        if ablation.backbone.kind == "language":
            need("transformers", "lm")
        if any(task.task == "digits" for task in ablation.tasks):
            need("sklearn", "harness")
        check_mixers(ablation)
    grids = {name: cells(name, ablation) for name, ablation in ablations.items()}
    manifest = {name: identity(ablation) for name, ablation in ablations.items()}
    with (
        ResultsFolder(out, manifest) as results,
        stop_on_signals() as stop,
        training.deterministic(),
        progress_for(console, sum(map(len, grids.values()))) as display,
    ):
        if results.torn:
            display.line("the last line of results.jsonl was half written; that run is done again")
        for name, ablation in ablations.items():
            work = _Ablation(name, ablation, results, display, stop)
            for cell in grids[name]:
                if is_settled(cell, results.records):
                    display.skip()
                    continue
                try:
                    work.run(cell)
                except training.Interrupted:
                    return stop.signal
                if stop.signal is not None:
                    return stop.signal
            for task in ablation.tasks:
                for mixer in ablation.mixers:
                    work.read_test(task.task, mixer)
    return None
