"""How an ablation shows that it moves: rich bars on a terminal, plain lines where output goes to a file or a CI log."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console


class PlainProgress:
    """One line when a run starts, one when it ends. Runs go by their labels; several may be under way."""

    def __init__(self, console: Console, total: int):
        self.console, self.total, self.done = console, total, 0

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None):
        return None

    def line(self, text: str) -> None:
        """A message of its own."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def start(self, label: str, steps: int) -> None:
        """A run begins, or goes on."""
        self.line(f"running {label}")

    def step(self, label: str, step: int, loss: float) -> None:
        """`step` steps of a run are done."""

    def finish(self, label: str, outcome: str) -> None:
        """A run has ended."""
        self.done += 1
        self.line(f"[{self.done}/{self.total}] {label}: {outcome}")

    def skip(self, count: int) -> None:
        """Runs that were finished before."""
        self.done += count
        if count:
            self.line(f"{count} of {self.total} runs were finished before")


class BarProgress(PlainProgress):
    """A bar for the runs, and one for each run under way with its loss and time left."""

    def __init__(self, console: Console, total: int):
        super().__init__(console, total)
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[loss]}"),
            console=console,
        )
        self.runs: Any = self.bars.add_task("runs", total=total, loss="")
        self.steps: dict[str, Any] = {}

    def __enter__(self) -> BarProgress:
        self.bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None):
        self.bars.stop()

    def start(self, label: str, steps: int) -> None:
        self.steps[label] = self.bars.add_task(label.replace("[", r"\["), total=steps, loss="")

    def step(self, label: str, step: int, loss: float) -> None:
        self.bars.update(self.steps[label], completed=step, loss=f"loss {loss:.3f}")

    def finish(self, label: str, outcome: str) -> None:
        self.bars.remove_task(self.steps.pop(label))
        self.bars.advance(self.runs)
        super().finish(label, outcome)

    def skip(self, count: int) -> None:
        self.bars.advance(self.runs, count)
        super().skip(count)


def progress_for(console: Console, total: int) -> PlainProgress:
    """Bars on a terminal, else lines."""
    return (
        BarProgress(console, total)
        if console.is_terminal and not console.is_dumb_terminal
        else PlainProgress(console, total)
    )
