"""Gated linear attention (GLA, arXiv:2312.06635)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chela_plugin.kernels import gated_linear_attention as channel_decay
from chela_plugin.kernels import linear_attention as kernel
from chela_plugin.kernels.backend import computed_dtype
from chela_plugin.kernels.gated_linear_attention import gated_linear_attention, gated_linear_attention_step
from chela_plugin.kernels.precision import precise
from chela_plugin.layers.attend import attend
from chela_plugin.layers.initial import reset_projections
from chela_plugin.layers.mixer import Cache
from chela_plugin.mixers.gated_norm import GatedRMSNorm
from chela_plugin.mixers.heads import check_head_widths, expanded, fewest_heads, heads_at_least, key_value_heads
from chela_plugin.mixers.recurrent import RecurrentMixer, real_tokens, recur

GATE_RANK = 16  # section 4.4: the decay's projection has low rank, to spare parameters
GATE_NORMALIZER = 16  # section 4.4: alpha = sigmoid(.)^(1/16), slow forgetting at the start


class GatedLinearAttention(RecurrentMixer):
    """GLA: linear attention whose state decays by a factor computed from each token (section 4.4).

    `S_t = Diag(alpha_t) S_(t-1) + k_t v_t^T`, `alpha_t = sigmoid(X W1 W2 + b)^(1/16)` for every key channel, or with
    `decay='head'` one `alpha_t = sigmoid(X W + b)^(1/16)` a head (the scalar decay of Mamba-2 and of fla's SimpleGLA);
    `Y = (SiLU(X Wg) * RMSNorm_head(S_t^T q_t / sqrt(K))) Wo`.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        decay: Literal["channel", "head"],
        depth: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(dim, causal=causal, name="gla", state=(num_heads, key_dim, value_dim))
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        keys, values = num_heads * key_dim, num_heads * value_dim
        self.num_heads, self.key_dim, self.value_dim = num_heads, key_dim, value_dim
        self.decay, self.depth = decay, depth
        self.q = nn.Linear(dim, keys, bias=False, **factory)
        self.k = nn.Linear(dim, keys, bias=False, **factory)
        self.v = nn.Linear(dim, values, bias=False, **factory)
        self.g = nn.Linear(dim, values, bias=False, **factory)
        self.narrow = nn.Linear(dim, GATE_RANK, bias=False, **factory) if decay == "channel" else nn.Identity()
        self.alpha = nn.Linear(
            GATE_RANK if decay == "channel" else dim, keys if decay == "channel" else num_heads, **factory
        )
        self.norm = GatedRMSNorm(num_heads, value_dim, weight="shared", **factory)
        self.proj = nn.Linear(values, dim, bias=False, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        gates = (self.alpha, self.narrow) if isinstance(self.narrow, nn.Linear) else (self.alpha,)
        reset_projections(self.q, self.k, self.v, self.g, *gates, output=self.proj, depth=self.depth)
        self.norm.reset_parameters()

    def path(self, device: torch.device | str) -> str:
        dtype = computed_dtype(self.proj.weight, device)
        return channel_decay.backend(device, dtype) if self.decay == "channel" else kernel.backend(device, dtype)

    def scan(self, x: Tensor, length: Tensor | None, cache: Cache | None) -> Tensor:
        q = self.q(x).unflatten(-1, (self.num_heads, self.key_dim))
        k = self.k(x).unflatten(-1, (self.num_heads, self.key_dim))
        v = self.v(x).unflatten(-1, (self.num_heads, self.value_dim))
        log_decay = F.logsigmoid(precise(self.alpha(self.narrow(x)))) / GATE_NORMALIZER
        if self.decay == "head":
            o = attend(q, k, v, log_decay, cache, mask=real_tokens(length, x.shape[1]))
        else:
            log_decay = log_decay.unflatten(-1, (self.num_heads, self.key_dim))
            tokens = {"q": q, "k": k, "v": v, "log_decay": log_decay}
            still = ("k", "log_decay")
            o = recur(gated_linear_attention, gated_linear_attention_step, tokens, length, cache, still=still)
        return self.proj(self.norm(o.flatten(-2), self.g(x)))


def gla(
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
    decay: Literal["channel", "head"] = "channel",
) -> GatedLinearAttention:
    """Gated linear attention (GLA, arXiv:2312.06635), about 4 C^2 parameters; causal.

    Args:
        num_heads: by default the paper's 4, fewer where a head's keys would be narrower than 64; with decay=head more
            where heads would be wider than that kernel takes (256).
        expand_k, expand_v: key and value channels over `dim`; the paper's 1/2 and 1.
        decay: 'channel', the paper's; 'head', one scalar a head.
    """
    keys, values = expanded("gla", dim, expand_k, "expand_k"), expanded("gla", dim, expand_v, "expand_v")
    heads = num_heads
    if heads is None:
        heads = heads_at_least(keys, 64, most=4)
        heads = fewest_heads(heads, keys, values) if decay == "head" else heads
    sizes = key_value_heads("gla", keys, values, heads)
    if decay == "head":
        check_head_widths("gla(decay=head)", sizes["key_dim"], sizes["value_dim"])
    return GatedLinearAttention(dim, causal=causal, **sizes, decay=decay, depth=depth, device=device, dtype=dtype)
