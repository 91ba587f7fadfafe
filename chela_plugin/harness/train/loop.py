"""The training loop that language and image runs share: micro-batches, checkpoints, metrics, stopping.

Nothing random is carried from step to step: the batch, augmentation and dropout of step t follow from (seed, t), so a
checkpoint is weights, optimiser and a step number, and a run that went on ends bit for bit as an undisturbed one on
the same machine, strategy and number of devices.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from chela_plugin.harness.config import canonical_json
from chela_plugin.harness.data_order import generator
from chela_plugin.harness.results import write_atomically
from chela_plugin.harness.train.checkpoint import (
    RunFolder,
    Tensors,
    load_model,
    load_optimizer,
    model_tensors,
    optimizer_tensors,
)
from chela_plugin.harness.train.config import Run
from chela_plugin.harness.training import Diverged, Interrupted

UNTIMED_STEPS = 3  # the first steps of a process allocate, autotune and compile; rates leave them out


class Work(Protocol):
    """What a language run and an image run do differently."""

    model: nn.Module  # unwrapped; its parameters are sharded under FSDP
    wrapped: Any  # what Fabric made of it
    optimizer: Any
    steps: int
    micro_batches: int  # a step and process
    gradient_clip: float | None
    unit: str  # 'tokens' or 'images'
    units_per_step: int  # all processes together
    flops_per_unit: float

    def set_rate(self, step: int) -> float:
        """Set and return the learning rate of step `step` (from 0)."""

    def start(self, step: int) -> None:
        """Steps from `step` on will be asked for."""

    def loss(self, step: int, micro: int) -> Tensor:
        """The mean loss of this process's micro-batch."""

    def stepped(self, step: int) -> None:
        """`step` steps are done."""

    def due(self, step: int) -> bool:
        """Whether the validation split is read after `step` steps."""

    def evaluate(self) -> dict[str, float]:
        """The validation split's numbers; every process calls it and gets the same."""

    def extra_tensors(self, keep: bool) -> Tensors:
        """What belongs in a checkpoint besides model and optimiser."""

    def load_extra(self, tensors: Tensors) -> None:
        """Takes back what `extra_tensors` gave."""


class Display(Protocol):
    """Where a person sees how it goes."""

    def step(self, step: int, values: dict[str, float]) -> None:
        """`step` steps are done."""

    def line(self, text: str) -> None:
        """A message of its own."""


def seed_all(*key: int | str) -> None:
    """Every generator that a model or timm draws from, as a function of `key`."""
    seed = int(torch.randint(2**31, (), generator=generator(*key)))
    torch.manual_seed(seed)
    np.random.seed(seed)  # timm's Mixup draws from NumPy's global generator
    random.seed(seed)


