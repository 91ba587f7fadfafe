"""What a suite is made of: cases (one shape), and contenders that are timed side by side in a case."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from chela_plugin.bench.timing import Run


class Unavailable(Exception):
    """A contender can't run here; the message says why, and what would mend it."""


@dataclass
class Work:
    """One contender, ready to run at one shape.

    Args:
        runs: by what is timed ('forward', 'forward_backward', ...); each call does the work of one call in the record.
        path: the implementation that runs, as it says itself.
        parameters: numbers trained; None for an operator.
        resident_mib: weights and optimizer state, which `peak_mib` (what a run adds) does not contain.
        notes: whatever else the row should say.
    """

    runs: dict[str, Run]
    path: str = ""
    parameters: int | None = None
    resident_mib: float | None = None
    notes: dict[str, object] = field(default_factory=dict)


Build = Callable[[], Work]


@dataclass
class Case:
    """One shape.

    Args:
        axes: sizes, in the record's words: {"B": 8, "T": 4096, "D": 1024}.
        whats: what can be timed; a key of every contender's `Work.runs`.
        contenders: by name; built one after the other, timed interleaved.
        units: what one run does, for rates: {"forward": (32768, "tokens")}.
        floor_ms: the least time, by what is timed, on the H100; {} where none is defined.
        clock: True where the host's time belongs to the result (decoding).
        profiled: contenders whose kernels are listed in the record too, of the last thing timed.
    """

    axes: dict[str, int | str]
    whats: tuple[str, ...]
    contenders: dict[str, Build]
    units: dict[str, tuple[int, str]] = field(default_factory=dict)
    floor_ms: dict[str, float] = field(default_factory=dict)
    clock: bool = False
    profiled: tuple[str, ...] = ()

    def label(self, name: str, what: str) -> str:
        """What `--filter` is matched against."""
        return " ".join(f"{key}={value}" for key, value in self.axes.items()) + f" {name} {what}"


def selected(case: Case, filters: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Contenders of a case and what to time of each, of which every filter (a regular expression) finds something."""
    for name in case.contenders:
        whats = [what for what in case.whats if all(re.search(f, case.label(name, what)) for f in filters)]
        if whats:
            yield name, whats
