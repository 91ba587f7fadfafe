"""Generators of long convolution kernels: few parameters in, as many taps as asked for out.

Every generator maps a length to taps `[rows, length]` in fp32 (fp64 for fp64 parameters), one row for each filter. All
are prefix-consistent: the first t taps don't depend on the length. All are stable by construction: `l1_bound()` bounds
the sum of absolute taps at any length, so that no clipping is needed in the training loop.

| name | taps | source |
|---|---|---|
| multiscale | sub-kernels of d taps; the i-th is stretched by 2^i and decayed | SGConv, arXiv:2210.09298, section 3 |
| explicit | free taps up to max_len under a decaying window, zero beyond | Fu et al., arXiv:2302.06646 |
| modal | a sum of damped complex exponentials | S4D, arXiv:2206.11893; LaughingHyena, arXiv:2310.18780 |
| implicit | a small MLP of the lag under a decaying window | Hyena, arXiv:2302.10866 |
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chela_plugin.kernels.folded_taps.reference import multiscale_taps
from chela_plugin.kernels.precision import precise

from .initial import decay_init, no_weight_decay

LONG_KERNELS = ("multiscale", "explicit", "modal", "implicit")


def create_long_kernel(kind: str, rows: int, *, max_len: int, **factory) -> LongKernel:
    """The generator called `kind`; `max_len` matters to `explicit` only."""
    if kind == "explicit":
        return ExplicitKernel(rows, max_len=max_len, **factory)
    classes = {"multiscale": MultiscaleKernel, "modal": ModalKernel, "implicit": ImplicitKernel}
    if kind not in classes:
        raise ValueError(f"unknown long kernel {kind!r}; choose one of {', '.join(LONG_KERNELS)}")
    return classes[kind](rows, **factory)


class LongKernel(nn.Module):
    """Base of the generators."""

    def reset_parameters(self) -> None:
        raise NotImplementedError

    def taps(self, length: int) -> Tensor:
        """`[rows, length]`; column j is the tap at lag j."""
        raise NotImplementedError

    def source(self, length: int) -> tuple[Tensor, Tensor | None]:
        """What `kernels.folded_taps` makes `length` taps from: the taps themselves, or a generator that it knows."""
        return self.taps(length), None

    def l1_bound(self) -> Tensor:
        """`[rows]`: no sum of absolute taps exceeds it, whatever the length."""
        raise NotImplementedError

    def bytes_a_lag(self) -> int:
        """What `taps` holds at once for each lag, in bytes, without a gradient; the taps themselves here."""
        first = next(self.parameters())
        return first.shape[0] * (8 if first.dtype == torch.float64 else 4)


class MultiscaleKernel(LongKernel):
    """SGConv's kernel without its length limit.

    Scale i covers the d 2^i lags from d (2^i - 1) on. There the tap is the i-th sub-kernel, stretched linearly by 2^i,
    times (ratio / 2)^i with a ratio in (0, 1), so that scale i adds at most ratio^i max|u| d to the l1 norm. Beyond the
    last sub-kernel the last one is stretched on: any length, O(d log L) parameters.
    """

    def __init__(self, rows: int, *, sub_taps: int = 16, scales: int = 8, device=None, dtype=None):
        super().__init__()
        self.sub_kernels = no_weight_decay(
            nn.Parameter(torch.empty(rows, scales, sub_taps, device=device, dtype=dtype))
        )
        self.ratio_logit = no_weight_decay(nn.Parameter(torch.empty(rows, device=device, dtype=dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.sub_kernels, std=self.sub_kernels.shape[-1] ** -0.5)
        nn.init.constant_(self.ratio_logit, 2.0)  # ratio 0.88: the far scales are heard from the start

    def ratio(self) -> Tensor:
        return torch.sigmoid(precise(self.ratio_logit))

    def taps(self, length: int) -> Tensor:
        return multiscale_taps(precise(self.sub_kernels), precise(self.ratio_logit), length)

    def source(self, length: int) -> tuple[Tensor, Tensor | None]:
        return self.sub_kernels, self.ratio_logit

    def l1_bound(self) -> Tensor:
        u, ratio = precise(self.sub_kernels), self.ratio()
        # Linear interpolation never exceeds the largest sub-tap: scale i has d 2^i taps of at most max|u| (ratio /
        # 2)^i.
        return u.abs().amax(dim=(1, 2)) * u.shape[-1] / (1 - ratio)


class ExplicitKernel(LongKernel):
    """Free taps up to `max_len` times a learned exponential window; zero beyond, so any length may be asked for."""

    def __init__(self, rows: int, *, max_len: int, device=None, dtype=None):
        super().__init__()
        self.free_taps = no_weight_decay(nn.Parameter(torch.empty(rows, max_len, device=device, dtype=dtype)))
        self.log_time = no_weight_decay(nn.Parameter(torch.empty(rows, device=device, dtype=dtype)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        rows, max_len = self.free_taps.shape
        time = decay_init(rows, 8, max(max_len / 2, 16), device=self.log_time.device)
        self.log_time.copy_(time.log())
        nn.init.normal_(self.free_taps)
        self.free_taps.mul_(time.rsqrt()[:, None].to(self.free_taps.dtype))

    def taps(self, length: int) -> Tensor:
        free = precise(self.free_taps)[:, :length]
        lag = torch.arange(free.shape[1], device=free.device, dtype=free.dtype)
        windowed = free * torch.exp(-lag * torch.exp(-precise(self.log_time))[:, None])
        return F.pad(windowed, (0, length - free.shape[1]))

    def l1_bound(self) -> Tensor:
        return precise(self.free_taps).abs().sum(dim=1)


class ModalKernel(LongKernel):
    """tap_j = Re sum_m c_m (1 - |p_m|) p_m^j with |p_m| < 1: a diagonal state space model, with an O(modes) step.

    The factor 1 - |p| keeps the l1 norm below sum_m |c_m|, whatever the time constants learn to be.
    """

    def __init__(self, rows: int, *, modes: int = 8, device=None, dtype=None):
        super().__init__()
        self.log_time = no_weight_decay(nn.Parameter(torch.empty(rows, modes, device=device, dtype=dtype)))
        self.frequency = no_weight_decay(nn.Parameter(torch.empty(rows, modes, device=device, dtype=dtype)))
        self.residue = no_weight_decay(nn.Parameter(torch.empty(rows, modes, 2, device=device, dtype=dtype)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        rows, modes = self.log_time.shape
        self.log_time.copy_(decay_init(modes, 2, 1024, device=self.log_time.device).log().expand(rows, modes))
        # Each mode turns up to once in its own time constant: slow modes smooth, fast ones oscillate.
        nn.init.uniform_(self.frequency, 0, 2 * math.pi)
        self.frequency.mul_(torch.exp(-self.log_time))
        nn.init.normal_(self.residue)

    def poles(self) -> tuple[Tensor, Tensor]:
        """log|p| (negative) and angle of p, each `[rows, modes]`."""
        return -torch.exp(-precise(self.log_time)), precise(self.frequency)

    def residues(self) -> Tensor:
        """c_m (1 - |p_m|), complex `[rows, modes]`."""
        log_radius, _ = self.poles()
        return torch.view_as_complex(precise(self.residue).contiguous()) * -torch.expm1(log_radius)

    def powers(self, lags: Tensor) -> Tensor:
        """p^lag, complex `[rows, modes, lags]`; the angle is reduced in fp64, for it grows with the lag."""
        log_radius, angle = self.poles()
        lags = lags.to(torch.float64)
        turned = torch.remainder(angle.double()[..., None] * lags, 2 * math.pi).to(angle.dtype)
        return torch.polar(torch.exp(log_radius[..., None] * lags.to(log_radius.dtype)), turned)

    def taps(self, length: int) -> Tensor:
        powers = self.powers(torch.arange(length, device=self.log_time.device))
        return torch.einsum("rm,rml->rl", self.residues(), powers).real

    def bytes_a_lag(self) -> int:
        """All modes' powers, complex, and their angles in fp64."""
        return self.log_time.numel() * (24 if self.log_time.dtype == torch.float64 else 16)

    def l1_bound(self) -> Tensor:
        return precise(self.residue).norm(dim=-1).sum(dim=1)


