"""One update of a model's weights, and its replay from a CUDA graph: a small model's step waits for launches otherwise.

A graph holds the very launches of the eager step, with the tensors of the batch copied in and the learning rate read
from memory. Forward, backward, clipping and optimiser are in it, so a replay costs the host one launch a step whatever
the mixer, and no mixer is at an advantage for launching less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from chela_plugin.harness.backbones import loss_sum
from chela_plugin.harness.tasks import IGNORE

EAGER_STEPS = 4  # of each shape before its capture: kernels compile and search, the optimiser makes its state
MOST_GRAPHS = 12  # each keeps the activations of its shape; other shapes run eagerly


def adamw(model: nn.Module, weight_decay: float, device: torch.device | None = None) -> torch.optim.AdamW:
    """AdamW without decay on vectors (norms, biases) and on parameters that carry `_no_weight_decay = True`.

    For a CUDA `device` the update is one fused kernel whose learning rate is a tensor, which a graph can read anew.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            free = parameter.ndim <= 1 or getattr(parameter, "_no_weight_decay", False)
            (kept if free else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    on_cuda = device is not None and device.type == "cuda"
    rate: float | Tensor = torch.zeros((), device=device) if on_cuda else 0.0
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=rate,
        betas=(0.9, 0.95),
        fused=True if on_cuda else None,
        capturable=on_cuda,
    )


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """For the next update; in place where the rate is a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


class NotCapturable(RuntimeError):
    """A step that can't be a CUDA graph. The process is done for: a broken capture leaves its random state captured."""


def record(step: Callable[[], Tensor], stream: Any, pool: Any) -> tuple[Any, Tensor]:
    """A graph of `step`'s launches, none of which is done now, and the tensor into which a replay puts its result.

    Graphs of one `pool` share their memory: no two may run at once, and a result is gone with the next replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, pool=pool):
        result = step()
    return graph, result


class Update:
    """`loss = update(batch)`: one step on a batch of named tensors, launched or replayed.

    Args:
        fabric: Lightning Fabric of one device.
        model, optimizer: as Fabric has set them up.
        clip: largest norm of the gradient.
        forward: from the model and a batch to logits and their targets.
        graphs: whether steps are captured; on a device that is not CUDA they never are.
    """

    def __init__(
        self,
        fabric: Any,
        model: nn.Module,
        optimizer: Any,
        clip: float,
        forward: Callable[[nn.Module, dict[str, Tensor]], tuple[Tensor, Tensor]],
        *,
        graphs: bool,
    ):
        self.fabric, self.model, self.optimizer, self.clip, self.forward = fabric, model, optimizer, clip, forward
        self.on = graphs and fabric.device.type == "cuda"
        self.stream = torch.cuda.Stream(fabric.device) if self.on else None
        self.pool = torch.cuda.graph_pool_handle() if self.on else None
        self.seen: dict[tuple[Any, ...], int] = {}
        self.captured: dict[tuple[Any, ...], tuple[Any, dict[str, Tensor], Tensor]] = {}
        self.replayed = 0  # steps

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around a whole run: a graph must be captured on the stream on which its eager steps ran."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream().wait_stream(self.stream)

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """The batch's mean loss before the update, a tensor on the device. Raises NotCapturable."""
        if not self.on:
            return self._step(batch)
        shape = tuple((name, tuple(tensor.shape)) for name, tensor in batch.items())
        if shape not in self.captured:
            self.seen[shape] = self.seen.get(shape, 0) + 1
            if self.seen[shape] <= EAGER_STEPS or len(self.captured) >= MOST_GRAPHS:
                return self._step(batch)
            self._capture(shape, batch)
        graph, inputs, loss = self.captured[shape]
        for name, tensor in batch.items():
            inputs[name].copy_(tensor)
        graph.replay()
        torch.autograd.graph.increment_version(self.model.parameters())  # a replay is no operation that autograd sees
        self.replayed += 1
        return loss.clone()

    def _capture(self, shape: tuple[Any, ...], batch: dict[str, Tensor]) -> None:
        inputs = {name: tensor.clone() for name, tensor in batch.items()}
        try:
            graph, loss = record(lambda: self._step(inputs), self.stream, self.pool)
        except Exception as error:  # an operation that reads a number back, or a library that can't be captured
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            raise NotCapturable(
                f"its step can't be captured as a CUDA graph ({reason}); the same command with "
                "training.cuda_graph=false tries it again, launched step by step"
            ) from error
        self.captured[shape] = graph, inputs, loss

    def _step(self, batch: dict[str, Tensor]) -> Tensor:
        self.optimizer.zero_grad()  # first, so that a capture makes gradients of its own
        logits, targets = self.forward(self.model, batch)
        loss = loss_sum(logits, targets) / (targets != IGNORE).sum()
        self.fabric.backward(loss)
        self.fabric.clip_gradients(self.model, self.optimizer, max_norm=self.clip, error_if_nonfinite=False)
        self.optimizer.step()
        return loss.detach()
