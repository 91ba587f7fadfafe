"""Runs cells side by side: each worker is a process of its own, told what to run through a pipe.

A worker trains and writes its cell's files; the main process alone appends to results.jsonl. A worker that dies (the
system took its memory) costs its cell, which is recorded as failed; if the main process dies, the workers follow.
Where GPUs do the work, each worker sees one of them.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from chela_plugin.harness.cell import CellRunner, Listener, origin
from chela_plugin.harness.config import Ablation
from chela_plugin.harness.extras import MissingPackage
from chela_plugin.harness.grid import Cell
from chela_plugin.harness.results import Record, ResultsError
from chela_plugin.harness.training import Interrupted

OUT_OF_TIME = 75  # EX_TEMPFAIL of sysexits.h: not finished, try again


@dataclass
class Stop:
    """Set by SIGINT or SIGTERM, or by the clock.

    A run looks at it between two steps, so it never stops in the middle of an update, and has always made a step.
    """

    signal: int | None = None
    deadline: float = math.inf  # by time.monotonic()

    @property
    def asked(self) -> bool:
        """Whether to save and stop."""
        return self.signal is not None or time.monotonic() >= self.deadline

    @property
    def exit_code(self) -> int:
        """What a shell is told of a stop: 130, 143, or OUT_OF_TIME."""
        return OUT_OF_TIME if self.signal is None else 128 + self.signal


@contextmanager
def stop_on_signals(deadline: float = math.inf) -> Iterator[Stop]:
    """First SIGINT or SIGTERM: stop after this step. Second: at once, which costs the steps since the checkpoint."""
    stop = Stop(deadline=deadline)
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

    def start(self, cell: Any) -> None:
        """A cell begins, or goes on."""

    def step(self, cell: Any, step: int, loss: float) -> None:
        """`step` steps of a cell are done."""

    def done(self, cell: Any, record: Record) -> None:
        """A cell has ended; the record is to be kept."""


def visible_gpus(ablations: Sequence[Ablation]) -> list[str]:
    """The GPUs for runs side by side, as CUDA_VISIBLE_DEVICES names them; empty where processors do the work."""
    import torch

    if all(a.training.accelerator == "cpu" for a in ablations) or not torch.cuda.is_available():
        return []
    count, given = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(i) for i in range(count)] if given is None else [name.strip() for name in given.split(",")][:count]


def default_workers(ablations: Sequence[Ablation]) -> int:
    """One a GPU; without any, as many as the processors hold at the ablations' threads a run, at most 8."""
    gpus = visible_gpus(ablations)
    if gpus:
        return len(gpus)
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, processors // max(a.training.threads for a in ablations)))


def run_here(pending: Sequence[Cell], runner: Callable[[str], CellRunner], events: Events, stop: Stop) -> None:
    """One cell after the other in this process. Raises Interrupted."""
    for cell in pending:

        class Here:
            def step(self, step: int, loss: float, cell: Cell = cell) -> None:
                events.step(cell, step, loss)

            def stop(self) -> bool:
                return stop.asked

        events.start(cell)
        events.done(cell, runner(cell.ablation).run(cell, Here()))
        if stop.asked:
            raise Interrupted


@dataclass(frozen=True)
class Reading:
    """The test split's one reading for a finished run; done as cells are."""

    run: Record

    @property
    def ablation(self) -> str:
        """Whose data and backbone it needs."""
        return self.run["ablation"]

    def __str__(self) -> str:
        return f"{self.run['task']}, {self.run['mixer']}, seed {self.run['seed']}"


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    slot: int
    cell: Cell | Reading | None = None