class ImplicitKernel(LongKernel):
    """tap_j = tanh(MLP(features of j)) (1 - w) w^j with a learned window w per row: bounded by 1 in l1.

    The features are sines and cosines of the lag at fixed log-spaced periods: no length enters, so taps are
    prefix-consistent.
    """

    def __init__(self, rows: int, *, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        width = 32
        self.periods = 12
        self.hidden = nn.ModuleList(nn.Linear(n, width, **factory) for n in (2 * self.periods, width))
        self.out = nn.Linear(width, rows, **factory)
        self.log_time = no_weight_decay(nn.Parameter(torch.empty(rows, **factory)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for layer in (*self.hidden, self.out):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)
        rows = len(self.log_time)
        self.log_time.copy_(decay_init(rows, 8, 1024, device=self.log_time.device).log())

    def taps(self, length: int) -> Tensor:
        time = torch.exp(precise(self.log_time))
        lag = torch.arange(length, device=time.device, dtype=time.dtype)
        period = torch.logspace(math.log10(2), math.log10(8192), self.periods, device=time.device, dtype=time.dtype)
        angle = 2 * math.pi * torch.remainder(lag[:, None], period) / period
        h = torch.cat([angle.sin(), angle.cos()], dim=-1)
        for layer in self.hidden:
            # Sine as in Hyena, section 3.3. An isinstance for mypy would be false in TorchScript, which also reads any
            # text behind `type: ignore` as a type.
            h = torch.sin(F.linear(h, precise(layer.weight), precise(layer.bias)))  # type: ignore[arg-type]
        h = torch.tanh(F.linear(h, precise(self.out.weight), precise(self.out.bias))).T
        return h * -torch.expm1(-1 / time)[:, None] * torch.exp(-lag / time[:, None])

    def bytes_a_lag(self) -> int:
        """The features and one hidden layer, beside the taps."""
        wide = 8 if self.log_time.dtype == torch.float64 else 4
        return (len(self.log_time) + 2 * self.periods + self.out.in_features) * wide

    def l1_bound(self) -> Tensor:
        return torch.ones_like(precise(self.log_time))
