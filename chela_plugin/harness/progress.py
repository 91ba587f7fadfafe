"""How an ablation shows that it moves: rich bars on a terminal, plain lines where output goes to a file or a CI log."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console


class PlainProgress:
    """One line when a run starts, one when it ends."""

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
        """A run begins."""
        self.line(f"[{self.done + 1}/{self.total}] {label}")

    def step(self, step: int, loss: float) -> None:
        """`step` steps of the run are done."""

    def finish(self, outcome: str) -> None:
        """The run has ended."""
        self.done += 1
        self.line(f"[{self.done}/{self.total}]   {outcome}")

    def skip(self) -> None:
        """A run was finished before."""
        self.done += 1


class BarProgress(PlainProgress):
    """Two bars: runs, and the steps of the current one with its loss and time left."""

    def __init__(self, console: Console, total: int):
        super().__init__(console, total)
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
            console=console,
        )
        self.runs: Any = self.bars.add_task("runs", total=total, loss="")
        self.steps: Any = None

    def __enter__(self) -> BarProgress:
        self.bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None):
        self.bars.stop()

    def start(self, label: str, steps: int) -> None:
        self.steps = self.bars.add_task(label.replace("[", r"\["), total=steps, loss="")

    def step(self, step: int, loss: float) -> None:
        self.bars.update(self.steps, completed=step, loss=f"loss {loss:.3f}")

    def finish(self, outcome: str) -> None:
        self.bars.remove_task(self.steps)
        self.bars.advance(self.runs)
        super().finish(outcome)

    def skip(self) -> None:
        self.bars.advance(self.runs)
        super().skip()


def progress_for(console: Console, total: int) -> PlainProgress:
    """Bars on a terminal, else lines."""
    return (
        BarProgress(console, total)
        if console.is_terminal and not console.is_dumb_terminal
        else PlainProgress(console, total)
    )