def run_in_processes(
    pending: Sequence[Cell | Reading],
    ablations: dict[str, Ablation],
    folder: Path,
    workers: int,
    events: Events,
    stop: Stop,
    trackers: Sequence[str] = (),
    then: Callable[[], Sequence[Cell | Reading]] = tuple,
) -> None:
    """Cells or readings on `workers` processes. Raises Interrupted once all have saved, or a worker's fatal error.

    then: what is to be done next whenever something is done; processes without work wait for it.
    """
    context = multiprocessing.get_context("spawn")  # fork would copy torch's thread pools in a broken state
    queue = deque(pending)
    crew: list[_Worker] = []
    gpus = visible_gpus(list(ablations.values()))

    def hire(slot: int) -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, ablations, folder, trackers), daemon=True)
        with _one_gpu(gpus, slot):
            process.start()
        theirs.close()
        crew.append(_Worker(process, ours, slot))

    def give() -> None:
        """Work for all who have none."""
        for worker in crew:
            if worker.cell is None and queue and not stop.asked:
                worker.cell = queue.popleft()
                with suppress(BrokenPipeError):  # it died while it waited; its end shows in the pipe
                    worker.pipe.send(worker.cell)
                events.start(worker.cell)

    try:
        for slot in range(min(workers, len(queue))):
            hire(slot)
            give()
        told = False
        while busy := [worker for worker in crew if worker.cell is not None]:
            if stop.asked and not told:
                told = True
                for worker in busy:
                    with suppress(BrokenPipeError):  # it died just now; its end shows in the pipe
                        worker.pipe.send("stop")
            for pipe in wait([worker.pipe for worker in busy], timeout=0.2):
                worker = next(w for w in crew if w.pipe is pipe)
                cell, worker.cell = worker.cell, None
                assert cell is not None
                try:
                    kind, *content = worker.pipe.recv()
                except (EOFError, ConnectionResetError):
                    _lost(worker, cell, events)
                    crew.remove(worker)
                    queue.extendleft(then())
                    if queue and not stop.asked:
                        hire(worker.slot)
                    give()
                    continue
                if kind == "step":
                    worker.cell = cell
                    events.step(cell, *content)
                elif kind == "done":
                    events.done(cell, *content)
                    queue.extendleft(then())
                    if gpus and content[0].get("status") == "failed":
                        # After an error on the device, or in a capture, everything else fails in this process.
                        worker.pipe.close()
                        crew.remove(worker)
                        if queue and not stop.asked:
                            hire(worker.slot)
                    give()
                elif kind == "stopped":
                    crew.remove(worker)
                else:
                    raise content[0]
        for worker in crew:
            worker.pipe.close()
    finally:
        for worker in crew:
            worker.process.terminate()
    if stop.asked:
        raise Interrupted


@contextmanager
def _one_gpu(gpus: Sequence[str], slot: int) -> Iterator[None]:
    """A process that starts here sees one GPU: CUDA reads the variable once, before the process can set it itself."""
    name = "CUDA_VISIBLE_DEVICES"
    before = os.environ.get(name)
    if gpus:
        os.environ[name] = gpus[slot % len(gpus)]
    try:
        yield
    finally:
        if gpus and before is None:
            del os.environ[name]
        elif gpus:
            os.environ[name] = str(before)


def _lost(worker: _Worker, cell: Cell | Reading, events: Events) -> None:
    """A worker is gone without a word: its cell failed, and the others go on."""
    worker.process.join()
    code = worker.process.exitcode
    died = f"exited with code {code}"
    if code < 0:
        died = f"was killed by signal {-code}" + (", perhaps for want of memory" if code == -signal.SIGKILL else "")
    reason = f"the process of this run {died}"
    if isinstance(cell, Reading):
        events.done(cell, {"record": "unread", "reason": reason})
    else:
        events.done(cell, origin(cell) | {"status": "failed", "reason": reason})


def read(runner: CellRunner, reading: Reading) -> Record:
    """The test's record, or one that says why there is none: a failure is of the mixer's, and the others go on."""
    try:
        return runner.read_test(reading.run)
    except ResultsError:
        raise
    except Exception as error:
        return {"record": "unread", "reason": f"{type(error).__name__}: {error}"}


class Answers:
    """Runs cells for another process, and says how each ended."""

    def __init__(self, ablations: dict[str, Ablation], folder: Path, trackers: Sequence[str]):
        self.ablations, self.folder, self.trackers = ablations, folder, trackers
        self.runners: dict[str, CellRunner] = {}

    def run(self, cell: Cell | Reading, listener: Listener) -> tuple[str, Any]:
        """('done', its record), ('stopped', None), or ('fatal', an error that ends the whole ablation)."""
        try:
            if cell.ablation not in self.runners:
                self.runners[cell.ablation] = CellRunner(self.ablations[cell.ablation], self.folder, self.trackers)
            runner = self.runners[cell.ablation]
            return "done", read(runner, cell) if isinstance(cell, Reading) else runner.run(cell, listener)
        except Interrupted:
            return "stopped", None
        except (ResultsError, MissingPackage, ValueError) as error:
            return "fatal", error


def _work(pipe: Connection, ablations: dict[str, Ablation], folder: Path, trackers: Sequence[str]) -> None:
    """Life of a worker: a cell comes, its record goes, until the main process closes the pipe or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process decides
    answers = Answers(ablations, folder, trackers)

    class Heard:
        def step(self, step: int, loss: float) -> None:
            pipe.send(("step", step, loss))

        def stop(self) -> bool:
            return pipe.poll() and pipe.recv() == "stop"

    try:
        while (cell := pipe.recv()) != "stop":
            pipe.send(answers.run(cell, Heard()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
