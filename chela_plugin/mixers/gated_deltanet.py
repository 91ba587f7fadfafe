"""Gated DeltaNet (arXiv:2412.06464)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chela_plugin.kernels.backend import computed_dtype
from chela_plugin.kernels.gated_delta_rule import backend, gated_delta_rule, gated_delta_rule_step
from chela_plugin.kernels.precision import precise
from chela_plugin.layers.causal_conv import CausalConv
from chela_plugin.layers.initial import log_uniform_step_bias, no_weight_decay, reset_projections
from chela_plugin.layers.mixer import Cache
from chela_plugin.mixers.gated_norm import GatedRMSNorm
from chela_plugin.mixers.heads import expanded, heads_at_least, key_value_heads
from chela_plugin.mixers.recurrent import ConvolvedMixer, recur


class GatedDeltaNet(ConvolvedMixer):
    """Gated DeltaNet (figure 1, right): a state that is corrected, not only added to, and forgets as a whole.

    `S_t = alpha_t (I - beta_t k_t k_t^T) S_(t-1) + beta_t k_t v_t^T` (equation 10) with q, k, v each through a
    projection, a causal convolution of 4 taps and SiLU, q and k of unit length; `beta = sigmoid(X Wb)`,
    `log alpha = -exp(A) softplus(X Wa + b)` as in Mamba-2; `Y = (RMSNorm_head(S_t^T q_t / sqrt(K)) * SiLU(X Wg)) Wo`.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        taps: int,
        depth: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(dim, causal=causal, name="gated_deltanet", state=(num_heads, key_dim, value_dim))
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        keys, values = num_heads * key_dim, num_heads * value_dim
        self.num_heads, self.key_dim, self.value_dim, self.depth = num_heads, key_dim, value_dim, depth
        self.qkv = nn.Linear(dim, 2 * keys + values, bias=False, **factory)
        self.conv = CausalConv(2 * keys + values, taps, bias=False, **factory)
        self.beta = nn.Linear(dim, num_heads, bias=False, **factory)
        self.alpha = nn.Linear(dim, num_heads, bias=False, **factory)
        self.log_rate = no_weight_decay(nn.Parameter(torch.empty(num_heads, **factory)))
        self.step_bias = no_weight_decay(nn.Parameter(torch.empty(num_heads, **factory)))
        self.g = nn.Linear(dim, values, bias=False, **factory)
        self.norm = GatedRMSNorm(num_heads, value_dim, weight="shared", **factory)
        self.proj = nn.Linear(values, dim, bias=False, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        reset_projections(self.qkv, self.beta, self.alpha, self.g, output=self.proj, depth=self.depth)
        self.conv.reset_parameters()
        self.norm.reset_parameters()
        self.log_rate.uniform_(1, 16).log_()  # as in Mamba-2, arXiv:2405.21060; the published code starts at 0
        log_uniform_step_bias(self.step_bias)

    def path(self, device: torch.device | str) -> str:
        scan = backend(device, computed_dtype(self.proj.weight, device), self.key_dim)
        return self.conv.beside(scan, device)

    def scan(self, x: Tensor, length: Tensor | None, cache: Cache | None) -> Tensor:
        keys = self.num_heads * self.key_dim
        qkv = F.silu(self.convolve(self.qkv(x), length, cache))
        q, k, v = qkv.split((keys, keys, self.num_heads * self.value_dim), dim=-1)
        # Autocast normalises in fp32; the kernels want one dtype.
        q = F.normalize(q.unflatten(-1, (self.num_heads, self.key_dim)), dim=-1).to(v.dtype)
        k = F.normalize(k.unflatten(-1, (self.num_heads, self.key_dim)), dim=-1).to(v.dtype)
        v = v.unflatten(-1, (self.num_heads, self.value_dim))
        beta = precise(self.beta(x)).sigmoid()
        step = F.softplus(precise(self.alpha(x)) + precise(self.step_bias))
        log_decay = -precise(self.log_rate).exp() * step
        tokens = {"q": q, "k": k, "v": v, "beta": beta, "log_decay": log_decay}
        still = ("beta", "log_decay")
        o = recur(gated_delta_rule, gated_delta_rule_step, tokens, length, cache, still=still)
        return self.proj(self.norm(o.flatten(-2), self.g(x)))


def gated_deltanet(
    dim: int,
    *,
    causal: bool,
    depth: int | None = None,
    layer_idx: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    num_heads: int | None = None,
    expand_k: float = 0.5,
    expand_v: float = 1.0,
    taps: int = 4,
) -> GatedDeltaNet:
    """Gated DeltaNet (arXiv:2412.06464); causal.

    Args:
        num_heads: by default as many as leave a head's keys at least 64 wide.
        expand_k, expand_v: key and value channels over `dim`. The defaults make about 4 C^2 parameters; the paper's
            layer is 0.75 and 1.5, about 6 C^2.
        taps: of the short convolutions of q, k and v.
    """
    name = "gated_deltanet"
    keys, values = expanded(name, dim, expand_k, "expand_k"), expanded(name, dim, expand_v, "expand_v")
    heads = heads_at_least(math.gcd(keys, values), max(64 * math.gcd(keys, values) // keys, 1), most=dim)
    heads = heads if num_heads is None else num_heads
    sizes = key_value_heads(name, keys, values, heads)
    return GatedDeltaNet(dim, causal=causal, **sizes, taps=taps, depth=depth, device=device, dtype=dtype)
