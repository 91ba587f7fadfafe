"""`conv`: the short-long convolution alone, between a projection, a gate and an output projection."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chela_plugin.kernels.backend import backend
from chela_plugin.layers import Cache, Mixer, ShortLongConv
from chela_plugin.layers.initial import reset_projections
from chela_plugin.layers.plain import on_grid, plain_conv, with_weights_of


class Conv(Mixer):
    """Y = (SiLU(S(X Wi)) * SiLU(X Wg)) Wo with S the short-long convolution; what CHELA is without its attention.

    Args:
        dim: channels D.
        expand: inner width over D; 4/3 gives softmax attention's 4 D^2 parameters.
        short, long, norm, long_gain, dims, max_len: see `layers.ShortLongConv`; None chooses as CHELA does.
        depth: number of blocks of the host; scales the output projection's initial weights by (2 depth)^-0.5.
        layer_idx: accepted because every mixer factory takes it; all layers are alike here.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool,
        depth: int | None = None,
        layer_idx: int | None = None,
        device=None,
        dtype=None,
        expand: float = 4 / 3,
        short: tuple[int, ...] = (3, 7),
        long: Literal["multiscale", "explicit", "modal", "implicit", "none"] | None = None,
        norm: Literal["scale", "batch"] | None = None,
        long_gain: float = 0.1,
        dims: Literal[1, 2] = 1,
        max_len: int = 1024,
    ):
        super().__init__(dim, causal=causal)
        factory = {"device": device, "dtype": dtype}
        if not 0 < expand < math.inf:
            raise ValueError(f"conv: expand must be above 0 and finite, got {expand}")
        self.depth = depth
        self.uses_grid = dims == 2
        inner = max(round(expand * dim / 8), 1) * 8
        self.wi = nn.Linear(dim, inner, bias=False, **factory)
        self.wg = nn.Linear(dim, inner, bias=False, **factory)
        self.conv = ShortLongConv(
            inner,
            causal=causal,
            short=short,
            long=long,
            norm=norm,
            long_gain=long_gain,
            dims=dims,
            max_len=max_len,
            **factory,
        )
        self.proj = nn.Linear(inner, dim, bias=False, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        reset_projections(self.wi, self.wg, output=self.proj, depth=self.depth)
        self.conv.reset_parameters()

    def path(self, device: torch.device | str) -> str:
        return backend(device, self.proj.weight.dtype)

    def mix(self, x: Tensor, *, mask: Tensor | None, cache: Cache | None, grid: tuple[int, int] | None) -> Tensor:
        if mask is not None:
            x = x * mask[..., None]
        z = self.conv(self.wi(x), mask=mask, cache=cache, grid=grid, silu=True)
        return self.proj(z * F.silu(self.wg(x)))

    def init_cache(self, batch_size: int, *, device=None, dtype=None, max_tokens: int | None = None) -> Cache:
        return self.conv.init_cache(batch_size, device=device, dtype=dtype, max_tokens=max_tokens)

    def advance(self, cache: Cache) -> None:
        self.conv.advance(cache)

    def plain(self) -> nn.Module:
        """The same weights in a form that TorchScript compiles; two-sided mixers only."""
        twin = with_weights_of(self, PlainConvMixer)
        twin._modules["conv"] = plain_conv(self.conv)
        return twin

    def reparameterize(self) -> Conv:
        """Fold the convolution's branches, in place; for inference."""
        self.conv.reparameterize()
        return self


class PlainConvMixer(Conv):
    """The same for TorchScript and ONNX: two-sided, on a grid, or on a sequence with `dims=1`."""

    __constants__ = ("uses_grid",)

    def __prepare_scriptable__(self) -> nn.Module:
        return self

    def path(self, device: torch.device | str) -> str:
        return "torch"

    # Fewer arguments than its base on purpose, and TorchScript reads any text behind `type: ignore` as a type.
    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:  # type: ignore[override]
        z = F.silu(self.conv(on_grid(self.wi(x), grid, self.uses_grid)).flatten(2).transpose(1, 2))
        return self.proj(z * F.silu(self.wg(x)))
