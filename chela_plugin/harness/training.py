"""One run: a model of one mixer, trained at one learning rate from one seed. Resumes bit for bit on the same machine.

Nothing random is carried from step to step: batch, augmentation and dropout of step t follow from (seed, t). A
checkpoint is therefore weights, optimiser and counters, and an interrupted run ends as an undisturbed one does.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from chela_plugin.harness.backbones import Logits, bits, loss_sum
from chela_plugin.harness.config import ConfigError, Training
from chela_plugin.harness.data_order import batch_rows, bucket_rows, generator
from chela_plugin.harness.extras import need
from chela_plugin.harness.feed import feed_for, forward
from chela_plugin.harness.grid import score_rank
from chela_plugin.harness.results import ResultsError, load_tensors, save_tensors
from chela_plugin.harness.tasks import IGNORE, Examples
from chela_plugin.harness.update import Update, adamw, set_learning_rate

EVALUATED_LOGITS = 2**28  # at once, 1 GiB in float32: test sequences may be longer than those trained on
UNTIMED_STEPS = 3  # the first steps of a process allocate, autotune and compile; tokens/s leaves them out


class Diverged(RuntimeError):
    """The loss is no longer a finite number."""


class Interrupted(Exception):
    """The run was asked to stop, and has saved where it stands."""


class Watcher(Protocol):
    """What a run tells while it goes on."""

    def step(self, step: int, loss: float) -> None:
        """`step` steps are done; `loss` is the last batch's."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Values for the curves."""

    def stop(self) -> bool:
        """Whether to save and stop now."""


@dataclass(frozen=True)
class Score:
    """A split's result: the metric, and the mean loss in nats that breaks its ties."""

    metric: float
    loss: float
    slices: dict[str, float] = field(default_factory=dict)  # accuracy of each part of the split that has a name

    def rank(self, metric: str) -> tuple[float, float]:
        """Larger is better."""
        return score_rank(metric, self.metric, self.loss)


@dataclass
class Progress:
    """Where a run stands: all that a checkpoint holds besides tensors."""

    step: int = 0
    best_step: int = -1
    seconds: float = 0.0  # of training steps, evaluation and checkpoints left out
    timed_steps: int = 0
    timed_seconds: float = 0.0
    replayed: int = 0  # steps from a CUDA graph
    peak_bytes: int | None = None  # CUDA allocator; a CPU process has no such figure of its own
    # Digests of what all steps so far were given: rows of the training split, and the schedule as a share of its peak.
    # None after a checkpoint of a version that kept none.
    order: str | None = ""
    schedule: str | None = ""
    history: dict[str, list[float]] = field(
        default_factory=lambda: {"step": [], "seconds": [], "train_loss": [], "validation": [], "validation_loss": []}
    )


def learning_rate_at(step: int, peak: float, config: Training) -> float:
    """Linear from 0 over `warmup_steps`, then a cosine from `peak` to a tenth of it at the last step."""
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def chained(before: str | None, step: bytes) -> str | None:
    """The digest of a sequence of steps, from the digest of all before the last and the last one."""
    return None if before is None else hashlib.sha256(before.encode() + step).hexdigest()[:16]


@torch.no_grad()
def evaluate(model: nn.Module, data: Examples, batch_size: int, device: torch.device) -> Score:
    """Metric and loss of a whole split, in its own order."""
    model.eval()
    feed = feed_for(data, device, may_select=isinstance(getattr(model, "module", model), Logits))
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # nats, answers
    right_of, answers_of = [], []  # each example's right answers and its answers
    for rows in feed.in_order(batch_size, EVALUATED_LOGITS):
        batch = feed.batch(rows)
        logits, targets = forward(model, batch)
        counted = targets != IGNORE
        sums += torch.stack((loss_sum(logits, targets).double(), counted.sum().double()))
        right_of.append((logits.argmax(-1) == targets).reshape(len(rows), -1).sum(1))
        answers_of.append(counted.reshape(len(rows), -1).sum(1))
    nats, count = sums.tolist()
    parts = torch.zeros(2, max(1, len(data.slices)), dtype=torch.float64)  # right answers and answers of each slice
    of = torch.zeros(len(data)) if data.slice_of is None else data.slice_of
    parts.index_add_(1, of.long(), torch.stack((torch.cat(right_of), torch.cat(answers_of))).double().cpu())
    model.train()
    slices = {name: (parts[0, i] / parts[1, i]).item() for i, name in enumerate(data.slices) if parts[1, i] > 0}
    accuracy = (parts[0].sum() / parts[1].sum()).item()
    return Score(accuracy if data.metric == "accuracy" else bits(nats / count), nats / count, slices)


