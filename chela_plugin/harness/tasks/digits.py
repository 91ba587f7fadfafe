"""scikit-learn's handwritten digits (Alpaydin & Kaynak, UCI 1998): 1,797 images of 8 x 8 pixels, 16 grey levels."""

from __future__ import annotations

import torch
from torch import Tensor

from chela_plugin.harness.extras import need
from chela_plugin.harness.task_configs.builtin import DigitsTask
from chela_plugin.harness.tasks import Examples, Split


def examples(config: DigitsTask, split: Split) -> Examples:
    """Stratified 60/20/20: inputs `[N, 1, 8, 8]` in [-1, 1], targets `[N]` in 0..9."""
    need("sklearn", "harness")
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    inputs = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 8 - 1
    targets = torch.from_numpy(labels).long()
    rows = torch.tensor(split_rows(targets.tolist(), config.split_seed)[split])
    return Examples(inputs[rows], targets[rows], classes=10, metric="accuracy")


def augment(config: DigitsTask, inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Moved by up to `config.max_shift` pixels."""
    return shift(inputs, config.max_shift, generator)


def split_rows(labels: list[int], seed: int) -> dict[Split, list[int]]:
    """Row numbers of the three splits; every class is cut 60/20/20, each row is in one split."""
    generator = torch.Generator().manual_seed(seed)
    rows: dict[Split, list[int]] = {"train": [], "validation": [], "test": []}
    for label in sorted(set(labels)):
        members = torch.tensor([i for i, other in enumerate(labels) if other == label])
        members = members[torch.randperm(len(members), generator=generator)]
        held = len(members) // 5
        rows["test"] += members[:held].tolist()
        rows["validation"] += members[held : 2 * held].tolist()
        rows["train"] += members[2 * held :].tolist()
    return {split: sorted(members) for split, members in rows.items()}


def shift(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Move each image of `[B, C, H, W]` by up to `most` pixels in either axis; what comes in is the edge repeated."""
    if most == 0:
        return images
    b, _, h, w = images.shape
    padded = torch.nn.functional.pad(images, [most] * 4, mode="replicate")
    down, right = torch.randint(0, 2 * most + 1, (2, b, 1), generator=generator)
    rows = (down + torch.arange(h))[:, None, :, None]
    columns = (right + torch.arange(w))[:, None, None, :]
    return padded[
        torch.arange(b)[:, None, None, None], torch.arange(images.shape[1])[None, :, None, None], rows, columns
    ]
