"""The few-tap causal depthwise convolution inside Mamba, Mamba-2 and Gated DeltaNet."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chela_plugin.kernels.backend import computed_dtype
from chela_plugin.kernels.peers import peer


class CausalConv(nn.Module):
    """`y_t = bias + sum_i weight[:, i] * x_(t - taps + 1 + i)` per channel, zeros before the row's first token.

    Args:
        channels: number of channels.
        taps: length of the filter; the last tap meets the current token.
        bias: add a learned bias.

    Written as a sum of shifted products, which makes causality plain to see and keeps the `[B, T, C]` layout. On one
    CPU core whole mixers took 0.8 to 0.9 of their time with `F.conv1d`, once 1.1
    (`benchmarks/results/plain_forms_cpu.json`). On a CUDA device fla's kernel computes fp16 and bf16 where it is
    installed.
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
        past, time = self.taps - 1, x.shape[1]
        kernel = peer("causal_conv1d", x.device, x.dtype) if state is None else None
        if kernel is not None:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            y, _ = kernel(x, self.weight.to(x.dtype), bias)
            if length is None:
                return y, F.pad(x[:, max(time - past, 0) :], (0, 0, max(past - time, 0), 0))
            return y, self._last_inputs(F.pad(x, (0, 0, past, 0)), length)
        padded = F.pad(x, (0, 0, past, 0)) if state is None else torch.cat((state.to(x.dtype), x), dim=1)
        weight = self.weight.to(x.dtype)
        y = padded[:, :time] * weight[:, 0]
        for i in range(1, self.taps):
            y = y + padded[:, i : i + time] * weight[:, i]
        if self.bias is not None:
            y = y + self.bias.to(x.dtype)
        if length is None:
            return y, padded[:, time:]
        return y, self._last_inputs(padded, length)

    def _last_inputs(self, padded: Tensor, length: Tensor) -> Tensor:
        """The last `taps - 1` real inputs of each row, of rows with as many places before their first token."""
        last = length[:, None] + torch.arange(self.taps - 1, device=padded.device)
        return padded.gather(1, last[..., None].expand(-1, -1, padded.shape[-1]))

    def beside(self, path: str, device: torch.device | str) -> str:
        """`path` of the mixer's other part, and whether this part runs a kernel on `device`."""
        kernel = peer("causal_conv1d", device, computed_dtype(self.weight, device))
        return path if kernel is None else f"{path}, fla causal_conv1d"
