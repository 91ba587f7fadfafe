"""Tasks: pure functions from (config, split) to tensors.

A new task is one file here, with `examples(config, split)` and optionally `augment(config, inputs, generator)`, and one
class in `chela_plugin.harness.task_configs`.
"""

from __future__ import annotations

import hashlib
import importlib
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from chela_plugin.harness.task_configs.base import TaskConfig

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
IGNORE = -100  # a target that is not counted


@dataclass(frozen=True)
class Examples:
    """One split of a task.

    inputs: `[N, C, H, W]` floating-point images; `[N, T]` integer tokens, or `[N, 2, T]` pairs of them; `[N, T, C]`
        floating-point signals.
    targets: `[N]` class indices, or `[N, T]` the token to predict at each place; IGNORE where none is.
    classes: how many classes or vocabulary entries there are to choose from.
    metric: 'accuracy' (share of targets, larger is better) or 'bits_per_byte' (smaller is better).
    vocabulary: how many token ids the inputs hold, where that isn't `classes`.
    padding: the token id that stands behind (or before) shorter sequences and is no part of them.
    buckets: `[N]` integers; a training batch is drawn from one bucket, so that lengths in it are alike.
    slices: names of parts whose metric is also told apart, and `slice_of` `[N]`: the part of each example.
    other_sizes: the same images `[N, C, H', W']` at sizes for which a model was not trained.
    """

    inputs: Tensor
    targets: Tensor
    classes: int
    metric: Literal["accuracy", "bits_per_byte"]
    vocabulary: int | None = None
    padding: int | None = None
    buckets: Tensor | None = None
    slices: tuple[str, ...] = ()
    slice_of: Tensor | None = None
    other_sizes: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Inputs and targets of some rows, without the columns at the end in which all of them are padding."""
        inputs, targets = self.inputs[rows], self.targets[rows]
        if self.padding is None:
            return inputs, targets
        used = (inputs != self.padding).reshape(-1, inputs.shape[-1]).any(0).nonzero()
        length = int(used[-1]) + 1 if len(used) else 1
        return inputs[..., :length], targets[:, :length] if targets.ndim == 2 else targets

    def sha256(self) -> str:
        """Of shapes, types and contents: equal for equal data on any machine of the same byte order."""
        state = hashlib.sha256()
        for tensor in (self.inputs, self.targets, self.buckets, self.slice_of):
            if tensor is not None:
                state.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
                state.update(tensor.contiguous().numpy().tobytes())
        return state.hexdigest()


def examples(config: TaskConfig, split: Split) -> Examples:
    """The examples of one split; equal arguments give equal tensors.

    Raises DataError where files that the task reads are missing or damaged.
    """
    return _module(config).examples(config, split)


def augments(config: TaskConfig) -> bool:
    """Whether the task changes its training batches."""
    return hasattr(_module(config), "augment")


def augment(config: TaskConfig, inputs: Tensor, generator: torch.Generator) -> Tensor:
    """A training batch as the model sees it; the generator alone decides what is random."""
    change = getattr(_module(config), "augment", None)
    return inputs if change is None else change(config, inputs, generator)


def prepare(config: TaskConfig) -> None:
    """Generate what is to be cached, or look whether files are there: an error comes now and not in every run.

    Raises DataError as `examples` does.
    """
    for split in ("train", "validation") if config.generated else ("validation",):
        examples(config, split)  # type: ignore[arg-type]


def _module(config: TaskConfig) -> Any:
    """The module that makes a task's tensors, imported on first use."""
    return importlib.import_module(f"{__name__}.{config.module}")