class Metrics:
    """metrics.jsonl and TensorBoard, written by rank 0. Lines behind the step where a run goes on are taken back."""

    def __init__(self, folder: RunFolder, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder.path / "metrics.jsonl"
        if self.path.exists():
            kept = []
            for line in self.path.read_bytes().splitlines(keepends=True):
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
                except (ValueError, KeyError, TypeError):
                    break  # a kill in the middle of a line
            write_atomically(self.path, b"".join(kept))
        self.board = SummaryWriter(str(folder.path / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        with open(self.path, "ab") as file:
            file.write((canonical_json({"step": step} | values) + "\n").encode())
            file.flush()
        for name, value in values.items():
            if isinstance(value, int | float):
                self.board.add_scalar(name, value, step)

    def sync(self) -> None:
        """On disk, so that no checkpoint is newer than its metrics."""
        if self.path.exists():
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        self.board.close()


def train(
    work: Work,
    run: Run,
    folder: RunFolder,
    fabric: Any,
    display: Display,
    stopping: Callable[[], bool],
    peak: float | None,
) -> None:
    """Train to the end, from wherever the folder's last checkpoint stands.

    Every process of the run calls it; `stopping` is asked in rank 0 only, after every step where there is one process,
    else every `log_every` steps, since all must agree. Raises Diverged, Interrupted (after saving).
    """
    main, world = fabric.global_rank == 0, fabric.world_size
    step = 0
    saved = folder.load()
    if saved is not None:
        tensors, optimizer, state = saved
        extra = {n.removeprefix("extra//"): t for n, t in tensors.items() if n.startswith("extra//")}
        load_model(work.model, {n: t for n, t in tensors.items() if not n.startswith("extra//")})
        load_optimizer(work.model, work.optimizer.optimizer, optimizer)
        work.load_extra(extra)
        step = state["step"]
        if main and step < work.steps:
            display.line(f"going on from step {step}")
    metrics = Metrics(folder, step) if main else None
    earlier: list[float] = [] if saved is None else saved[2]["losses"]  # of steps that no line of metrics covers yet
    losses: list[Tensor] = []  # likewise, and this process's alone

    def gathered() -> list[float]:
        """All open losses, means over the processes."""
        here = fabric.all_reduce(torch.stack(losses), reduce_op="mean").tolist() if losses else []
        losses.clear()
        return earlier + here

    def save(step: int) -> None:
        earlier[:] = gathered()
        weights = model_tensors(work.model, main)
        weights |= {f"extra//{name}": tensor for name, tensor in work.extra_tensors(main).items()}
        moments = optimizer_tensors(work.model, work.optimizer.optimizer, main)
        if metrics is not None:
            metrics.sync()
            folder.save(step, weights, moments, {"step": step, "losses": earlier})
        fabric.barrier()

    last_save, begun, timed_from = time.monotonic(), step, step
    since = time.perf_counter()
    work.start(step)
    work.wrapped.train()
    try:
        while step < work.steps:
            rate = work.set_rate(step)
            total = torch.zeros((), device=fabric.device)
            for micro in range(work.micro_batches):
                seed_all("dropout", run.seed, step, micro, fabric.global_rank)
                last = micro == work.micro_batches - 1
                with fabric.no_backward_sync(work.wrapped, enabled=not last):
                    loss = work.loss(step, micro) / work.micro_batches
                    fabric.backward(loss)
                total += loss.detach()
            if work.gradient_clip is not None:
                fabric.clip_gradients(
                    work.wrapped, work.optimizer, max_norm=work.gradient_clip, error_if_nonfinite=False
                )
            work.optimizer.step()
            work.optimizer.zero_grad()
            step += 1
            work.stepped(step)
            losses.append(total)
            end = step == work.steps
            if step - begun == UNTIMED_STEPS:
                _wait(fabric.device)
                since, timed_from = time.perf_counter(), step
            stop = save_now = False
            if world == 1:
                stop = stopping()
            if step % run.log_every == 0 or end:
                open_losses = gathered()
                earlier.clear()
                mean = math.fsum(open_losses) / len(open_losses)
                if not math.isfinite(mean):
                    raise Diverged(f"the training loss is {mean} by step {step}; try a smaller learning rate")
                values: dict[str, float] = {"loss": mean, "learning_rate": rate}
                if step > timed_from:
                    _wait(fabric.device)
                    speed = (step - timed_from) * work.units_per_step / (time.perf_counter() - since)
                    values[f"{work.unit}_per_second"] = speed
                    if peak is not None:
                        values["mfu"] = speed * work.flops_per_unit / (peak * world)
                    since, timed_from = time.perf_counter(), step
                if metrics is not None:
                    metrics.write(step, values)
                    display.step(step, values)
                if world > 1:
                    stop = fabric.broadcast(stopping() if main else None)
            seconds, every = run.checkpoints.seconds, run.checkpoints.steps
            if every is not None and step % every == 0:
                save_now = True
            elif seconds is not None and (world == 1 or step % run.log_every == 0):
                late = time.monotonic() - last_save >= seconds
                save_now = late if world == 1 else fabric.broadcast(late if main else None)
            if end or work.due(step):
                found = work.evaluate()
                work.wrapped.train()
                if metrics is not None:
                    metrics.write(step, found)
                    display.line(f"step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in found.items()))
                since, timed_from = time.perf_counter(), step
            if stop or save_now or end:
                save(step)
                last_save = time.monotonic()
                since, timed_from = time.perf_counter(), step
            if stop and not end:
                raise Interrupted
    finally:
        if metrics is not None:
            metrics.close()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
