"""The short-long convolution of CHELA: N_l(X * k_long) + sum_i N_i(X * k_i), foldable into one convolution.

Dim suffixes: B batch, T tokens, D channels, h x w the grid of an image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chela_plugin.kernels.backend import backend, traced
from chela_plugin.kernels.folded_taps import folded_taps
from chela_plugin.kernels.folded_taps.reference import two_sided
from chela_plugin.kernels.long_conv import MAX_SHORT, long_conv, modal_conv, short_modal_conv
from chela_plugin.kernels.precision import precise

from . import grid_short_long, streaming
from .long_kernel import LONG_KERNELS, LongKernel, ModalKernel, create_long_kernel
from .mixer import Cache

# What the taps of one convolution may take while they are generated, far above any useful filter: 1,024 channels of a
# million taps. It turns a mistaken length into an error before the device runs out of memory.
MAX_TAPS_BYTES = 8 << 30

# Tokens from which a two-sided modal filter, two scans, is faster than a Toeplitz product with all its taps (estimated
# from the times of the two on an H100; below it the product is at most twice the cost of its copies).
TWO_SIDED_FROM = 1024


class BranchNorm(nn.BatchNorm1d):
    """BatchNorm over the tokens of `[B, T, D]`, skipping padding; folds into the branch's taps after training."""

    @torch.jit.unused
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None or not self.training:
            return super().forward(x.flatten(0, -2)).view_as(x)
        return torch.zeros_like(x).masked_scatter(mask[..., None], super().forward(x[mask]))

    def plain(self, image: Tensor) -> Tensor:
        """The same over the places of `[B, D, h, w]` (`plain.py`)."""
        return F.batch_norm(
            image,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            0.1,  # BatchNorm's default momentum, which nothing here changes
            self.eps,
        )

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """What this norm is in eval mode: y = x * scale + shift, each `[D]`."""
        assert self.running_var is not None and self.running_mean is not None
        scale = precise(self.weight) * torch.rsqrt(precise(self.running_var) + self.eps)
        return scale, precise(self.bias) - precise(self.running_mean) * scale


