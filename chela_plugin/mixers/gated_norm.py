"""Root-mean-square normalisation of each head with a swish gate, the output stage of most linear mixers."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-5


class GatedRMSNorm(nn.Module):
    """`RMSNorm(x) * SiLU(gate)`, or `RMSNorm(x * SiLU(gate))` with `gate_first` (Mamba-2, arXiv:2405.21060, 7.1).

    Args:
        groups: how many groups are normalised apart.
        width: channels of each group; x and gate are `[..., groups * width]`.
        weight: 'shared', one of `width` for all groups (GLA, Gated DeltaNet); 'each', one for every channel (Mamba-2);
            None, no weight (RetNet).
        gate_first: gate before normalising.

    Computed in fp32 at least; returns the gate's dtype.
    """

    def __init__(
        self,
        groups: int,
        width: int,
        *,
        weight: Literal["shared", "each"] | None,
        gate_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.groups, self.width, self.gate_first = groups, width, gate_first
        shape = (1 if weight == "shared" else groups, width)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if weight else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        heads = (*x.shape[:-1], self.groups, self.width)
        swish = F.silu(gate.to(dtype)).view(heads)
        y = x.to(dtype).view(heads)
        if self.gate_first:
            y = y * swish
        y = y * (y.square().mean(-1, keepdim=True) + EPS).rsqrt()
        if self.weight is not None:
            y = y * self.weight.to(dtype)
        if not self.gate_first:
            y = y * swish
        return y.flatten(-2).to(gate.dtype)