@contextmanager
def reproducible(threads: int) -> Iterator[None]:
    """Deterministic algorithms (an operation that has none warns and runs) on a fixed number of CPU threads.

    The number of threads decides the order of sums, so results depend on it in their last bits.
    """
    deterministic: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    threads_before, fill_before = torch.get_num_threads(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_num_threads(threads)
    deterministic.fill_uninitialized_memory = False  # one more launch for every tensor that is made
    try:
        yield
    finally:
        deterministic.fill_uninitialized_memory = fill_before
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.set_num_threads(threads_before)


def new_fabric(config: Training) -> Any:
    """Lightning Fabric for one device. Raises ConfigError where the device is not there."""
    need("lightning", "harness")
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments import LightningEnvironment

    if config.accelerator == "cuda" and not torch.cuda.is_available():
        raise ConfigError("training.accelerator is cuda, and torch sees no CUDA device; use auto or cpu")
    accelerator = "cuda" if config.accelerator == "auto" and torch.cuda.is_available() else config.accelerator
    fabric = Fabric(
        accelerator="cpu" if accelerator == "auto" else accelerator,
        devices=1,
        precision=config.precision,
        plugins=LightningEnvironment(),  # else it looks for a cluster, and where mpi4py is installed that starts MPI
    )
    fabric.launch()
    return fabric


def run(
    build: Callable[[], nn.Module],
    train: Examples,
    validation: Examples,
    augment: Callable[..., Tensor] | None,
    config: Training,
    *,
    learning_rate: float,
    seed: int,
    folder: Path,
    checkpoint_seconds: float,
    fabric: Any,
    watcher: Watcher,
) -> Progress:
    """Train, or go on where the last checkpoint in `folder` stands; leaves the best weights in `best.safetensors`.

    "Best" is by the validation split, read every `evaluate_every` steps and at the end. Raises Diverged, Interrupted
    (after saving), ResultsError for a checkpoint that is damaged or of another run, and whatever the model raises.
    """
    torch.manual_seed(seed)
    plain = build()
    device = fabric.device
    optimizer = adamw(plain, config.weight_decay, device)
    checkpoint = folder / "run.safetensors"
    progress = Progress()
    best: dict[str, Tensor] = {}
    losses: list[Tensor] = []  # since the last reading of the validation split
    may_select = isinstance(plain, Logits)
    model, optimizer = fabric.setup(plain, optimizer)
    saved = load_tensors(checkpoint)
    if saved is not None:
        try:
            progress, best, losses = _restore(plain, optimizer, *saved)
        except (RuntimeError, KeyError, ValueError, TypeError) as error:
            raise ResultsError(
                f"{checkpoint} is of another run than this one ({error}); remove it to start this run over"
            ) from error
    feed = feed_for(train, device, may_select=may_select)
    update = Update(fabric, model, optimizer, config.gradient_clip, forward, graphs=config.cuda_graph)
    clock = _Clock(progress, device)
    model.train()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    with update.running():
        last_save = last_said = time.monotonic()
        while progress.step < config.steps:
            step = progress.step
            clock.start()
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator("dropout", seed, step))))
            if train.buckets is None:
                rows = batch_rows(len(train), config.batch_size, seed, step)
            else:
                rows = bucket_rows(train.buckets, config.batch_size, seed, step)
            change = None if augment is None else partial(augment, generator=generator("augment", seed, step))
            batch = feed.batch(rows, change)
            set_learning_rate(optimizer, learning_rate_at(step, learning_rate, config))
            progress.order = chained(progress.order, rows.numpy().tobytes())
            # 6 digits: the same on machines whose cosines differ in the last bit
            progress.schedule = chained(progress.schedule, f"{learning_rate_at(step, 1.0, config):.6g}".encode())
            losses.append(update(batch))
            progress.step += 1
            clock.stepped()
            last = progress.step == config.steps
            # Reading a loss waits for the device, so a GPU is asked by the clock.
            due = progress.step % 10 == 0 if device.type == "cpu" else time.monotonic() - last_said >= 1.0
            if due or last:
                watcher.step(progress.step, losses[-1].item())
                last_said = time.monotonic()
            if progress.step % config.evaluate_every == 0 or last:
                clock.stop()
                read = finite(losses, progress.step)
                mean_loss, losses = math.fsum(read) / len(read), []
                score = evaluate(model, validation, config.batch_size, device)
                if not math.isfinite(score.loss):
                    raise Diverged(f"the validation loss is {score.loss} at step {progress.step}")
                values = {"seconds": progress.seconds, "train_loss": mean_loss}
                values |= {"validation": score.metric, "validation_loss": score.loss}
                for name, value in ({"step": progress.step} | values).items():
                    progress.history[name].append(value)
                rate = learning_rate_at(step, learning_rate, config)
                watcher.scalars(progress.step, values | {"learning_rate": rate})
                if progress.best_step < 0 or score.rank(train.metric) > _best_score(progress).rank(train.metric):
                    progress.best_step = progress.step
                    best = {name: tensor.detach().cpu().clone() for name, tensor in plain.state_dict().items()}
            stopping = watcher.stop()
            if stopping or time.monotonic() - last_save >= checkpoint_seconds or last:
                clock.stop()
                if device.type == "cuda":
                    progress.peak_bytes = max(progress.peak_bytes or 0, torch.cuda.max_memory_allocated(device))
                progress.replayed, update.replayed = progress.replayed + update.replayed, 0
                state = vars(progress) | {"losses": finite(losses, progress.step)}
                save_tensors(checkpoint, _tensors(plain, optimizer, best), state)
                last_save = time.monotonic()
            if stopping and not last:
                raise Interrupted
    save_tensors(folder / "best.safetensors", best, {"step": progress.best_step})
    return progress


