"""The few-tap causal depthwise convolution inside Mamba, Mamba-2 and Gated DeltaNet."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CausalConv(nn.Module):
    """`y_t = bias + sum_i weight[:, i] * x_(t - taps + 1 + i)` per channel, zeros before the row's first token.

    Args:
        channels: number of channels.
        taps: length of the filter; the last tap meets the current token.
        bias: add a learned bias.

    Written as a sum of shifted products, which makes causality plain to see and keeps the `[B, T, C]` layout. On one
    CPU core whole mixers took 0.8 to 0.9 of their time with `F.conv1d`, once 1.1
    (`benchmarks/results/plain_forms_cpu.json`).
    """

    def __init__(
        self,
        channels: int,
        taps: int = 4,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if taps < 1:
            raise ValueError(f"a causal convolution needs at least one tap, got {taps}")
        self.taps = taps
        self.weight = nn.Parameter(torch.empty(channels, taps, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within `taps^-0.5`, as `nn.Conv1d` has it."""
        bound = self.taps**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def init_state(self, batch_size: int, *, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
        """Zeros `[B, taps - 1, C]`: the inputs before the first token."""
        weight = self.weight
        return torch.zeros(
            batch_size, self.taps - 1, weight.shape[0], device=device or weight.device, dtype=dtype or weight.dtype
        )

    def forward(self, x: Tensor, state: Tensor | None = None, length: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Convolve `x` `[B, T, C]` after the inputs in `state` `[B, taps - 1, C]` (zeros when None).

        `length` `[B]`: how many tokens of each row are real; the rest, on the right, is padding (None: all are real).

        Returns `(y [B, T, C], state)`, the new state being the last `taps - 1` real inputs of each row.
        """
        past = self.taps - 1
        padded = F.pad(x, (0, 0, past, 0)) if state is None else torch.cat((state.to(x.dtype), x), dim=1)
        time = x.shape[1]
        weight = self.weight.to(x.dtype)
        y = padded[:, :time] * weight[:, 0]
        for i in range(1, self.taps):
            y = y + padded[:, i : i + time] * weight[:, i]
        if self.bias is not None:
            y = y + self.bias.to(x.dtype)
        if length is None:
            return y, padded[:, time:]
        last = length[:, None] + torch.arange(past, device=x.device)
        return y, padded.gather(1, last[..., None].expand(-1, -1, x.shape[-1]))
