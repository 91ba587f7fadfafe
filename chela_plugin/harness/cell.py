"""Runs single cells of one ablation: model, matched parameters, data, training, and the record of how it went."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Protocol

from torch import nn

from chela_plugin.harness import backbones, environment, training
from chela_plugin.harness.config import Ablation, ConfigError, TaskConfig, identity
from chela_plugin.harness.extras import MissingPackage
from chela_plugin.harness.grid import Cell
from chela_plugin.harness.results import Record, ResultsError, load_tensors, unwritable
from chela_plugin.harness.tasks import Examples, Split, augment, augments, examples
from chela_plugin.harness.trackers import Curves


class Listener(Protocol):
    """Hears how a run goes on, and may ask it to stop."""

    def step(self, step: int, loss: float) -> None:
        """`step` steps are done; `loss` is the last batch's."""

    def stop(self) -> bool:
        """Whether to save and stop now."""


def origin(cell: Cell) -> Record:
    """The start of a run's record: which cell, when, and by which code."""
    record: Record = {"record": "run", **vars(cell)}
    record["cell"] = record.pop("id")
    record |= {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    return record | {"versions": environment.versions(), "revision": environment.revision(), "device": "none"}


class _Watcher:
    """A listener, and the trackers for the scalars."""

    def __init__(self, listener: Listener, curves: Curves):
        self.step, self.stop, self.scalars = listener.step, listener.stop, curves.scalars


class CellRunner:
    """Runs cells of one ablation; what they share (data, parameter counts) is made once."""

    def __init__(self, config: Ablation, folder: Path, trackers: Sequence[str] = ()):
        self.config, self.folder, self.trackers = config, folder, trackers
        self.fabric = training.new_fabric(config.training)
        self.tasks: dict[str, TaskConfig] = {task.task: task for task in config.tasks}
        self.data: Callable[[str, Split], Examples] = lru_cache(None)(self._read)
        self.match: Callable[[str, str], backbones.Match] = lru_cache(None)(self._match)
        self.target: Callable[[str], int] = lru_cache(None)(self._target)

    def _read(self, task: str, split: Split) -> Examples:
        return examples(self.tasks[task], split)

    def model(self, task: str, mixer: str, mlp_hidden: int) -> nn.Module:
        """A model of one mixer for one task."""
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

    def cell_folder(self, cell_id: str) -> Path:
        """Where a run keeps its checkpoint and its best weights."""
        path = self.folder / "cells" / cell_id
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(path, error) from error
        return path

    def run(self, cell: Cell, listener: Listener) -> Record:
        """One cell, from wherever it stands to its record; a failure is a record too.

        Raises what ends the whole ablation: training.Interrupted, ResultsError (the disk), MissingPackage, ConfigError
        (data or a device that is not there, a tracker that can't start).
        """
        record = origin(cell)
        try:
            with training.reproducible(self.config.training.threads):
                record |= {"device": environment.device_name(self.fabric.device)}
                return record | self._train(cell, listener) | {"status": "finished"}
        except (ResultsError, training.Interrupted, MissingPackage, ConfigError):
            raise
        except training.Diverged as error:
            return record | {"status": "diverged", "reason": str(error)}
        except Exception as error:
            return record | {"status": "failed", "reason": f"{type(error).__name__}: {error}"}

    def _train(self, cell: Cell, listener: Listener) -> Record:
        task, config = self.tasks[cell.task], self.config
        match = self.match(cell.task, cell.mixer)
        train, validation = self.data(cell.task, "train"), self.data(cell.task, "validation")
        probe = self.model(cell.task, cell.mixer, match.mlp_hidden).to(self.fabric.device)  # a mixer may run there only
        language = config.backbone.kind == "language"
        state = backbones.decoding_state(probe, config.backbone.dim, self.fabric.device) if language else None
        with self.fabric.autocast():  # some kernels take 16-bit inputs only
            path = backbones.paths(probe, self.fabric.device)
        del probe  # its memory would count in the run's peak
        tokens = backbones.tokens_per_example(config.backbone, train) * config.training.batch_size

        with Curves(self.folder, cell, identity(config), self.trackers) as curves:
            done = training.run(
                lambda: self.model(cell.task, cell.mixer, match.mlp_hidden),
                train,
                validation,
                partial(augment, task) if augments(task) else None,
                config.training,
                learning_rate=cell.learning_rate,
                seed=cell.seed,
                folder=self.cell_folder(cell.id),
                checkpoint_seconds=config.checkpoint_seconds,
                fabric=self.fabric,
                watcher=_Watcher(listener, curves),
            )
        chosen = done.history["step"].index(done.best_step)
        return {
            "metric": train.metric,
            "validation": done.history["validation"][chosen],
            "validation_loss": done.history["validation_loss"][chosen],
            "best_step": done.best_step,
            "steps": done.step,
            "tokens": done.step * tokens,
            "sequence_length": tokens // config.training.batch_size,
            "order": done.order,
            "schedule": done.schedule,
            "tokens_per_second": done.timed_steps * tokens / done.timed_seconds if done.timed_steps else None,
            "seconds": done.seconds,
            "peak_bytes": done.peak_bytes,
            "replayed_steps": done.replayed,
            "history": done.history,
            "parameters": match.parameters,
            "parameter_ratio": match.ratio,
            "mlp_hidden": match.mlp_hidden,
            "state": vars(state) if state else None,
            "path": path,
            "data": {"train": train.sha256(), "validation": validation.sha256()},
        }

    def read_test(self, run: Record) -> Record:
        """The test split's one reading, with the best weights of a finished run."""
        path = self.cell_folder(run["cell"]) / "best.safetensors"
        saved = load_tensors(path)
        if saved is None:
            raise ResultsError(
                f"{path} is missing, and the test split was not read yet for {run['mixer']}; "
                f"restore it, or remove the line of run {run['cell']} from results.jsonl"
            )
        with training.reproducible(self.config.training.threads):
            model = self.model(run["task"], run["mixer"], run["mlp_hidden"])
            model.load_state_dict(saved[0])
            data = self.data(run["task"], "test")
            wrapped, size = self.fabric.setup(model), self.config.training.batch_size
            score = training.evaluate(wrapped, data, size, self.fabric.device)
            if data.other_sizes:
                score.slices[backbones.pixels(data.inputs)] = score.metric
            for inputs in data.other_sizes:
                backbones.resize(model, inputs)
                other = replace(data, inputs=inputs)
                score.slices[backbones.pixels(inputs)] = training.evaluate(
                    wrapped, other, size, self.fabric.device
                ).metric
        record: Record = {"record": "test", "metric": data.metric, "test": score.metric, "test_loss": score.loss}
        record |= {"slices": score.slices} if score.slices else {}
        record |= {key: run[key] for key in ("ablation", "task", "mixer", "seed", "learning_rate", "cell")}
        return record | {"data": {"test": data.sha256()}}
