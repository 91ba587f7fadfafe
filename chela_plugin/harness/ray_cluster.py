"""Cells over a Ray cluster: a task a cell, on one GPU or on as many CPU slots as the run has threads.

Workers write checkpoints and weights into the results folder, which all nodes must therefore share, as Ray's own
training library asks of its storage path; the process that was called alone appends to results.jsonl. When a machine is
lost, Ray starts its cells on another one and they go on from their last checkpoints. Should the lost one still be alive
behind a broken network, both write the same bytes, since a run is a function of its cell.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chela_plugin.harness import environment
from chela_plugin.harness.cell import origin
from chela_plugin.harness.config import Ablation, ConfigError
from chela_plugin.harness.extras import need
from chela_plugin.harness.grid import Cell
from chela_plugin.harness.training import Interrupted
from chela_plugin.harness.workers import Answers, Events, Stop

RETRIES = 3  # of a cell whose machine or process is lost
SECONDS_BETWEEN_NEWS = 0.5


@contextmanager
def ray_cluster(address: str) -> Iterator[None]:
    """Join a cluster, or the one that this process is in already.

    Args:
        address: 'local' starts one on this machine for the time of the call, 'auto' joins the one that `ray start` made
            on this machine, 'HOST:PORT' joins another.

    Raises ConfigError where there is none, MissingPackage with the pip line.
    """
    need("ray", "ray")
    import ray

    if ray.is_initialized():
        yield
        return
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a comparison sends nothing to anyone unasked
    try:
        options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"--ray {address}: no cluster answers ({' '.join(str(error).split())}); start one with `ray start --head`, "
            "or use --ray local"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def run_on_ray(
    pending: Sequence[Cell],
    ablations: dict[str, Ablation],
    folder: Path,
    events: Events,
    stop: Stop,
    trackers: Sequence[str] = (),
) -> None:
    """The cells on the cluster that this process is in.

    Raises Interrupted once every cell under way has saved, a cell's fatal error, or ConfigError where a node can't run
    cells on equal terms: it doesn't see the folder, or has other versions.
    """
    import ray

    folder = folder.resolve()
    _check_nodes(folder, ablations)
    gpus = ray.cluster_resources().get("GPU", 0)
    shared = ray.put(ablations)
    mailbox: Any = ray.remote(_Mailbox).options(num_cpus=0, scheduling_strategy=_on(_this_node(), soft=True)).remote()
    tasks: dict[Any, Cell] = {}
    for cell in pending:
        training = ablations[cell.ablation].training
        on_slots: Any = ray.remote(_run_cell).options(
            num_cpus=training.threads,
            num_gpus=1 if gpus and training.accelerator != "cpu" else 0,
            max_retries=RETRIES,
            name=str(cell),
        )
        tasks[on_slots.remote(cell, shared, str(folder), tuple(trackers), mailbox)] = cell

    under_way: dict[str, Cell] = {}
    told = False
    try:
        while tasks:
            ended, _ = ray.wait(list(tasks), timeout=SECONDS_BETWEEN_NEWS)
            asked = stop.asked
            for cell, *news in ray.get(mailbox.collect.remote(asked)):
                if not news and cell.id not in under_way:  # else: it goes on elsewhere, its machine was lost
                    under_way[cell.id] = cell
                    events.start(cell)
                elif news and cell.id in under_way:
                    events.step(cell, *news)
            if asked and not told:
                told = True
                for task, cell in tasks.items():
                    if cell.id not in under_way:
                        ray.cancel(task)
            for task in ended:
                cell = tasks.pop(task)
                try:
                    kind, content = ray.get(task)
                except ray.exceptions.TaskCancelledError:
                    continue
                except ray.exceptions.RayTaskError:  # a fault of ours
                    raise
                except ray.exceptions.RayError as error:
                    reason = f"the process of this run was lost {RETRIES + 1} times ({type(error).__name__})"
                    kind, content = "done", origin(cell) | {"status": "failed", "reason": reason}
                if kind == "fatal":
                    raise content
                if kind == "done":
                    if cell.id not in under_way:
                        events.start(cell)
                    events.done(cell, content)
                under_way.pop(cell.id, None)
    finally:
        for task in tasks:
            ray.cancel(task, force=True)
        ray.kill(mailbox)
    if stop.asked:
        raise Interrupted


class _Mailbox:
    """An actor between the cells and the process that was called: news one way, the wish to stop the other."""

    def __init__(self) -> None:
        self.stopping = False
        self.news: list[tuple[Any, ...]] = []

    def tell(self, cell: Cell, *progress: float) -> bool:
        """A cell begins (no progress), or has done a step with a loss. Returns whether it should stop."""
        self.news.append((cell, *progress))
        return self.stopping

    def collect(self, stopping: bool) -> list[tuple[Any, ...]]:
        """What was told since the last time."""
        self.stopping = stopping
        news, self.news = self.news, []
        return news


class _Listener:
    """Tells the mailbox about a run now and then, without waiting for its answer between two steps."""

    def __init__(self, cell: Cell, mailbox: Any):
        self.cell, self.mailbox = cell, mailbox
        self.progress: tuple[int, float] | None = None
        self.answer: Any = None
        self.next = time.monotonic()
        self.stopping = False

    def step(self, step: int, loss: float) -> None:
        self.progress = step, loss

    def stop(self) -> bool:
        import ray

        if self.answer is not None:
            if ray.wait([self.answer], timeout=0)[0]:
                self.stopping, self.answer = ray.get(self.answer), None
        elif self.progress is not None and time.monotonic() >= self.next:
            self.next = time.monotonic() + SECONDS_BETWEEN_NEWS
            self.answer = self.mailbox.tell.remote(self.cell, *self.progress)
        return self.stopping


def _run_cell(
    cell: Cell, ablations: dict[str, Ablation], folder: str, trackers: tuple[str, ...], mailbox: Any
) -> tuple[str, Any]:
    import ray

    if ray.get(mailbox.tell.remote(cell)):
        return "stopped", None
    answers = _answers_for(ablations, folder, trackers)
    return answers.run(cell, _Listener(cell, mailbox))


def _answers_for(ablations: dict[str, Ablation], folder: str, trackers: tuple[str, ...]) -> Answers:
    key = (tuple((name, ablation.model_dump_json()) for name, ablation in ablations.items()), folder, trackers)
    if key not in _kept:
        _kept.clear()
        _kept[key] = Answers(ablations, Path(folder), trackers)
    return _kept[key]


_kept: dict[Any, Answers] = {}  # a worker process runs many cells; their data and parameter counts are made once


def _this_node() -> str:
    import ray

    return ray.get_runtime_context().get_node_id()


def _on(node: str, *, soft: bool) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id=node, soft=soft)


def _look(manifest: str) -> tuple[str | None, dict[str, str]]:
    """What a node sees of the results folder, and its versions."""
    try:
        seen = hashlib.sha256(Path(manifest).read_bytes()).hexdigest()
    except OSError:
        seen = None
    return seen, environment.versions()


def _check_nodes(folder: Path, ablations: dict[str, Ablation]) -> None:
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
    threads = max(ablation.training.threads for ablation in ablations.values())
    most = max((int(node["Resources"]["CPU"]) for node in nodes), default=0)
    if most < threads:
        raise ConfigError(f"training.threads is {threads}; the largest node of the Ray cluster has {most} CPU slots")
    wants = any(ablation.training.accelerator == "cuda" for ablation in ablations.values())
    if wants and not ray.cluster_resources().get("GPU", 0):
        raise ConfigError("training.accelerator is cuda, and the Ray cluster has no GPU; use auto or cpu")
    manifest = str(folder / "manifest.json")
    ours = _look(manifest)
    look: Any = ray.remote(_look)
    answers = [
        look.options(num_cpus=0, scheduling_strategy=_on(node["NodeID"], soft=False)).remote(manifest) for node in nodes
    ]
    for node, theirs in zip(nodes, ray.get(answers), strict=True):
        name = node["NodeManagerHostname"]
        if theirs[0] != ours[0]:
            raise ConfigError(
                f"the Ray node {name} doesn't see {folder}; give --out a folder on a file system that all nodes share"
            )
        if theirs[1] != ours[1]:
            packages = sorted(p for p in {*ours[1], *theirs[1]} if ours[1].get(p) != theirs[1].get(p))
            raise ConfigError(
                f"the Ray node {name} has other versions of {', '.join(packages)}; cells on it would not be comparable"
            )
