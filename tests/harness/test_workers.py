"""Who works on what: readings of the test split follow their runs, and a process that failed on a GPU is replaced.

Threads stand for processes; what they do is told beforehand.
"""

import multiprocessing
import os
import threading
from multiprocessing.connection import Connection

import pytest

from chela_plugin.harness import ablation, grid, workers
from chela_plugin.harness.config import load_ablation
from chela_plugin.harness.results import open_for_reading


class Thread(threading.Thread):
    """Has an end of the pipe of its own, as a process has."""

    def __init__(self, target, args, daemon):
        pipe, *others = args
        super().__init__(target=target, args=(Connection(os.dup(pipe.fileno())), *others), daemon=daemon)

    def terminate(self): ...


@pytest.fixture
def crew(monkeypatch):
    """Each worker answers through `crew.answer`; `crew.seen` holds (worker, what it was given)."""

    class Crew:
        def __init__(self):
            self.seen, self.hired = [], 0

        def work(self, pipe, *_):
            number, self.hired = self.hired, self.hired + 1
            try:
                while (task := pipe.recv()) != "stop":
                    self.seen.append((number, task))
                    pipe.send(("done", self.answer(task)))
            except (EOFError, OSError):
                return

    class Context:
        Pipe = staticmethod(multiprocessing.Pipe)
        Process = Thread

    made = Crew()
    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda kind: Context)
    monkeypatch.setattr(workers, "_work", made.work)
    return made


def answer(task):
    """A run's record, better at the learning rate 0.1; or a test's."""
    if isinstance(task, workers.Reading):
        keys = ("ablation", "task", "mixer", "seed", "learning_rate", "cell")
        read = {"record": "test", "metric": "accuracy", "test": 0.5, "test_loss": 1.0}
        return read | {key: task.run[key] for key in keys}
    record = {"record": "run", "status": "finished", **vars(task), "cell": task.id, "validation_loss": 1.0}
    best = task.learning_rate == 0.1
    return record | {"metric": "accuracy", "validation": 0.9 if best else 0.1, "tokens_per_second": None}


class Events:
    def __init__(self):
        self.records = []

    def start(self, cell): ...

    def done(self, cell, record):
        self.records.append((cell, record))


def test_a_process_that_failed_on_a_gpu_gets_no_more_work(tiny, tmp_path, crew, monkeypatch):
    name, config = load_ablation(tiny(seeds=[0, 1, 2]))
    cells = grid.cells(name, config)
    crew.answer = lambda cell: {"record": "run", "status": "failed" if cell.id == cells[1].id else "finished"}
    for gpus, expected in ((["0"], [0, 0, 1, 1, 1, 1]), ([], [0] * 6)):
        crew.seen, crew.hired = [], 0
        monkeypatch.setattr(workers, "visible_gpus", lambda _, gpus=gpus: gpus)
        events = Events()
        workers.run_in_processes(cells, {name: config}, tmp_path, 1, events, workers.Stop())
        assert [number for number, _ in crew.seen] == expected
        assert [cell.id for cell, _ in events.records] == [cell.id for cell in cells]


def test_the_test_split_of_a_mixer_is_read_once_all_its_runs_have_ended(tiny, tmp_path, crew, quiet):
    path = tiny(seeds=[0, 1], learning_rates=[0.01, 0.1], mixers=["identity", "attention"])
    name, config = load_ablation(path)

    crew.answer = answer
    assert ablation.run_ablations({name: config}, tmp_path / "out", quiet, 2) is None
    order = [task for _, task in crew.seen]
    readings = [task.run for task in order if isinstance(task, workers.Reading)]
    assert sorted((r["mixer"], r["seed"], r["learning_rate"]) for r in readings) == [
        (mixer, seed, 0.1) for mixer in ("attention", "identity") for seed in (0, 1)
    ]
    for i, task in enumerate(order):
        if isinstance(task, workers.Reading):
            later = [t for t in order[i:] if not isinstance(t, workers.Reading)]
            assert not any(cell.mixer == task.run["mixer"] for cell in later)


def test_with_one_learning_rate_nothing_is_left_to_choose_and_a_run_is_read_at_once(tiny, tmp_path, crew, quiet):
    name, config = load_ablation(tiny(seeds=[0, 1, 2], mixers=["identity"], baseline="identity"))
    crew.answer = answer
    assert ablation.run_ablations({name: config}, tmp_path / "out", quiet, 2) is None
    kinds = [isinstance(task, workers.Reading) for _, task in crew.seen]
    assert kinds.count(True) == 3
    assert kinds.index(True) < len(kinds) - 3  # while other seeds were still to run
    records = [r | {"data": {}} for r in open_for_reading(tmp_path / "out")[1]]
    cells = grid.cells(name, config)
    missing = [r for r in records if r["cell"] != cells[2].id]
    assert [grid.is_settled(cell, missing, choosing=False) for cell in cells] == [True, True, False]
    assert all(grid.is_settled(cell, missing, choosing=True) for cell in cells)
