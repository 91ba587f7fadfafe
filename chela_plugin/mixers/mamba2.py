"""Mamba-2 (arXiv:2405.21060)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chela_plugin.kernels import linear_attention as kernel
from chela_plugin.kernels.backend import computed_dtype, requested
from chela_plugin.kernels.peers import peer
from chela_plugin.kernels.precision import precise, without_autocast
from chela_plugin.layers.attend import attend
from chela_plugin.layers.causal_conv import CausalConv
from chela_plugin.layers.initial import log_uniform_step_bias, no_weight_decay
from chela_plugin.layers.mixer import Cache
from chela_plugin.mixers.gated_norm import GatedRMSNorm
from chela_plugin.mixers.heads import check_head_widths, divide, expanded
from chela_plugin.mixers.recurrent import ConvolvedMixer, real_tokens

PUBLISHED_CHUNK = 256


def published_scan(device: torch.device | str, dtype: torch.dtype) -> Callable[..., Tensor] | None:
    """mamba-ssm's Triton kernels for whole sequences, asked for with `CHELA_BACKEND=peer`; else None.

    The function is linear attention with a decay a head, for which our own kernel is there.
    """
    return peer("mamba_chunk_scan_combined", device, dtype) if requested() == "peer" else None


class Mamba2(ConvolvedMixer):
    """Mamba-2's block without its norm (figure 6, right): state space duality, that is linear attention with a decay.

    `z, x, B, C, dt = X W_in`, `x, B, C = SiLU(conv(x, B, C))`, `dt = softplus(dt + b)`; with C as queries, B as keys
    (shared by the heads of a group) and `dt x` as values, `y_t = sum_(s<=t) exp(-rate sum dt) (C_t . B_s) dt_s x_s`
    (equation 6); `Y = RMSNorm((y + D x) * SiLU(z)) W_out`. Rates start uniform in 1 to 16.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool,
        num_heads: int,
        head_dim: int,
        d_state: int,
        num_groups: int,
        taps: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(dim, causal=causal, name="mamba2", state=(num_heads, d_state, head_dim))
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.head_dim, self.d_state, self.num_groups = num_heads, head_dim, d_state, num_groups
        self.inner, self.convolved = num_heads * head_dim, num_heads * head_dim + 2 * num_groups * d_state
        self.in_proj = nn.Linear(dim, self.inner + self.convolved + num_heads, bias=False, **factory)
        self.conv = CausalConv(self.convolved, taps, **factory)
        self.step_bias = no_weight_decay(nn.Parameter(torch.empty(num_heads, **factory)))
        self.log_rate = no_weight_decay(nn.Parameter(torch.empty(num_heads, **factory)))
        self.skip = no_weight_decay(nn.Parameter(torch.empty(num_heads, **factory)))
        # As published, the norm spans a group's channels, whatever the heads.
        width = self.inner // num_groups
        self.norm = GatedRMSNorm(num_groups, width, weight="each", gate_first=True, **factory)
        self.proj = nn.Linear(self.inner, dim, bias=False, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for child in (self.in_proj, self.conv, self.norm, self.proj):
            child.reset_parameters()
        log_uniform_step_bias(self.step_bias)
        self.log_rate.uniform_(1, 16).log_()
        nn.init.ones_(self.skip)

    def path(self, device: torch.device | str) -> str:
        dtype = computed_dtype(self.proj.weight, device)
        scan = kernel.backend(device, dtype) if published_scan(device, dtype) is None else "mamba_ssm"
        return self.conv.beside(scan, device)

    def scan(self, x: Tensor, length: Tensor | None, cache: Cache | None) -> Tensor:
        z, xbc, dt = self.in_proj(x).split((self.inner, self.convolved, self.num_heads), dim=-1)
        states = self.num_groups * self.d_state
        v, k, q = F.silu(self.convolve(xbc, length, cache)).split((self.inner, states, states), dim=-1)
        v = v.unflatten(-1, (self.num_heads, self.head_dim))
        dt = F.softplus(precise(dt) + precise(self.step_bias))
        rate = -precise(self.log_rate).exp()
        scan = published_scan(x.device, v.dtype) if cache is None else None
        if scan is not None:
            k, q = (part.unflatten(-1, (self.num_groups, self.d_state)) for part in (k, q))
            with without_autocast(v):
                y = scan(v, dt, rate, k, q, PUBLISHED_CHUNK, precise(self.skip))
            return self.proj(self.norm(y.flatten(-2), z))
        log_decay = rate * dt
        stepped = (v * dt[..., None]).to(v.dtype)
        mask = real_tokens(length, x.shape[1])
        y = attend(self._heads(q), self._heads(k), stepped, log_decay, cache, scale=1.0, mask=mask)
        y = y + self.skip.to(v.dtype)[:, None] * v
        return self.proj(self.norm(y.flatten(-2), z))

    def _heads(self, x: Tensor) -> Tensor:
        """`[B, T, groups * N]` to `[B, T, H, N]`: each group's queries or keys serve all its heads."""
        x = x.unflatten(-1, (self.num_groups, 1, self.d_state))
        return x.expand(*x.shape[:3], self.num_heads // self.num_groups, -1).flatten(2, 3)


def mamba2(
    dim: int,
    *,
    causal: bool,
    depth: int | None = None,
    layer_idx: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    d_state: int = 128,
    head_dim: int | None = None,
    expand: float = 2.0,
    num_groups: int = 1,
    taps: int = 4,
) -> Mamba2:
    """Mamba-2's state space duality layer (arXiv:2405.21060), about 6 C^2 + 256 C parameters by default; causal.

    Args:
        d_state: states a channel, the key width, at most 256.
        head_dim: channels of a head; divides `expand * dim`. By default 64, or 32, 16 or 8 where 64 doesn't divide.
        expand: inner channels over `dim`; 1 makes about 3 C^2 + 256 C.
        num_groups: how many sets of B and C; divides the number of heads.
        taps: of the short convolution.
    """
    inner = expanded("mamba2", dim, expand, "expand")
    heads = divide("mamba2", inner, None, head_dim, (64, 32, 16, 8))
    check_head_widths("mamba2", inner // heads)
    if not 1 <= d_state <= kernel.MAX_WIDTH:
        raise ValueError(f"mamba2: d_state must be 1 to {kernel.MAX_WIDTH}, got {d_state}")
    if num_groups < 1 or heads % num_groups:
        raise ValueError(f"mamba2: num_groups={num_groups} must divide the {heads} heads")
    return Mamba2(
        dim,
        causal=causal,
        num_heads=heads,
        head_dim=inner // heads,
        d_state=d_state,
        num_groups=num_groups,
        taps=taps,
        device=device,
        dtype=dtype,
    )
