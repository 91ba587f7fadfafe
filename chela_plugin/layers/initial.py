"""How CHELA and the other mixers start: alike where they can, so that comparisons don't measure it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


@torch.no_grad()
def reset_projections(*inner: nn.Linear, output: nn.Linear, depth: int | None) -> None:
    """GPT-2's start: normal weights of deviation 0.02, the output's times `(2 depth)^-0.5`; biases are zero.

    It is also what transformers and timm give every other layer of the hosts. `depth` is the host's number of blocks,
    None where it isn't known.
    """
    for linear in (*inner, output):
        nn.init.normal_(linear.weight, std=0.02)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
    if depth is not None:
        output.weight.mul_((2 * depth) ** -0.5)


@torch.no_grad()
def log_uniform_step_bias(bias: Tensor) -> None:
    """Fill `bias` so that `softplus(bias)` is log-uniform between 0.001 and 0.1.

    The step sizes of Mamba (arXiv:2312.00752, section 3.6) and, unchanged, Mamba-2 and Gated DeltaNet.
    """
    step = torch.empty_like(bias, dtype=torch.float32)
    step.uniform_(math.log(0.001), math.log(0.1)).exp_()
    bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus


def decay_init(rows: int, shortest: float, longest: float, device=None) -> Tensor:
    """Time constants in tokens, log-spaced over the rows: the rows look back over different ranges from the start."""
    return torch.logspace(math.log10(shortest), math.log10(longest), rows, device=device)


def no_weight_decay(parameter: nn.Parameter) -> nn.Parameter:
    """Mark a parameter that weight decay must leave alone (the mark that Mamba's code uses)."""
    parameter._no_weight_decay = True  # type: ignore[attr-defined]  # optimiser factories look for this name
    return parameter
