"""Softmax attention through torch's scaled_dot_product_attention: the mixer that the others are measured against."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chela_plugin.kernels.rotary import rotary_qkv
from chela_plugin.layers.initial import reset_projections
from chela_plugin.layers.mixer import Cache, Mixer
from chela_plugin.layers.plain import with_weights_of
from chela_plugin.mixers.heads import attention_heads


class Attention(Mixer):
    """Multi-head softmax attention (arXiv:1706.03762, section 3.2), optionally with rotary positions.

    `O = softmax(Q K^T / sqrt(d)) V` per head; four projections without bias, exactly 4 C^2 parameters.
    Positions count the tokens of a row, not its padding.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool,
        num_heads: int,
        rope: bool,
        depth: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(dim, causal=causal)
        self.num_heads, self.head_dim, self.rope, self.depth = num_heads, dim // num_heads, rope, depth
        if rope and self.head_dim % 2:
            raise ValueError(
                f"attention: rope turns pairs of channels, head_dim={self.head_dim} is odd; use rope=False"
            )
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_projections(self.qkv, output=self.proj, depth=self.depth)

    def path(self, device: torch.device | str) -> str:
        return "sdpa"

    def plain(self) -> nn.Module:
        """The same weights in a form that TorchScript compiles; ValueError for causal or rotary attention."""
        if self.causal or self.rope:
            raise ValueError("causal or rotary attention has no plain form; torch.export takes it as it is")
        return with_weights_of(self, PlainAttention)

    def init_cache(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_tokens: int | None = None,
    ) -> Cache:
        """Keys and values, which grow with the tokens; or with room for `max_tokens`, all of which a step then reads.

        In the latter `place` is where the next token goes, the same in all rows, and `begun` `[B, n, 0]` tells the
        host, by its shape alone, whether there was one.
        """
        device, dtype = device or self.proj.weight.device, dtype or self.proj.weight.dtype
        room = max_tokens or 0
        empty = torch.zeros(batch_size, room, self.num_heads, self.head_dim, device=device, dtype=dtype)
        cache = {
            "key": empty,
            "value": empty.clone(),
            "length": torch.zeros(batch_size, dtype=torch.long, device=device),
        }
        if room:
            cache["mask"] = torch.zeros(batch_size, room, dtype=torch.bool, device=device)
            cache["place"] = torch.zeros(batch_size, dtype=torch.long, device=device)
            cache["begun"] = torch.zeros(batch_size, 0, 0, dtype=dtype, device=device)
        return cache

    def mix(self, x: Tensor, *, mask: Tensor | None, cache: Cache | None, grid: tuple[int, int] | None) -> Tensor:
        batch, time, dim = x.shape
        qkv = self.qkv(x).view(batch, time, 3, self.num_heads, self.head_dim)
        q, k, v = rotary_qkv(qkv, self._positions(x, mask, cache)) if self.rope else qkv.unbind(2)
        if cache is not None and "place" in cache:
            k, v, visible = self._remember_in_place(k, v, mask, cache)
        else:
            if cache is not None:
                k, v, mask = self._remember(k, v, mask, cache)
            visible = self._visible(time, k.shape[1], mask, x.device)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        plain_causal = self.causal and visible is None
        if time == 1:  # it sees all keys; an `and` would hand SDPA a symbol while compiling
            plain_causal = False
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=plain_causal)
        return self.proj(o.transpose(1, 2).reshape(batch, time, dim))

    def _positions(self, x: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        position = torch.arange(x.shape[1], device=x.device) if mask is None else mask.long().cumsum(1) - 1
        return position if cache is None else position + cache["length"][:, None]

    def _remember(
        self, k: Tensor, v: Tensor, mask: Tensor | None, cache: Cache
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        # "mask" joins the cache only once padding was seen: SDPA's fast kernels take no mask.
        if mask is not None or "mask" in cache:
            past = cache.get("mask", k.new_ones(cache["key"].shape[:2], dtype=torch.bool))
            mask = k.new_ones(k.shape[:2], dtype=torch.bool) if mask is None else mask
            cache["mask"] = torch.cat((past, mask), dim=1)
        cache["length"] = cache["length"] + (k.shape[1] if mask is None else mask.sum(1))
        cache["key"] = torch.cat((cache["key"].to(k.dtype), k), dim=1)
        cache["value"] = torch.cat((cache["value"].to(v.dtype), v), dim=1)
        return cache["key"], cache["value"], cache.get("mask")

    def _remember_in_place(
        self, k: Tensor, v: Tensor, mask: Tensor | None, cache: Cache
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values to attend to, and what each query sees of them, `[B, 1, time, keys]` (None: causal)."""
        time = k.shape[1]
        place = cache["place"][:1] + torch.arange(time, device=k.device)
        here = k.new_ones(k.shape[:2], dtype=torch.bool) if mask is None else mask
        for name, new in (("key", k), ("value", v), ("mask", here)):
            new = new.to(cache[name].dtype)
            if torch.is_grad_enabled():
                cache[name] = cache[name].index_copy(1, place, new)
            else:
                cache[name].index_copy_(1, place, new)
        cache["place"] = cache["place"] + time
        cache["length"] = cache["length"] + (time if mask is None else mask.sum(1))
        begun, cache["begun"] = cache["begun"].shape[1] > 0, k.new_zeros(len(k), 1, 0)
        if not begun and time > 1:  # a prompt: nothing but itself
            return k, v, self._visible(time, time, mask, k.device)
        key = torch.arange(cache["key"].shape[1], device=k.device)
        visible = (key <= place[:, None]) & cache["mask"][:, None, None, :] | (key == place[:, None])
        return cache["key"].to(k.dtype), cache["value"].to(v.dtype), visible

    def _visible(self, time: int, total: int, mask: Tensor | None, device: torch.device) -> Tensor | None:
        """`[B or 1, 1, time, total]`, True where a query may look; None where SDPA's own causal flag says it all."""
        if mask is None and (not self.causal or time == total or time == 1):
            return None
        query = torch.arange(total - time, total, device=device)[:, None]
        key = torch.arange(total, device=device)
        visible = key <= query if self.causal else torch.ones(time, total, dtype=torch.bool, device=device)
        if mask is None:
            return visible
        # A padded query sees itself: a softmax over nothing would be NaN.
        return visible & mask[:, None, None, :] | (key == query)


class PlainAttention(Attention):
    """The same for TorchScript and ONNX: two-sided, without rotary positions, masks and cache."""

    __constants__ = ("head_dim", "num_heads")

    def __prepare_scriptable__(self) -> nn.Module:
        return self

    # Fewer arguments than its base on purpose, and TorchScript reads any text behind `type: ignore` as a type.
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v = self.qkv(x).unflatten(-1, [3, self.num_heads, self.head_dim]).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def attention(
    dim: int,
    *,
    causal: bool,
    depth: int | None = None,
    layer_idx: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    num_heads: int | None = None,
    head_dim: int | None = None,
    rope: bool | None = None,
) -> Attention:
    """Softmax attention (SDPA), 4 C^2 parameters.

    Args:
        num_heads, head_dim: give one; by default heads are 64 wide (32 in models narrower than 128).
        rope: rotary positions; by default in causal models only, since vision hosts add position embeddings.
    """
    heads = attention_heads("attention", dim, num_heads, head_dim)
    rope = causal if rope is None else rope
    return Attention(dim, causal=causal, num_heads=heads, rope=rope, depth=depth, device=device, dtype=dtype)
