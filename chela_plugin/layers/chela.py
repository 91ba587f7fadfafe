"""The CHELA mixer (arXiv:2406.08128): short-long convolution, linear attention steered by it, and a gate.

    Z = SiLU(S(X))                                   short-long convolution
    q = phi(Z Wq), k = phi(Z Wk), v = SiLU(X Wv)     H heads, key width K, value width V
    O_t = sum_s exp(g_t - g_s) (q_t . k_s) v_s       causal: s <= t; g the cumulative log decay, 0 without one
    O_t += d_h v_t                                   Mamba's D (arXiv:2312.00752), one for each head
    Y = (RMSNorm_head(O) * SiLU(Z Wg)) Wo
    update_gate: U = sigmoid(Z Wu), U * Y + (1 - U) * X          (MEGA, arXiv:2209.10655, equation 14)

Dim suffixes: B batch, T tokens, D channels, H heads, K key width, V value width of a head.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chela_plugin.kernels.backend import backend
from chela_plugin.kernels.gated_norm import gated_norm
from chela_plugin.kernels.linear_attention import MAX_WIDTH
from chela_plugin.kernels.precision import precise

from .attend import attend, empty_state
from .fused import FusedAttention, Shape, fusible
from .initial import decay_init, no_weight_decay, reset_projections
from .mixer import Cache, Mixer
from .plain import on_grid, plain_conv, with_weights_of
from .short_long_conv import ShortLongConv

FEATURE_MAPS = ("silu", "identity", "elu1", "relu", "l2")
DECAYS = ("data", "none", "fixed", "learned")


class Chela(Mixer):
    """CHELA (arXiv:2406.08128); with its defaults within 2 % of softmax attention's 4 D^2 parameters.

    Args:
        dim: channels D.
        causal: one-sided, or two-sided.
        num_heads: H; default: what `head_dim` gives, else heads of value width 128, or 64 where D is below 256.
        head_dim: V, the value width of a head; default D / H (3 D / 4 H with `update_gate`, whose D^2 it pays).
        key_dim: K, the key width of a head; default: what is left of 4 D^2 parameters, about V / 2.
        short, long_gain, dims, group_size, max_len: see `ShortLongConv`.
        long: None chooses `modal` when causal, whose cost a token is constant in training and decoding alike, and
            `multiscale` when not.
        norm: None chooses `scale` when causal and `batch` when not.
        decay: `data` (a decay for each token and head, as in Mamba-2), `none`, `fixed` (RetNet's), `learned` (one for
            each head); None chooses `data` when causal and `none` when not. A two-sided mixer has no decay.
        phi: feature map of q and k.
        qk_from: 'z' as in the paper; 'x' for ablations.
        gate: False leaves out SiLU(Z Wg).
        skip: False leaves out d v_t. With it a token's own value passes from the first step on, while q and k still
            have to learn what to look for.
        update_gate: MEGA's update gate.
        depth: number of blocks of the host; scales the output projection's initial weights by (2 depth)^-0.5.
        layer_idx: accepted because every mixer factory takes it; all layers are alike here.

    Raises:
        ValueError: dim not divisible by num_heads, heads wider than the kernels take (256), or options that contradict
            each other.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool,
        num_heads: int | None = None,
        head_dim: int | None = None,
        key_dim: int | None = None,
        short: tuple[int, ...] = (3, 7),
        long: Literal["multiscale", "explicit", "modal", "implicit", "none"] | None = None,
        norm: Literal["scale", "batch"] | None = None,
        long_gain: float = 0.1,
        dims: Literal[1, 2] = 1,
        group_size: int = 16,
        max_len: int = 1024,
        decay: Literal["data", "none", "fixed", "learned"] | None = None,
        phi: Literal["silu", "identity", "elu1", "relu", "l2"] = "silu",
        qk_from: Literal["z", "x"] = "z",
        gate: bool = True,
        skip: bool = True,
        update_gate: bool = False,
        depth: int | None = None,
        layer_idx: int | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__(dim, causal=causal)
        factory = {"device": device, "dtype": dtype}
        decay = decay or ("data" if causal else "none")
        if decay not in DECAYS or phi not in FEATURE_MAPS or qk_from not in ("z", "x"):
            raise ValueError(
                f"decay is one of {', '.join(DECAYS)}, phi one of {', '.join(FEATURE_MAPS)}, qk_from z or x; "
                f"got {decay!r}, {phi!r}, {qk_from!r}"
            )
        if not causal and decay != "none":
            raise ValueError(f"decay={decay} runs forward in time; a two-sided chela (causal=False) takes decay=none")
        for name, number in (("num_heads", num_heads), ("head_dim", head_dim), ("key_dim", key_dim)):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if num_heads is None and head_dim is not None and dim % head_dim:
            raise ValueError(f"dim {dim} is not divisible by head_dim {head_dim}; give num_heads too, or another width")
        heads = num_heads or (dim // head_dim if head_dim else default_heads(dim))
        if dim % heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {heads}")
        self.num_heads, self.decay, self.phi, self.qk_from = heads, decay, phi, qk_from
        self.depth = depth
        self.uses_grid = dims == 2
        self.conv = ShortLongConv(
            dim,
            causal=causal,
            short=short,
            long=long,
            norm=norm,
            long_gain=long_gain,
            dims=dims,
            group_size=group_size,
            max_len=max_len,
            **factory,
        )
        self.value_dim = head_dim or (max(dim * 3 // (4 * heads), 1) if update_gate else dim // heads)
        values = heads * self.value_dim
        self.v = nn.Linear(dim, values, bias=False, **factory)
        self.g = nn.Linear(dim, values, bias=False, **factory) if gate else None
        self.u = nn.Linear(dim, dim, **factory) if update_gate else None
        self.proj = nn.Linear(values, dim, bias=False, **factory)
        self.head_norm = nn.Parameter(torch.empty(heads, self.value_dim, **factory))
        if decay == "data":
            self.dt = nn.Linear(dim, heads, **factory)
        self.skip = no_weight_decay(nn.Parameter(torch.empty(heads, **factory))) if skip else None
        if decay == "learned":
            self.log_rate = no_weight_decay(nn.Parameter(torch.empty(heads, **factory)))
        spent = sum(p.numel() for p in self.parameters())
        self.key_dim = key_dim or default_key_dim(dim, heads, spent)
        if max(self.key_dim, self.value_dim) > MAX_WIDTH:
            raise ValueError(
                f"heads are at most {MAX_WIDTH} wide, here key_dim is {self.key_dim} and head_dim {self.value_dim}; "
                "use more, narrower heads"
            )
        self.q = nn.Linear(dim, heads * self.key_dim, bias=False, **factory)
        self.k = nn.Linear(dim, heads * self.key_dim, bias=False, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        inner = [layer for layer in (self.q, self.k, self.v, self.g, self.u) if layer is not None]
        reset_projections(*inner, output=self.proj, depth=self.depth)
        if self.u is not None:
            nn.init.ones_(self.u.bias)  # the update gate starts open
        self.conv.reset_parameters()
        nn.init.ones_(self.head_norm)
        if self.skip is not None:
            nn.init.ones_(self.skip)
        if self.decay == "data":
            # Each head forgets over a time of its own, 1 to 256 tokens: softplus(bias) is 1 / time. Mamba-2's random
            # ranges need many heads to cover near and far; here there are few.
            nn.init.normal_(self.dt.weight, std=0.1 * self.dim**-0.5)
            rate = 1 / decay_init(self.num_heads, 1, 256, device=self.dt.bias.device)
            self.dt.bias.copy_(rate + torch.log(-torch.expm1(-rate)))
        elif self.decay == "learned":
            self.log_rate.copy_(fixed_log_decay(self.num_heads, device=self.log_rate.device).neg().log())

    def log_decay(self, x: Tensor) -> Tensor | None:
        """`[B, T, H]`, `[H]` or None; at most 0, in fp32 at least."""
        if self.decay == "none":
            return None
        if self.decay == "fixed":
            return fixed_log_decay(self.num_heads, device=x.device).to(precise(x[:0]).dtype)
        if self.decay == "learned":
            return -precise(self.log_rate).exp()
        return -F.softplus(precise(self.dt(x)))

    def path(self, device: torch.device | str) -> str:
        return backend(device, self.proj.weight.dtype)

    def mix(self, x: Tensor, *, mask: Tensor | None, cache: Cache | None, grid: tuple[int, int] | None) -> Tensor:
        if x.is_cuda and torch.is_autocast_enabled("cuda"):
            # A norm hands on fp32 there; the projections would each cast x, and the convolution run in fp32.
            x = x.to(torch.get_autocast_dtype("cuda"))
        if mask is not None:
            x = x * mask[..., None]  # v is then 0 there too: SiLU(0 Wv) = 0
        z = self.conv(x, mask=mask, cache=cache, grid=grid, silu=True)
        if cache is None and self.fuses(x, z):
            return self.fused(x, z)
        seen = z if self.qk_from == "z" else x
        q = feature_map(self.q(seen).unflatten(-1, (self.num_heads, self.key_dim)), self.phi)
        k = feature_map(self.k(seen).unflatten(-1, (self.num_heads, self.key_dim)), self.phi)
        v = F.silu(self.v(x)).unflatten(-1, (self.num_heads, self.value_dim))
        # Without a cache the mask may go unheeded: v is 0 in padding, which decays nothing that a real token sees.
        o = attend(q, k, v, self.log_decay(x), cache, causal=self.causal, mask=mask)
        return self.joined(o, v, z, x)

    def fuses(self, x: Tensor, z: Tensor) -> bool:
        """Whether what follows the convolution runs as one node (`fused.py`), which knows the defaults alone."""
        if self.phi != "silu" or self.qk_from != "z" or self.decay not in ("data", "none") or self.u is not None:
            return False
        if self.g is None or self.skip is None or (self.key_dim * x.element_size()) % 16 or x.dtype != z.dtype:
            return False
        linears = (self.q, self.k, self.g, self.v, self.proj, *((self.dt,) if self.decay == "data" else ()))
        return (self.value_dim * x.element_size()) % 16 == 0 and fusible(x, linears, self.head_norm, self.skip)

    def fused(self, x: Tensor, z: Tensor) -> Tensor:
        assert self.g is not None
        dt, bias = (self.dt.weight, self.dt.bias) if self.decay == "data" else (None, None)
        tensors = (self.q.weight, self.k.weight, self.g.weight, self.v.weight, dt, bias, self.head_norm, self.skip)
        shape = Shape(self.num_heads, self.key_dim, self.value_dim, self.causal)
        return FusedAttention.apply(x, z, *tensors, self.proj.weight, shape, torch.is_grad_enabled())

    def joined(self, o: Tensor, v: Tensor, z: Tensor, x: Tensor) -> Tensor:
        """What follows the attention: skip, norm, gate, output projection, update gate. o, v `[B, T, H, V]`."""
        y = self.proj(self.normed(o, v, None if self.g is None else self.g(z)))
        if self.u is not None:
            update = torch.sigmoid(self.u(z))
            y = update * y + (1 - update) * x
        return y

    def normed(self, o: Tensor, v: Tensor, gate: Tensor | None) -> Tensor:
        """RMSNorm_head(o + d v) * SiLU(gate), `[B, T, H V]`."""
        return gated_norm(o, self.head_norm, gate, v=None if self.skip is None else v, skip=self.skip)

    def init_cache(self, batch_size: int, *, device=None, dtype=None, max_tokens: int | None = None) -> Cache:
        """The convolution's history and the attention's state `[B, H, K, V]` (fp32, or fp64 for fp64)."""
        device, dtype = device or self.proj.weight.device, dtype or self.proj.weight.dtype
        cache = self.conv.init_cache(batch_size, device=device, dtype=dtype, max_tokens=max_tokens)
        shape = (batch_size, self.num_heads, self.key_dim, self.value_dim)
        return cache | {"state": empty_state(self.proj.weight, shape, device, dtype)}

    def advance(self, cache: Cache) -> None:
        self.conv.advance(cache)

    def reparameterize(self) -> Chela:
        """Fold the convolution's branches, in place; for inference."""
        self.conv.reparameterize()
        return self

    def plain(self) -> PlainChela:
        """The same weights in a form that TorchScript compiles; ValueError for a causal mixer."""
        twin = with_weights_of(self, PlainChela)
        twin._modules["conv"] = plain_conv(self.conv)
        return twin

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, key_dim={self.key_dim}, value_dim={self.value_dim}, decay={self.decay}"


class PlainChela(Chela):
    """The same for TorchScript and ONNX (`plain.py`): two-sided, on a grid, or on a sequence with `dims=1`."""

    __constants__ = ("key_dim", "num_heads", "phi", "qk_from", "uses_grid", "value_dim")

    def __prepare_scriptable__(self) -> nn.Module:
        return self

    def path(self, device: torch.device | str) -> str:
        return "torch"

    # Fewer arguments than its base on purpose, and TorchScript reads any text behind `type: ignore` as a type.
    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:  # type: ignore[override]
        """`[B, T, D]` to `[B, T, D]`."""
        z = F.silu(self.conv(on_grid(x, grid, self.uses_grid)).flatten(2).transpose(1, 2))
        seen = z if self.qk_from == "z" else x
        heads = [self.num_heads, self.key_dim]
        q = feature_map(self.q(seen).unflatten(-1, heads), self.phi).transpose(1, 2)  # [B, H, T, K]
        k = feature_map(self.k(seen).unflatten(-1, heads), self.phi).transpose(1, 2)
        v = F.silu(self.v(x)).unflatten(-1, [self.num_heads, self.value_dim])
        o = precise(q) @ (precise(k).transpose(-1, -2) @ precise(v).transpose(1, 2)) * self.key_dim**-0.5
        return self.joined(o.transpose(1, 2).to(x.dtype), v, z, x)

    def normed(self, o: Tensor, v: Tensor, gate: Tensor | None) -> Tensor:
        # Spelled out: the exporter behind torch.onnx.export(dynamo=False), which timm's own script uses, lacks
        # rms_norm.
        if self.skip is not None:
            o = o + self.skip.to(v.dtype)[:, None] * v
        wide = precise(o)
        o = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(o.dtype)
        y = (o * self.head_norm.to(o.dtype)).flatten(-2)
        return y if gate is None else y * F.silu(gate)


def feature_map(x: Tensor, phi: str) -> Tensor:
    """phi of q or k, one of FEATURE_MAPS. By name, not by function: TorchScript and pickle take it."""
    if phi == "silu":
        return F.silu(x)
    if phi == "elu1":
        return F.elu(x) + 1
    if phi == "relu":
        return F.relu(x)
    if phi == "l2":
        return F.normalize(x, dim=-1)
    return x


def default_heads(dim: int) -> int:
    """Heads of value width 128 (64 where the model is narrow), or the nearest number that divides dim."""
    target = dim / 128 if dim >= 256 else max(dim / 64, 2)
    return min((n for n in range(1, dim + 1) if dim % n == 0), key=lambda n: (abs(n - target), n))


def default_key_dim(dim: int, heads: int, spent: int) -> int:
    """The key width that spends what is left of 4 D^2 parameters; a multiple of 16 where that stays within 1.9 %."""
    exact = (4 * dim * dim - spent) / (2 * dim * heads)
    aligned = max(round(exact / 16), 1) * 16
    if abs(aligned - exact) * 2 * dim * heads <= 0.019 * 4 * dim * dim:
        return aligned
    return max(round(exact), min(16, dim // heads))


def fixed_log_decay(heads: int, device=None) -> Tensor:
    """RetNet's decays (arXiv:2307.08621, equation 8): log(1 - 2^(-5 - h))."""
    return torch.log1p(-(2.0 ** (-5 - torch.arange(heads, device=device, dtype=torch.float32))))
