"""Runs cells side by side: each worker is a process of its own, told what to run through a pipe.

A worker trains and writes its cell's files; the main process alone appends to results.jsonl. A worker that dies (the
system took its memory) costs its cell, which is recorded as failed; if the main process dies, the workers follow.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from chela_plugin.harness.cell import CellRunner, origin
from chela_plugin.harness.config import Ablation
from chela_plugin.harness.extras import MissingPackage
from chela_plugin.harness.grid import Cell
from chela_plugin.harness.results import Record, ResultsError
from chela_plugin.harness.training import Interrupted


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


class Events(Protocol):
    """What the main process hears of its cells."""

    def start(self, cell: Cell) -> None:
        """A cell begins, or goes on."""

    def step(self, cell: Cell, step: int, loss: float) -> None:
        """`step` steps of a cell are done."""

    def done(self, cell: Cell, record: Record) -> None:
        """A cell has ended; the record is to be kept."""


def default_workers(ablations: Sequence[Ablation]) -> int:
    """As many as the processors hold at the ablations' threads a run, at most 8; one where a GPU does the work."""
    import torch

    if any(a.training.accelerator != "cpu" for a in ablations) and torch.cuda.is_available():
        return 1
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, processors // max(a.training.threads for a in ablations)))


def run_here(pending: Sequence[Cell], runner: Callable[[str], CellRunner], events: Events, stop: Stop) -> None:
    """One cell after the other in this process. Raises Interrupted."""
    for cell in pending:

        class Listener:
            def step(self, step: int, loss: float, cell: Cell = cell) -> None:
                events.step(cell, step, loss)

            def stop(self) -> bool:
                return stop.signal is not None

        events.start(cell)
        events.done(cell, runner(cell.ablation).run(cell, Listener()))
        if stop.signal is not None:
            raise Interrupted


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    cell: Cell | None = None


def run_in_processes(
    pending: Sequence[Cell], ablations: dict[str, Ablation], folder: Path, workers: int, events: Events, stop: Stop
) -> None:
    """The cells on `workers` processes. Raises Interrupted once every worker has saved, or a worker's fatal error."""
    context = multiprocessing.get_context("spawn")  # fork would copy torch's thread pools in a broken state
    queue = deque(pending)
    crew: list[_Worker] = []

    def hire() -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, ablations, folder), daemon=True)
        process.start()
        theirs.close()
        crew.append(_Worker(process, ours))

    def give(worker: _Worker) -> None:
        worker.cell = None
        if queue and stop.signal is None:
            worker.cell = queue.popleft()
            worker.pipe.send(worker.cell)
            events.start(worker.cell)
        else:
            worker.pipe.close()
            crew.remove(worker)

    try:
        for _ in range(min(workers, len(queue))):
            hire()
            give(crew[-1])
        told = False
        while crew:
            if stop.signal is not None and not told:
                told = True
                for worker in crew:
                    with suppress(BrokenPipeError):  # it died just now; its end shows in the pipe
                        worker.pipe.send("stop")
            for pipe in wait([worker.pipe for worker in crew], timeout=0.2):
                worker = next(w for w in crew if w.pipe is pipe)
                assert worker.cell is not None
                try:
                    kind, *content = worker.pipe.recv()
                except (EOFError, ConnectionResetError):
                    _lost(worker, events)
                    crew.remove(worker)
                    if queue and stop.signal is None:
                        hire()
                        give(crew[-1])
                    continue
                if kind == "step":
                    events.step(worker.cell, *content)
                elif kind == "done":
                    events.done(worker.cell, *content)
                    give(worker)
                elif kind == "stopped":
                    crew.remove(worker)
                else:
                    raise content[0]
    finally:
        for worker in crew:
            worker.process.terminate()
    if stop.signal is not None:
        raise Interrupted


def _lost(worker: _Worker, events: Events) -> None:
    """A worker is gone without a word: its cell failed, and the others go on."""
    worker.process.join()
    code, cell = worker.process.exitcode, worker.cell
    assert cell is not None
    died = f"exited with code {code}"
    if code < 0:
        died = f"was killed by signal {-code}" + (", perhaps for want of memory" if code == -signal.SIGKILL else "")
    events.done(cell, origin(cell) | {"status": "failed", "reason": f"the process of this run {died}"})


def _work(pipe: Connection, ablations: dict[str, Ablation], folder: Path) -> None:
    """Life of a worker: a cell comes, its record goes, until the main process closes the pipe or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process decides
    runners: dict[str, CellRunner] = {}

    class Listener:
        def step(self, step: int, loss: float) -> None:
            pipe.send(("step", step, loss))

        def stop(self) -> bool:
            return pipe.poll() and pipe.recv() == "stop"

    try:
        while (cell := pipe.recv()) != "stop":
            try:
                if cell.ablation not in runners:
                    runners[cell.ablation] = CellRunner(ablations[cell.ablation], folder)
                answer: tuple[str, Any] | tuple[str] = ("done", runners[cell.ablation].run(cell, Listener()))
            except Interrupted:
                answer = ("stopped",)
            except (ResultsError, MissingPackage, ValueError) as error:
                answer = ("fatal", error)
            pipe.send(answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
