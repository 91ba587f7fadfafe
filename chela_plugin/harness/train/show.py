"""How a training run shows that it moves: a rich bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console

SECONDS_BETWEEN_LINES = 10.0


def summary(values: dict[str, float]) -> str:
    """'loss 2.345  12,345 tokens/s  MFU 41.2 %'."""
    parts = [f"loss {values['loss']:.4f}"]
    parts += [f"{v:,.0f} {k.removesuffix('_per_second')}/s" for k, v in values.items() if k.endswith("_per_second")]
    if "mfu" in values:
        parts.append(f"MFU {100 * values['mfu']:.1f} %")
    return "  ".join(parts)


class Lines:
    """Plain lines: a CI log, a file."""

    def __init__(self, console: Console, total: int):
        self.console, self.total = console, total
        self.last = -SECONDS_BETWEEN_LINES

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def line(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def step(self, step: int, values: dict[str, float]) -> None:
        now = time.monotonic()
        if now - self.last >= SECONDS_BETWEEN_LINES or step == self.total:
            self.last = now
            self.line(f"step {step}/{self.total}  {summary(values)}")


class Bar(Lines):
    """One bar with the time left, the loss, the rate and MFU."""

    def __init__(self, console: Console, total: int):
        super().__init__(console, total)
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.description}"),
            console=console,
        )
        self.task: Any = self.bar.add_task("", total=total)

    def __enter__(self) -> Bar:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def step(self, step: int, values: dict[str, float]) -> None:
        self.bar.update(self.task, completed=step, description=summary(values))


def display_for(console: Console, total: int, unit: str) -> Lines:
    """A bar on a terminal, else lines."""
    return Bar(console, total) if console.is_terminal and not console.is_dumb_terminal else Lines(console, total)