class ShortLongConv(nn.Module):
    """Depthwise short and long convolutions in parallel, each normalised, then summed (arXiv:2406.08128).

    Args:
        dim: channels D.
        causal: one-sided kernels, or two-sided ones.
        short: taps of the short kernels; odd when not causal. With `dims=2` they are k x k.
        long: generator of the long kernel (`long_kernel.py`), or 'none'; None: `modal` where causal, else `multiscale`.
        norm: `scale`, a learned scale for each channel and branch, which folds while training too and mixes nothing
            over time; or `batch`, the paper's BatchNorm, which folds in eval mode. None: `scale` where causal, else
            `batch`.
        long_gain: initial scale of the long branch against 1 for the short ones; a long branch that starts at full
            strength hurt small language models (README, "How close to the paper").
        dims: 1, or 2 for tokens on a grid: then the long kernel is a row kernel plus a column kernel, each as long as
            the grid. No parameter depends on the grid's size.
        group_size: this many neighbouring channels share one long kernel (their scales differ).
        max_len: length of `explicit` kernels.

    `reparameterize()` folds all branches into one kernel and one bias (`dims=2`: one k x k kernel, one row and one
    column kernel, one bias, since no dense kernel of the grid's size is ever worth its cost).
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool,
        short: Sequence[int] = (3, 7),
        long: str | None = "multiscale",
        norm: str | None = "scale",
        long_gain: float = 0.1,
        dims: int = 1,
        group_size: int = 16,
        max_len: int = 1024,
        device=None,
        dtype=None,
    ):
        super().__init__()
        long = long or ("modal" if causal else "multiscale")
        norm = norm or ("scale" if causal else "batch")
        if dims not in (1, 2):
            raise ValueError(f"dims is 1 for sequences or 2 for images, got {dims}")
        if dims == 2 and causal:
            raise ValueError("a two-dimensional short-long convolution has no causal form; use dims=1")
        if norm not in ("scale", "batch"):
            raise ValueError(f"norm is 'scale' or 'batch', got {norm!r}")
        if long != "none" and long not in LONG_KERNELS:
            raise ValueError(f"long is one of {', '.join((*LONG_KERNELS, 'none'))}, got {long!r}")
        if any(k < 1 for k in short) or not (short or long != "none"):
            raise ValueError(
                f"short kernels have at least one tap each, and there is at least one branch; got {tuple(short)}"
            )
        if not causal and any(k % 2 == 0 for k in short):
            raise ValueError(f"two-sided short kernels have an odd number of taps, got {tuple(short)}")
        if group_size < 1 or max_len < 1:
            raise ValueError(f"group_size and max_len are at least 1, got {group_size} and {max_len}")
        factory = {"device": device, "dtype": dtype}
        self.dim, self.causal, self.dims, self.norm = dim, causal, dims, norm
        self.short, self.long, self.long_gain = tuple(short), long, long_gain
        self.short_kernels = nn.ParameterList(
            nn.Parameter(torch.empty(dim, *(k,) * dims, **factory)) for k in self.short
        )
        self.group_size = next(g for g in range(min(group_size, dim), 0, -1) if dim % g == 0)
        # Filters of one group: causal 1; two-sided 2; rows and columns, two-sided, 4.
        self.sides = 1 if causal else 2 * dims
        # Of a grid, 8 (2^4 - 1) = 120 cells each way before the last scale repeats.
        sizes = {"sub_taps": 8, "scales": 4} if (dims, long) == (2, "multiscale") else {}
        rows = self.sides * dim // self.group_size
        self.long_kernel: LongKernel | None = None
        if long != "none":
            self.long_kernel = create_long_kernel(long, rows, max_len=max_len, **sizes, **factory)
        branches = len(self.short) + (long != "none")
        if norm == "batch":
            self.norms = nn.ModuleList(BranchNorm(dim, **factory) for _ in range(branches))
        else:
            self.scales = nn.Parameter(torch.empty(branches, dim, **factory))
            self.bias = nn.Parameter(torch.empty(dim, **factory))
        self.folded = False
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Short kernels start as plain depthwise convolutions do; the long branch starts at `long_gain`."""
        for kernel in self.short_kernels:
            nn.init.normal_(kernel, std=kernel[0].numel() ** -0.5)
        if self.long_kernel is not None:
            self.long_kernel.reset_parameters()
        gains = [1.0] * len(self.short) + [self.long_gain] * (self.long != "none")
        if self.norm == "batch":
            for norm, gain in zip(self.branch_norms(), gains, strict=True):
                norm.reset_parameters()
                nn.init.constant_(norm.weight, gain)
        else:
            self.scales.copy_(torch.tensor(gains, device=self.scales.device)[:, None].expand_as(self.scales))
            nn.init.zeros_(self.bias)

    def branch_norms(self) -> list[BranchNorm]:
        return [norm for norm in self.norms if isinstance(norm, BranchNorm)]

    # The branches, folded --------------------------------------------------------------------------------------------

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Scales `[branches, D]` of all branches and their one bias `[D]`, as in eval mode."""
        if self.norm == "scale":
            return precise(self.scales), precise(self.bias)
        scales, shifts = zip(*(norm.scale_and_shift() for norm in self.branch_norms()), strict=True)
        return torch.stack(scales), torch.stack(shifts).sum(0)

    def long_taps(self, length: int) -> Tensor:
        """Taps of the long kernel before its norm: `[sides, D, length]`. ValueError beyond MAX_TAPS_BYTES."""
        self.check_length(length)
        assert self.long_kernel is not None
        taps = folded_taps(*self.long_kernel.source(length), length=length).view(self.sides, -1, length)
        return taps.repeat_interleave(self.group_size, dim=1)

    def check_length(self, length: int) -> None:
        assert self.long_kernel is not None
        if not torch.compiler.is_compiling():
            wanted = (self.long_kernel.bytes_a_lag() + self.sides * self.dim * 4) * length
            if wanted > MAX_TAPS_BYTES:
                raise ValueError(
                    f"{length:,} taps of {self.dim} channels would take {wanted / 2**30:.1f} GiB, more than the bound "
                    f"of {MAX_TAPS_BYTES / 2**30:g} GiB; use shorter sequences or, for causal convolutions, "
                    "long='modal', which needs no taps"
                )

    def folded_short(self) -> Tensor:
        """The short kernels under their scales, as one kernel: `[D, k]` or `[D, k, k]` with k the widest."""
        if self.folded:
            return precise(self.short_taps)
        widest = max(self.short, default=1)
        if self.dims == 1 and self.short:
            length = widest if self.causal else (widest + 1) // 2
            return folded_taps(
                None, length=length, scales=self.branch_scales(), kernels=list(self.short_kernels), causal=self.causal
            )
        scales, _ = self.scale_and_shift()
        total = scales.new_zeros(self.dim, *(widest,) * self.dims)
        for kernel, scale in zip(self.short_kernels, scales, strict=False):
            missing = widest - kernel.shape[-1]
            pad = (0, missing) if self.causal else (missing // 2, missing // 2) * self.dims
            total = total + F.pad(precise(kernel) * scale.view(-1, *(1,) * self.dims), pad)
        return total

    def branch_scales(self) -> Tensor:
        """`[branches, D]`, as in eval mode, in the parameters' own dtype where they are parameters."""
        return self.scales if self.norm == "scale" else self.scale_and_shift()[0]

    def branch_bias(self) -> Tensor:
        """`[D]`, likewise."""
        return self.bias if self.folded or self.norm == "scale" else self.scale_and_shift()[1]

    def folded_bias(self) -> Tensor:
        return precise(self.bias) if self.folded else self.scale_and_shift()[1]

    def folded_long_scale(self) -> Tensor:
        """`[D]`, of the long kernel's taps."""
        return precise(self.long_scale) if self.folded else self.scale_and_shift()[0][-1]

    def folded_taps(self, length: int) -> Tensor:
        """All branches as one filter (`dims=1`): `[D, max(length, k)]`, or two-sided `[D, 2 max(...) - 1]`."""
        if self.long == "none":
            return self.folded_short()
        widest = max(self.short, default=1)
        reach = widest if self.causal else (widest + 1) // 2
        length = max(length, reach)
        self.check_length(length)
        assert self.long_kernel is not None
        return folded_taps(
            *self.long_kernel.source(length),
            length=length,
            scales=self.long_scale[None] if self.folded else self.branch_scales(),
            kernels=[self.short_taps] if self.folded else list(self.short_kernels),
            causal=self.causal,
        )

    @torch.no_grad()
    def reparameterize(self) -> ShortLongConv:
        """Fold every branch's norm and all short kernels into one kernel and bias, in place; for inference."""
        if self.folded:
            return self
        if self.norm == "batch" and self.training:
            raise RuntimeError("batch norms fold with their running statistics: call eval() before reparameterize()")
        like = next(self.parameters())
        short, bias = self.folded_short(), self.folded_bias()
        if self.long != "none":
            self.long_scale = nn.Parameter(self.folded_long_scale().to(like.dtype))
        self.short_kernels = nn.ParameterList()
        if self.norm == "batch":
            del self.norms
        else:
            del self.scales, self.bias
        self.short_taps = nn.Parameter(short.to(like.dtype))
        self.bias = nn.Parameter(bias.to(like.dtype))
        self.folded = True
        return self

    # The three forms -------------------------------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        grid: tuple[int, int] | None = None,
        silu: bool = False,
    ) -> Tensor:
        """`[B, T, D]` to `[B, T, D]`; x is zero where `mask` (bool `[B, T]`) is False, which `batch` must know of.

        `silu`: SiLU of the result, and its gradient, in the same pass where the branches are one convolution.
        """
        if cache is not None:
            return streaming.continued(self, x, mask, cache, silu)
        if self.runs_structured(x):
            return self.structured(x, silu)
        if self.dims == 2:
            return grid_short_long.convolved(self, x, mask, grid, silu)
        if self.folds():
            return self.exact(x, silu)
        branches = [self.branch(i, x) for i in range(len(self.branch_norms()))]
        y = torch.stack([norm(y, mask) for norm, y in zip(self.branch_norms(), branches, strict=True)]).sum(0)
        return F.silu(y) if silu else y

    def runs_structured(self, x: Tensor) -> bool:
        """Whether all branches run as short taps and a state of the modes, at a cost a token that T does not change.

        Two-sided ones do from TWO_SIDED_FROM tokens on; the rows and columns of images are short. The plain form does
        not while it is traced: its loop over chunks would make a graph for each T.
        """
        return (
            isinstance(self.long_kernel, ModalKernel)
            and (self.causal or (self.dims == 1 and x.shape[1] >= TWO_SIDED_FROM))
            and max(self.short, default=1) <= MAX_SHORT
            and self.folds()
            and not (traced(x) and backend(x.device, x.dtype) == "reference")
        )

    def folds(self) -> bool:
        """Whether the branches are one convolution: always, but for batch norms while training."""
        return self.folded or self.norm == "scale" or not self.training

    def structured(self, x: Tensor, silu: bool) -> Tensor:
        modal = self.long_kernel
        assert isinstance(modal, ModalKernel)
        modes, bias = (modal.log_time, modal.frequency, modal.residue), self.branch_bias()
        if self.folded:
            short, scale = self.short_taps, self.long_scale
            return modal_conv(x, *modes, short=short, scale=scale, bias=bias, silu=silu, causal=self.causal)
        kernels, scales = list(self.short_kernels), self.branch_scales()
        return short_modal_conv(x, *modes, kernels=kernels, scales=scales, bias=bias, silu=silu, causal=self.causal)

    def exact(self, x: Tensor, silu: bool) -> Tensor:
        """All branches of a sequence as one filter as long as it."""
        return long_conv(x, self.folded_taps(x.shape[1]), self.branch_bias(), causal=self.causal, silu=silu)

    def branch(self, i: int, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Branch i before its norm."""
        if grid is not None:
            return grid_short_long.branch(self, i, x, grid)
        if i < len(self.short):
            return long_conv(x, precise(self.short_kernels[i]), causal=self.causal)
        taps = self.long_taps(x.shape[1])
        return long_conv(x, taps[0] if self.causal else two_sided(taps[0], taps[1]), causal=self.causal)

    def init_cache(self, batch_size: int, *, device=None, dtype=None, max_tokens: int | None = None) -> Cache:
        """An empty history, by default where and as the weights are; what it keeps and costs: `streaming.py`."""
        weight = next(self.parameters())
        return streaming.init_cache(self, batch_size, device or weight.device, dtype or weight.dtype, max_tokens)

    def advance(self, cache: Cache) -> None:
        """After each replay of a CUDA graph that holds a step: what the graph can't do (`streaming.py`)."""
        if streaming.looks_ahead(self):
            streaming.advance(self, cache)

    def extra_repr(self) -> str:
        names = ("causal", "short", "long", "norm", "dims")
        return f"{self.dim}, " + ", ".join(f"{name}={getattr(self, name)}" for name in names)
