"""For recurrences: what they return and every gradient, to compare two forms of one."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def outputs_and_gradients() -> Callable[..., list[Tensor]]:
    """`outputs_and_gradients(run, tensors)`: what `run(*tensors)` returns, and the gradient of each tensor."""

    def found(run: Callable[..., tuple[Tensor, Tensor]], tensors: list[Tensor]) -> list[Tensor]:
        outputs = run(*tensors)
        torch.manual_seed(0)
        weighted = sum((x * torch.randn(x.shape, dtype=x.dtype)).sum() for x in outputs)
        return [*outputs, *torch.autograd.grad(weighted, tensors)]

    return found