def _best_score(progress: Progress) -> Score:
    row = progress.history["step"].index(progress.best_step)
    return Score(progress.history["validation"][row], progress.history["validation_loss"][row])


def finite(losses: list[Tensor], step: int) -> list[float]:
    """The losses as numbers, in one transfer from the device. Raises Diverged if one is not finite."""
    values = torch.stack(losses).double().tolist() if losses else []
    for value in values:
        if not math.isfinite(value):
            raise Diverged(f"the training loss is {value} by step {step}; try a smaller learning rate")
    return values


def _tensors(model: nn.Module, optimizer: Any, best: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything of a checkpoint that is a tensor, by a name that says where it belongs."""
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"best/{name}": tensor for name, tensor in best.items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{number}/{name}": tensor for name, tensor in state.items()}
    return tensors


def _restore(
    model: nn.Module, optimizer: Any, tensors: dict[str, Tensor], state: dict[str, Any]
) -> tuple[Progress, dict[str, Tensor], list[Tensor]]:
    """Load model and optimiser from a checkpoint; returns where the run stands, its best weights, its open losses."""

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    model.load_state_dict(part("model/"))
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in part("optimizer/").items():
        number, _, key = name.partition("/")
        moments.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    device = next(model.parameters()).device
    losses = [torch.tensor(value, device=device) for value in state.pop("losses")]
    state = {"order": None, "schedule": None} | state
    return Progress(**state), part("best/"), losses


class _Clock:
    """Seconds of training steps, with the device's queue drained at start and stop only."""

    def __init__(self, progress: Progress, device: torch.device):
        self.progress, self.device = progress, device
        self.since: float | None = None
        self.steps_here = 0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def start(self) -> None:
        if self.since is None:
            self.since = self._now()
            self.segment_steps = 0

    def stepped(self) -> None:
        self.steps_here += 1
        self.segment_steps += 1
        if self.steps_here <= UNTIMED_STEPS:
            self.stop(timed=False)

    def stop(self, *, timed: bool = True) -> None:
        if self.since is not None:
            passed = self._now() - self.since
            self.progress.seconds += passed
            if timed:
                self.progress.timed_seconds += passed
                self.progress.timed_steps += self.segment_steps
            self.since = None
