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

    inputs: `[N, C, H, W]` float32 images, or `[N, T]` integer tokens.
    targets: `[N]` class indices, or `[N, T]` the token to predict at each place; IGNORE where none is.
    classes: how many classes or vocabulary entries there are.
    metric: 'accuracy' (share of targets, larger is better) or 'bits_per_byte' (smaller is better).
    """

    inputs: Tensor
    targets: Tensor
    classes: int
    metric: Literal["accuracy", "bits_per_byte"]

    def __len__(self) -> int:
        return len(self.inputs)

    def sha256(self) -> str:
        """Of shapes, types and contents: equal for equal data on any machine of the same byte order."""
        state = hashlib.sha256()
        for tensor in (self.inputs, self.targets):
            state.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
            state.update(tensor.contiguous().numpy().tobytes())
        return state.hexdigest()


def examples(config: TaskConfig, split: Split) -> Examples:
    """The examples of one split; equal arguments give equal tensors.

    Raises DataError where files that the task reads are missing or damaged.
    """
    return _module(config).examples(config, split)


def augment(config: TaskConfig, inputs: Tensor, generator: torch.Generator) -> Tensor:
    """A training batch as the model sees it; the generator alone decides what is random."""
    change = getattr(_module(config), "augment", None)
    return inputs if change is None else change(config, inputs, generator)


def _module(config: TaskConfig) -> Any:
    """The module that makes a task's tensors, imported on first use."""
    return importlib.import_module(f"{__name__}.{config.module}")
