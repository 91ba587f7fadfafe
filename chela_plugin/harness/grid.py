"""The cells of an ablation, which of them are still to run, and what their records decide."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from chela_plugin.harness.config import Ablation, digest, identity
from chela_plugin.harness.results import Record


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
        """What one row of a table stands for."""
        return self.ablation, self.task, self.mixer

    def __str__(self) -> str:
        where = self.task if self.task == self.ablation else f"{self.ablation}/{self.task}"
        return f"{where} | {self.mixer} | lr {self.learning_rate:g} | seed {self.seed}"


def cells(name: str, ablation: Ablation) -> list[Cell]:
    """The grid in the order in which it is run: seeds outermost, so that an early look compares all mixers."""
    grid = []
    for task in ablation.tasks:
        for seed in ablation.seeds:
            for learning_rate in ablation.learning_rates:
                for mixer in ablation.mixers:
                    key = identity(ablation) | {"tasks": task.model_dump(mode="json"), "mixers": mixer}
                    key |= {"learning_rates": learning_rate, "seeds": seed}
                    grid.append(Cell(name, task.task, mixer, learning_rate, seed, digest([name, key])))
    return grid


def score_rank(metric: str, value: float, loss: float) -> tuple[float, float]:
    """Larger is better: by the metric, ties by the smaller loss."""
    return (value if metric == "accuracy" else -value, -loss)


def choose_learning_rate(runs: Iterable[Record]) -> float:
    """Best mean validation over seeds; ties go to the smaller validation loss.

    A rate at which a seed is missing (it failed or diverged) comes after all that have more seeds.
    """
    rates: dict[float, list[Record]] = {}
    for run in runs:
        rates.setdefault(run["learning_rate"], []).append(run)

    def rank(rate: float) -> tuple[float, ...]:
        value = statistics.fmean(r["validation"] for r in rates[rate])
        loss = statistics.fmean(r["validation_loss"] for r in rates[rate])
        return (len(rates[rate]), *score_rank(rates[rate][0]["metric"], value, loss))

    return max(rates, key=rank)


def latest_runs(records: Iterable[Record]) -> list[Record]:
    """The last run record of each cell: a failed one may have been tried again."""
    return list({r["cell"]: r for r in records if r["record"] == "run"}.values())


def tested(records: Iterable[Record]) -> set[tuple[str, str, str]]:
    """(ablation, task, mixer) whose test split has been read."""
    return {(r["ablation"], r["task"], r["mixer"]) for r in records if r["record"] == "test"}


def is_settled(cell: Cell, records: Iterable[Record], *, choosing: bool) -> bool:
    """Whether a cell is never run again: it ended, or the test split has been read for its mixer.

    A failure (a package that was missing, memory that ran out) may mend, so it is tried again. Where a learning rate is
    chosen (`choosing`), not after the test split was read: what is known from it must not choose.
    """
    ended = {r["cell"] for r in latest_runs(records) if r["status"] in ("finished", "diverged")}
    return cell.id in ended or (choosing and cell.group in tested(records))
