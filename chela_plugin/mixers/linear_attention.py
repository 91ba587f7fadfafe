"""Linear attention without a data-dependent decay: Katharopoulos' `linear_attention` and RetNet's `retnet`."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from chela_plugin.kernels import linear_attention as kernel
from chela_plugin.kernels.rotary import rotate
from chela_plugin.layers.attend import attend, empty_state
from chela_plugin.layers.chela import feature_map, fixed_log_decay
from chela_plugin.layers.initial import reset_projections
from chela_plugin.layers.mixer import Cache, Mixer
from chela_plugin.mixers.gated_norm import GatedRMSNorm
from chela_plugin.mixers.heads import attention_heads, check_head_widths, expanded, fewest_heads, key_value_heads
from chela_plugin.mixers.recurrent import RecurrentMixer, real_tokens

POSITIVE = ("elu1", "relu")


class LinearAttention(Mixer):
    """Linear attention (arXiv:2006.16236, equations 5 and 12), causal or not.

    `O_t = sum_s (q_t . k_s) v_s / sum_s (q_t . k_s)` with `q = phi(X Wq)`, `k = phi(X Wk)`, the sums over s <= t when
    causal. `norm='rms'` divides by the root mean square of each head's output instead (TransNormer,
    arXiv:2210.10340), which also takes feature maps that are negative in places. 4 C^2 parameters.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool,
        num_heads: int,
        phi: str,
        norm: str,
        depth: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(dim, causal=causal)
        if norm == "sum" and phi not in POSITIVE:
            raise ValueError(
                f"linear_attention: norm=sum divides by the sum of scores, which phi={phi} may make zero; "
                f"use norm=rms, or phi={' or phi='.join(POSITIVE)}"
            )
        self.num_heads, self.head_dim, self.depth = num_heads, dim // num_heads, depth
        self.phi, self.norm = phi, norm
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_projections(self.qkv, output=self.proj, depth=self.depth)

    def path(self, device: torch.device | str) -> str:
        return kernel.backend(device, self.proj.weight.dtype)

    def init_cache(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Cache:
        state = empty_state(self.proj.weight, (batch_size, self.num_heads, self.head_dim, self.head_dim), device, dtype)
        return {"state": state, "keys": torch.zeros_like(state[..., 0])} if self.norm == "sum" else {"state": state}

    def mix(self, x: Tensor, *, mask: Tensor | None, cache: Cache | None, grid: tuple[int, int] | None) -> Tensor:
        heads = (3, self.num_heads, self.head_dim)
        q, k, v = self.qkv(x).unflatten(-1, heads).unbind(2)
        q, k = feature_map(q, self.phi), feature_map(k, self.phi)
        if mask is not None:
            k = k.masked_fill(~mask[..., None, None], 0.0)
        if self.norm == "rms":
            o = attend(q, k, v, None, cache, causal=self.causal)
            o = o * (o.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        else:
            o = attend(q, k, v, None, cache, causal=self.causal, scale=1.0)
            o = o / self._score_sum(q, k, cache).to(o.dtype)
        return self.proj(o.flatten(-2))

    def _score_sum(self, q: Tensor, k: Tensor, cache: Cache | None) -> Tensor:
        """The denominator `[B, T, H, 1]`: `q_t . sum_s k_s`."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        keys = k.to(dtype).cumsum(1) if self.causal else k.sum(1, keepdim=True, dtype=dtype)
        if cache is not None:
            keys = keys + cache["keys"][:, None]
            cache["keys"] = keys[:, -1]
        # Where relu has silenced every score both sums are 0; so is the output then.
        return (q.to(dtype) * keys).sum(-1, keepdim=True) + 1e-6


class RetNet(RecurrentMixer):
    """Multi-scale retention (arXiv:2307.08621, equations 7 and 8): linear attention with one fixed decay a head.

    `head_h = GroupNorm(sum_(s<=t) gamma_h^(t-s) (q_t . k_s) v_s)`, `gamma_h = 1 - 2^(-5-h)`, q and k rotated by their
    positions (equation 5); `Y = (SiLU(X Wg) * head) Wo`. The group norm is RMSNorm without weights.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        depth: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(dim, causal=causal, name="retnet", state=(num_heads, key_dim, value_dim))
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.key_dim, self.value_dim, self.depth = num_heads, key_dim, value_dim, depth
        self.q = nn.Linear(dim, num_heads * key_dim, bias=False, **factory)
        self.k = nn.Linear(dim, num_heads * key_dim, bias=False, **factory)
        self.v = nn.Linear(dim, num_heads * value_dim, bias=False, **factory)
        self.g = nn.Linear(dim, num_heads * value_dim, bias=False, **factory)
        self.norm = GatedRMSNorm(num_heads, value_dim, weight=None, **factory)
        self.proj = nn.Linear(num_heads * value_dim, dim, bias=False, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_projections(self.q, self.k, self.v, self.g, output=self.proj, depth=self.depth)

    def path(self, device: torch.device | str) -> str:
        return kernel.backend(device, self.proj.weight.dtype)

    def init_cache(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Cache:
        cache = super().init_cache(batch_size, device=device, dtype=dtype)
        return cache | {"length": torch.zeros(batch_size, dtype=torch.long, device=cache["state"].device)}

    def scan(self, x: Tensor, length: Tensor | None, cache: Cache | None) -> Tensor:
        time = x.shape[1]
        position = torch.arange(time, device=x.device)
        if cache is not None:
            position = position + cache["length"][:, None]
            cache["length"] = cache["length"] + (time if length is None else length)
        q = rotate(self.q(x).unflatten(-1, (self.num_heads, self.key_dim)), position)
        k = rotate(self.k(x).unflatten(-1, (self.num_heads, self.key_dim)), position)
        v = self.v(x).unflatten(-1, (self.num_heads, self.value_dim))
        dtype = torch.promote_types(q.dtype, torch.float32)
        log_decay = fixed_log_decay(self.num_heads, device=x.device).to(dtype)
        o = attend(q, k, v, log_decay, cache, mask=real_tokens(length, time))
        return self.proj(self.norm(o.flatten(-2), self.g(x)))


def linear_attention(
    dim: int,
    *,
    causal: bool,
    depth: int | None = None,
    layer_idx: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    num_heads: int | None = None,
    head_dim: int | None = None,
    phi: Literal["elu1", "relu", "silu", "identity", "l2"] = "elu1",
    norm: Literal["sum", "rms"] = "sum",
) -> LinearAttention:
    """Linear attention, no decay (Katharopoulos et al., arXiv:2006.16236), 4 C^2 parameters; causal or not.

    Args:
        num_heads, head_dim: give one; by default heads are 64 wide (32 in models narrower than 128).
        phi: feature map of queries and keys; elu(x) + 1 in the paper.
        norm: 'sum' divides by the sum of scores, as the paper does; 'rms' by each head's root mean square.
    """
    heads = attention_heads("linear_attention", dim, num_heads, head_dim)
    check_head_widths("linear_attention", dim // heads)
    return LinearAttention(
        dim, causal=causal, num_heads=heads, phi=phi, norm=norm, depth=depth, device=device, dtype=dtype
    )


def retnet(
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
) -> RetNet:
    """Multi-scale retention (RetNet, arXiv:2307.08621); causal.

    Args:
        num_heads: one decay each; by default 4, or as many of 3, 2, 1 as divide the width, and more where heads would
            be wider than the kernels take (256).
        expand_k, expand_v: key and value channels over `dim`. The defaults make 4 C^2 parameters, as GLA's paper
            (arXiv:2312.06635, section 4.4) sizes its layers; RetNet's own layer is 1 and 2, 8 C^2.
    """
    keys, values = expanded("retnet", dim, expand_k, "expand_k"), expanded("retnet", dim, expand_v, "expand_v")
    fitting = [n for n in (4, 3, 2, 1) if keys % (2 * n) == 0 and values % n == 0]
    heads = fewest_heads(fitting[0] if fitting else 1, keys // 2, keys, values) if num_heads is None else num_heads
    sizes = key_value_heads("retnet", keys, values, heads)
    if sizes["key_dim"] % 2:
        raise ValueError(f"retnet turns pairs of key channels; {keys} / {heads} heads leaves an odd {keys // heads}")
    check_head_widths("retnet", sizes["key_dim"], sizes["value_dim"])
    return RetNet(dim, causal=causal, **sizes, depth=depth, device=device, dtype=dtype)
