"""Batches of a split where they are needed: rows are picked on the GPU if the split fits there, else on the CPU.

Same values either way, as `Examples.batch` gives them. On a GPU, a task with many classes and few answers a sequence
(MQAR: 8,192 and 4 to 64) is told the places of its answers, so that logits are made for these alone: nothing else
counts in the loss, and logits of all places would be most of a small model's work and memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from chela_plugin.harness.tasks import IGNORE, Examples

LARGEST_ON_DEVICE = 4 << 30  # bytes of a split
MANY_CLASSES = 1024


def as_model_input(inputs: Tensor) -> Tensor:
    """Tokens are stored in few bytes and embedded as int64; images pass."""
    return inputs if inputs.is_floating_point() else inputs.long()


def lengths(examples: Examples) -> Tensor:
    """`[N]` columns up to the last that is no padding, at least 1."""
    inputs = examples.inputs.reshape(len(examples), -1, examples.inputs.shape[-1])
    found = []
    places = torch.arange(1, inputs.shape[-1] + 1, dtype=torch.int32)
    for part in inputs.split(4096):
        found.append(((part != examples.padding).any(1) * places).amax(1).clamp(min=1))
    return torch.cat(found)


def answer_places(examples: Examples) -> tuple[Tensor, Tensor]:
    """Places of each row's answers `[N, most]` int32, in order and 0 behind them, and how many there are `[N]`."""
    counted = examples.targets != IGNORE
    count = counted.sum(1)
    places = torch.zeros(len(examples), int(count.max()), dtype=torch.int32)
    row, place = counted.nonzero(as_tuple=True)
    rank = torch.arange(len(row)) - (count.cumsum(0) - count)[row]
    places[row, rank] = place.int()
    return places, count


def _runs(values: Tensor) -> list[Tensor]:
    """Row numbers, cut where the value `[N]` changes."""
    changes = (values[1:] != values[:-1]).nonzero().flatten() + 1
    return list(torch.arange(len(values)).tensor_split(changes))


class Feed:
    """Batches of a split by row numbers, picked on the CPU.

    A batch holds 'inputs', 'targets' and, where logits are wanted at some places only, 'places' into `[B * T]`; its
    targets are then those of the places.
    """

    def __init__(self, examples: Examples, device: torch.device):
        self.examples, self.device = examples, device

    def in_order(self, batch_size: int, most_logits: int) -> Iterator[Tensor]:
        """Row numbers of the whole split, in batches of at most `batch_size` rows and `most_logits` logits."""
        answers = self.examples.targets.shape[1] if self.examples.targets.ndim == 2 else 1
        size = max(1, min(batch_size, most_logits // (answers * self.examples.classes)))
        yield from torch.arange(len(self.examples)).split(size)

    def batch(self, rows: Tensor, augment: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
        """Of `rows` `[B]`, on the CPU; `augment` changes the inputs, on the CPU and before they are moved."""
        inputs, targets = self.examples.batch(rows)
        inputs = inputs if augment is None else augment(inputs)
        return {"inputs": as_model_input(inputs).to(self.device), "targets": targets.long().to(self.device)}


class ResidentFeed(Feed):
    """The same batches from a split that lies on the device: only row numbers are sent there.

    may_select: whether the model takes 'places'.
    """

    def __init__(self, examples: Examples, device: torch.device, *, may_select: bool):
        super().__init__(examples, device)
        self.inputs, self.targets = examples.inputs.to(device), examples.targets.to(device)
        self.lengths = None if examples.padding is None else lengths(examples)
        self.count: Tensor | None = None
        if may_select and examples.targets.ndim == 2 and examples.classes >= MANY_CLASSES:
            places, self.count = answer_places(examples)
            self.places = places.to(device)

    def in_order(self, batch_size: int, most_logits: int) -> Iterator[Tensor]:
        if self.count is None:
            yield from super().in_order(batch_size, most_logits)
            return
        for part in _runs(self.count):
            logits = max(1, int(self.count[part[0]])) * self.examples.classes
            yield from part.split(max(1, min(batch_size, most_logits // logits)))

    def batch(self, rows: Tensor, augment: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
        if augment is not None:
            return super().batch(rows, augment)
        there = rows.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else rows
        inputs, targets = self.inputs[there], self.targets[there]
        if self.lengths is not None:
            length = int(self.lengths[rows].max())
            inputs = inputs[..., :length]
            targets = targets[:, :length] if targets.ndim == 2 else targets
        batch = {"inputs": as_model_input(inputs)}
        if self.count is not None:
            counts = self.count[rows]
            if bool((counts == counts[0]).all()):  # one setting a batch: a shape that comes again
                starts = torch.arange(len(rows), device=self.device)[:, None] * targets.shape[1]
                batch["places"] = (self.places[there, : int(counts[0])] + starts).flatten()
                targets = targets.flatten()[batch["places"]]
        return batch | {"targets": targets.long()}


def feed_for(examples: Examples, device: torch.device, *, may_select: bool) -> Feed:
    """A split's feed: resident where it fits a GPU."""
    size = sum(t.numel() * t.element_size() for t in (examples.inputs, examples.targets))
    if device.type == "cuda" and size <= LARGEST_ON_DEVICE:
        return ResidentFeed(examples, device, may_select=may_select)
    return Feed(examples, device)


def forward(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits and their targets."""
    if "places" in batch:
        return model(batch["inputs"], batch["places"]), batch["targets"]
    return model(batch["inputs"]), batch["targets"]
