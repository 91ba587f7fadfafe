"""Suite `layers`: whole mixers of about 4 D^2 parameters, forward and forward with backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from chela_plugin import create_mixer
from chela_plugin.bench import peers
from chela_plugin.bench.cases import Build, Case, Unavailable, Work
from chela_plugin.bench.graphs import Captured
from chela_plugin.bench.timing import MATMUL_RATE, Run

# D, tokens, lengths; 4,096 comes first, so that a run that is cut off has the length most compared.
SIZES = {"cuda": (1024, 32768, (4096, 2048, 1024, 8192, 32768)), "cpu": (64, 256, (64, 128))}
OURS = (
    "chela",
    "chela(long=multiscale)",
    "chela(long=none)",
    "attention",
    "linear_attention",
    "retnet",
    "gla",
    "mamba2(expand=1.25)",
    "gated_deltanet",
    "conv",
)
PEERS: dict[str, Callable[[int, torch.device], nn.Module]] = {
    "fla GatedLinearAttention": peers.gla_layer,
    "fla GatedDeltaNet": peers.gated_deltanet_layer,
    "fla Mamba2 on mamba_ssm kernels, expand 1.25": partial(peers.mamba2_layer, expand=1.25),
    "fla Mamba2 on mamba_ssm kernels, expand 2": partial(peers.mamba2_layer, expand=2),
    "mamba_ssm Mamba2, expand 1.25": partial(peers.mamba_ssm_layer, expand=1.25),
    "flash SDPA, fused rotary, 16 heads": partial(peers.rotary_attention_layer, heads=16),
    "flash SDPA, fused rotary, 8 heads": partial(peers.rotary_attention_layer, heads=8),
}
PROFILED = ("chela", "chela(long=multiscale)", "fla GatedLinearAttention")
PROFILED_AT = {"cuda": 4096, "cpu": 64}


def cases(device: torch.device) -> list[Case]:
    """Fewer bytes can't be the floor of a layer: it is the products of 4 D^2 weights with every token.

    `forward_backward_graph` is the same as a CUDA graph: what the device takes where the host is no limit.
    """
    whats = ("forward", "forward_backward", "forward_backward_graph")[: 3 if device.type == "cuda" else 2]
    dim, tokens, lengths = SIZES[device.type]
    found = []
    for length in lengths:
        shape = (tokens // length, length, dim)
        product_ms = 1e3 * 2 * 4 * dim**2 * tokens / MATMUL_RATE
        contenders: dict[str, Build] = {spec: partial(our_layer, spec, shape, device) for spec in OURS}
        contenders |= {name: partial(peer_layer, build, shape, device) for name, build in PEERS.items()}
        found.append(
            Case(
                axes={"B": shape[0], "T": length, "D": dim},
                whats=whats,
                contenders=contenders,
                units=dict.fromkeys(whats, (tokens, "tokens")),
                floor_ms={what: product_ms if what == "forward" else 3 * product_ms for what in whats},
                profiled=PROFILED if length == PROFILED_AT[device.type] else (),
            )
        )
    return found


def our_layer(spec: str, shape: tuple[int, int, int], device: torch.device) -> Work:
    dtype = dtype_on(device)
    torch.manual_seed(0)
    mixer = create_mixer(spec, shape[2], causal=True, depth=24, layer_idx=0, device=device, dtype=dtype)
    path = str(getattr(mixer, "path", lambda _: "unknown")(device))
    if device.type == "cuda" and path == "reference":
        raise Unavailable("no kernel here: its plain PyTorch form is not what the mixer costs")
    return Work(runs(mixer, shape, device), path, count(mixer))


def peer_layer(
    build: Callable[[int, torch.device], nn.Module], shape: tuple[int, int, int], device: torch.device
) -> Work:
    torch.manual_seed(0)
    layer = build(shape[2], device).to(device=device, dtype=dtype_on(device))
    return Work(runs(layer, shape, device), "peer", count(layer))


def dtype_on(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def runs(mixer: nn.Module, shape: tuple[int, int, int], device: torch.device) -> dict[str, Run]:
    x, dy = (torch.randn(shape, device=device, dtype=dtype_on(device)) for _ in range(2))
    x.requires_grad_()
    leaves = [x, *mixer.parameters()]

    def forward() -> Tensor:
        with torch.no_grad():
            return mixer(x)

    def forward_backward() -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(mixer(x), leaves, dy, allow_unused=True)

    def step() -> None:  # keeps nothing: the next graph takes the same memory
        forward_backward()

    return {"forward": forward, "forward_backward": forward_backward, "forward_backward_graph": Captured(step)}
