"""Plain forms: what TorchScript compiles and every ONNX exporter knows; here the convolution's, and what mixers' share.

Same weights and same function as `ShortLongConv`, two-sided only, without caches and masks, in real arithmetic: no FFT,
no operator of ours. The long kernels are depthwise convolutions here, O(T) taps a token, which for the rows and columns
of an image is little. Branches run one by one as in the definition; `reparameterize()` folds them. Each mixer's plain
form stands beside the mixer (`chela.PlainChela`).
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .short_long_conv import ShortLongConv

Form = TypeVar("Form", bound=nn.Module)


def with_weights_of(module: nn.Module, form: type[Form]) -> Form:
    """A `form`, a subclass of the module's class that adds no state, over the module's own parameters and buffers."""
    twin = form.__new__(form)
    twin.__dict__.update(module.__dict__)
    for own in ("_parameters", "_buffers", "_modules"):  # tables of its own: folding one leaves the other whole
        twin.__dict__[own] = dict(module.__dict__[own])
    return twin


class PlainConv(ShortLongConv):
    """`ShortLongConv` on images `[B, D, h, w]`; a sequence is an image of one row."""

    __constants__ = ("dims", "folded", "group_size", "sides")

    def __prepare_scriptable__(self) -> nn.Module:
        return self

    # Fewer arguments than its base on purpose, and TorchScript reads any text behind `type: ignore` as a type.
    def forward(self, image: Tensor) -> Tensor:  # type: ignore[override]
        # TorchScript leaves out the branch not taken of an if and else over a bool, a None or a hasattr, nothing else.
        if self.folded:
            y = depthwise(image, self.short_taps, self.dims) + self.bias[:, None, None]
            if self.long_kernel is not None:
                y = y + self.long_branch(image) * self.long_scale[:, None, None]
        else:
            branches = [depthwise(image, kernel, self.dims) for kernel in self.short_kernels]
            if self.long_kernel is not None:
                branches.append(self.long_branch(image))
            y = self.normed(branches)
        return y

    def normed(self, branches: list[Tensor]) -> Tensor:
        """The sum of the branches, each under its norm."""
        y = torch.zeros_like(branches[0])
        if hasattr(self, "norms"):
            for i, norm in enumerate(self.norms):
                y = y + norm.plain(branches[i])  # type: ignore[operator]
        else:
            for i, branch in enumerate(branches):
                y = y + branch * self.scales[i][:, None, None]
            y = y + self.bias[:, None, None]
        return y

    def long_branch(self, image: Tensor) -> Tensor:
        """The long kernel before its norm: along the row, and with `dims=2` along the column too."""
        h, w = image.shape[2], image.shape[3]
        assert self.long_kernel is not None
        taps = self.long_kernel.taps(max(h, w))
        taps = taps.view(self.sides, -1, taps.shape[-1]).repeat_interleave(self.group_size, dim=1)
        y = correlate(image, mirrored(taps[0, :, :w], taps[1, :, :w]).unsqueeze(1))
        if self.dims == 2:
            y = y + correlate(image, mirrored(taps[2, :, :h], taps[3, :, :h]).unsqueeze(2))
        return y


def depthwise(image: Tensor, kernel: Tensor, dims: int) -> Tensor:
    """Convolution, not correlation, of every channel: kernel `[D, k, k]`, or `[D, k]` with `dims=1`; odd sizes."""
    kernel = kernel if dims == 2 else kernel.unsqueeze(1)
    return correlate(image, kernel.flip(1, 2))


def mirrored(ahead: Tensor, behind: Tensor) -> Tensor:
    """One-sided taps `[D, L]` each way to the weights `[D, 2L - 1]` that correlate; `behind`'s first tap is unused.

    The mirror image of `folded_taps.two_sided`; not its `flip`, because ONNX can't reverse the nothing of L = 1.
    """
    return torch.cat([ahead.flip(-1), behind[:, 1:]], dim=-1)


def correlate(image: Tensor, weight: Tensor) -> Tensor:
    """`[B, D, h, w]` with one weight of odd size for every channel, `[D, kh, kw]`; same size, zeros outside."""
    padding = [weight.shape[1] // 2, weight.shape[2] // 2]
    return F.conv2d(image, weight.unsqueeze(1).to(image.dtype), None, [1, 1], padding, [1, 1], image.shape[1])


def on_grid(x: Tensor, grid: tuple[int, int] | None, uses_grid: bool) -> Tensor:
    """Tokens `[B, T, D]` as an image `[B, D, h, w]`; without a grid, of one row."""
    if grid is None:
        if uses_grid:
            raise ValueError("this mixer is two-dimensional and needs grid=(height, width)")
        return x.transpose(1, 2).unsqueeze(2)
    return x.transpose(1, 2).unflatten(2, [grid[0], grid[1]])


def plain_conv(conv: ShortLongConv) -> PlainConv:
    """Raises ValueError for a causal convolution: language models are not deployed this way."""
    if conv.causal:
        raise ValueError("a causal short-long convolution has no plain form; torch.export takes it as it is")
    return with_weights_of(conv, PlainConv)
