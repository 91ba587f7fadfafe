"""Suite `operators`: linear attention, long convolution, norm with gate, beside what others offer for the same.

Their finer questions (errors against fp64, block sizes, odd shapes) have scripts of their own under `benchmarks/`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from chela_plugin.bench import peers
from chela_plugin.bench.cases import Build, Case, Work
from chela_plugin.bench.layers import dtype_on
from chela_plugin.bench.timing import BANDWIDTH, passes
from chela_plugin.kernels.backend import backend
from chela_plugin.kernels.gated_norm import gated_norm, reference
from chela_plugin.kernels.linear_attention import linear_attention
from chela_plugin.kernels.long_conv import long_conv

WHATS = ("forward", "forward_backward")
SIZES = {  # tokens, lengths, heads, key and value width, channels of the convolution
    "cuda": (32768, (1024, 2048, 4096, 8192, 32768), 16, 128, 1024),
    "cpu": (256, (64, 128), 2, 16, 32),
}


def cases(device: torch.device) -> list[Case]:
    tokens, lengths, heads, width, channels = SIZES[device.type]
    found = []
    for length in lengths:
        batch = tokens // length
        found.append(attention_case(batch, length, heads, width, device))
        found.append(convolution_case(batch, length, channels, device))
    found.append(norm_case(tokens // lengths[0], lengths[0], heads, width, device))
    return found


def case(op: str, axes: dict[str, int | str], inputs: int, outputs: int, build: dict[str, Build], tokens: int) -> Case:
    """`inputs` and `outputs`: bytes of the forward pass; backward reads inputs and dy, and writes the gradients."""
    forward = 1e3 * (inputs + outputs) / BANDWIDTH
    both = 1e3 * (3 * inputs + 2 * outputs) / BANDWIDTH
    units = dict.fromkeys(WHATS, (tokens, "tokens"))
    return Case({"op": op, **axes}, WHATS, build, units, {"forward": forward, "forward_backward": both})


def work(function: Callable[..., Tensor], leaves: list[Tensor], dy: Tensor, path: str) -> Work:
    return Work(passes(function, leaves, dy), path)


# Linear attention -----------------------------------------------------------------------------------------------------


def attention_case(batch: int, time: int, heads: int, width: int, device: torch.device) -> Case:
    def inputs() -> list[Tensor]:
        torch.manual_seed(0)
        return [torch.randn(batch, time, heads, width, device=device, dtype=dtype_on(device)) for _ in range(4)]

    def ours(decay: str | None, causal: bool) -> Work:
        q, k, v, dy = inputs()
        leaves = [q, k, v]
        if decay == "token":
            leaves.append(-F.softplus(torch.randn(batch, time, heads, device=device) - 4))
        elif decay == "head":
            leaves.append(-torch.linspace(0.004, 0.1, heads, device=device))

        def function(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None) -> Tensor:
            return linear_attention(q, k, v, log_decay, causal=causal)[0]

        return work(function, leaves, dy, backend(device, q.dtype))

    def fla(name: str) -> Work:
        peers.needs_cuda(device, "fla")
        *leaves, dy = inputs()
        function = getattr(peers.fla("ops.simple_gla"), name)
        return work(lambda q, k, v: function(q, k, v)[0], leaves, dy, "peer")

    def softmax() -> Work:
        *leaves, dy = inputs()

        def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

        return work(function, leaves, dy, "sdpa")

    size = batch * time * heads * width * inputs_size(device)
    build: dict[str, Build] = {
        "ours, no decay": partial(ours, None, True),
        "ours, decay per head": partial(ours, "head", True),
        "ours, decay per token": partial(ours, "token", True),
        "ours, bidirectional": partial(ours, None, False),
        "fla chunk_simple_gla": partial(fla, "chunk_simple_gla"),
        "torch SDPA, causal": softmax,
    }
    axes: dict[str, int | str] = {"B": batch, "T": time, "H": heads, "K": width, "V": width}
    return case("linear_attention", axes, 3 * size, size, build, batch * time)


# Long convolution -----------------------------------------------------------------------------------------------------


def convolution_case(batch: int, time: int, channels: int, device: torch.device) -> Case:
    def inputs() -> list[Tensor]:
        torch.manual_seed(0)
        x, dy = (torch.randn(batch, time, channels, device=device, dtype=dtype_on(device)) for _ in range(2))
        taps = torch.randn(channels, time, device=device) * time**-0.5
        return [x, taps, dy]

    def ours() -> Work:
        *leaves, dy = inputs()
        return work(long_conv, leaves, dy, backend(device, dy.dtype))

    def rfft() -> Work:
        """[B, D, T], torch's faster order."""
        x, taps, dy = inputs()

        def function(x: Tensor, taps: Tensor) -> Tensor:
            size = 2 * time
            spectrum = torch.fft.rfft(x.float(), n=size) * torch.fft.rfft(taps, n=size)
            return torch.fft.irfft(spectrum, n=size)[..., :time].to(x.dtype)

        return work(function, [x.transpose(1, 2).contiguous(), taps], dy.transpose(1, 2).contiguous(), "torch")

    size = batch * time * channels * inputs_size(device)
    build: dict[str, Build] = {"ours, [B,T,D]": ours, "torch rfft, [B,D,T]": rfft}
    axes: dict[str, int | str] = {"B": batch, "T": time, "D": channels}
    return case("long_conv", axes, size + 4 * channels * time, size, build, batch * time)


# Norm and gate --------------------------------------------------------------------------------------------------------


def norm_case(batch: int, time: int, heads: int, width: int, device: torch.device) -> Case:
    def build_with(function: Callable[..., Tensor], path: str) -> Work:
        torch.manual_seed(0)
        dtype = dtype_on(device)
        o, v = (torch.randn(batch, time, heads, width, device=device, dtype=dtype) for _ in range(2))
        gate, dy = (torch.randn(batch, time, heads * width, device=device, dtype=dtype) for _ in range(2))
        weight, skip = (
            torch.ones(heads, width, device=device, dtype=dtype),
            torch.ones(heads, device=device, dtype=dtype),
        )
        return work(function, [o, weight, gate, v, skip], dy, path)

    def fused(o: Tensor, weight: Tensor, gate: Tensor, v: Tensor, skip: Tensor) -> Tensor:
        return gated_norm(o, weight, gate, v=v, skip=skip)

    def spelled_out(o: Tensor, weight: Tensor, gate: Tensor, v: Tensor, skip: Tensor) -> Tensor:
        return reference.gated_norm(o, v, skip, weight, gate, 1e-5)

    def five_operations(o: Tensor, weight: Tensor, gate: Tensor, v: Tensor, skip: Tensor) -> Tensor:
        return (F.rms_norm(o + skip[:, None] * v, [width], eps=1e-5) * weight).flatten(-2) * F.silu(gate)

    size = batch * time * heads * width * inputs_size(device)
    build: dict[str, Build] = {
        "ours": partial(build_with, fused, backend(device, dtype_on(device))),
        "definition, fp32 inside": partial(build_with, spelled_out, "torch"),
        "torch, F.rms_norm": partial(build_with, five_operations, "torch"),
    }
    axes: dict[str, int | str] = {"B": batch, "T": time, "H": heads, "V": width}
    return case("gated_norm", axes, 3 * size, size, build, batch * time)


def inputs_size(device: torch.device) -> int:
    """Bytes of a number."""
    return torch.empty(0, dtype=dtype_on(device)).element_size()
