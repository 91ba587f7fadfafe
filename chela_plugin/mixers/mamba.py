"""Mamba (arXiv:2312.00752)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chela_plugin.kernels.precision import precise
from chela_plugin.kernels.selective_scan import selective_scan, selective_scan_step
from chela_plugin.layers.causal_conv import CausalConv
from chela_plugin.layers.initial import log_uniform_step_bias, no_weight_decay
from chela_plugin.layers.mixer import Cache
from chela_plugin.mixers.heads import expanded
from chela_plugin.mixers.recurrent import ConvolvedMixer, recur


class Mamba(ConvolvedMixer):
    """Mamba's block without its norm (figure 3): gated, convolved, and scanned by a state space model of its own input.

    `u, z = X W_in`, `u = SiLU(conv(u))`, `delta, B, C = u W_x`, `delta = softplus(delta W_dt + b)`,
    `y = scan(u, delta, A, B, C) + D u`, `Y = (y * SiLU(z)) W_out`. A starts at -1, ..., -N in every channel (S4D-real).
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool,
        inner: int,
        d_state: int,
        taps: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(dim, causal=causal, name="mamba", state=(inner, d_state))
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.inner, self.d_state, self.step_rank = inner, d_state, math.ceil(dim / 16)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **factory)
        self.conv = CausalConv(inner, taps, **factory)
        self.x_proj = nn.Linear(inner, self.step_rank + 2 * d_state, bias=False, **factory)
        self.step_proj = nn.Linear(self.step_rank, inner, bias=False, **factory)
        self.step_bias = no_weight_decay(nn.Parameter(torch.empty(inner, **factory)))
        self.log_rate = no_weight_decay(nn.Parameter(torch.empty(inner, d_state, **factory)))
        self.skip = no_weight_decay(nn.Parameter(torch.empty(inner, **factory)))
        self.proj = nn.Linear(inner, dim, bias=False, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        # step_proj: uniform within step_rank^-0.5, which is what nn.Linear does by itself.
        for child in (self.in_proj, self.conv, self.x_proj, self.step_proj, self.proj):
            child.reset_parameters()
        log_uniform_step_bias(self.step_bias)
        rates = torch.arange(1, self.d_state + 1, device=self.log_rate.device, dtype=torch.float32)
        self.log_rate.copy_(rates.log().expand_as(self.log_rate))
        nn.init.ones_(self.skip)

    def path(self, device: torch.device | str) -> str:
        return self.conv.beside("reference", device)

    def scan(self, x: Tensor, length: Tensor | None, cache: Cache | None) -> Tensor:
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = F.silu(self.convolve(u, length, cache))
        step, b, c = self.x_proj(u).split((self.step_rank, self.d_state, self.d_state), dim=-1)
        delta = F.softplus(precise(self.step_proj(step)) + precise(self.step_bias))
        a = -precise(self.log_rate).exp()
        tokens = {"u": u, "delta": delta, "b": b, "c": c}
        y = recur(selective_scan, selective_scan_step, tokens, length, cache, still=("delta",), a=a)
        return self.proj((y + self.skip.to(u.dtype) * u) * F.silu(z))


def mamba(
    dim: int,
    *,
    causal: bool,
    depth: int | None = None,
    layer_idx: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    d_state: int = 16,
    expand: float = 2.0,
    taps: int = 4,
) -> Mamba:
    """Mamba's selective state space model (arXiv:2312.00752), about 6 C^2 parameters with expand=2; causal.

    Args:
        d_state: states a channel.
        expand: inner channels over `dim`; 1.25 makes about 4 C^2 parameters.
        taps: of the short convolution.
    """
    if d_state < 1:
        raise ValueError(f"mamba: d_state must be at least 1, got {d_state}")
    inner = expanded("mamba", dim, expand, "expand")
    return Mamba(dim, causal=causal, inner=inner, d_state=d_state, taps=taps, device=device, dtype=dtype)
