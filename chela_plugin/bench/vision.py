"""Suite `vision`: images a second, inference and training, of one backbone with several mixers and of timm's ViT."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

import chela_plugin.vision  # noqa: F401  # registers chela_vit_*, also where the autoload hook is switched off
from chela_plugin.bench.cases import Build, Case, Unavailable, Work
from chela_plugin.bench.graphs import Captured
from chela_plugin.bench.layers import count
from chela_plugin.bench.timing import Run
from chela_plugin.harness.backbones import paths

SIZES = {  # pixels -> images a call
    "cuda": {224: 256, 512: 64, 1024: 16, 2048: 4},
    "cpu": {32: 4, 64: 2},
}
MODELS = {"cuda": ("chela_vit_small", "vit_small_patch16_224"), "cpu": ("chela_vit_tiny", "vit_tiny_patch16_224")}
WHATS = ("inference", "training", "inference_graph", "training_graph")
MIXERS = ("chela", "attention", "bidirectional(mamba2)", "bidirectional(gla)", "linear_attention")


def cases(device: torch.device) -> list[Case]:
    ours, timms = MODELS[device.type]
    found = []
    for pixels, batch in SIZES[device.type].items():
        contenders: dict[str, Build] = {
            f"{ours}, {mixer}": partial(work, ours, mixer, pixels, batch, device) for mixer in MIXERS
        }
        contenders[f"timm {timms}"] = partial(work, timms, None, pixels, batch, device)
        found.append(
            Case(
                axes={"B": batch, "pixels": pixels, "T": (pixels // 16) ** 2},
                whats=WHATS[: 4 if device.type == "cuda" else 2],
                contenders=contenders,
                units=dict.fromkeys(WHATS, (batch, "images")),
                profiled=(f"{ours}, {MIXERS[0]}",),
            )
        )
    return found


def work(name: str, mixer: str | None, pixels: int, batch: int, device: torch.device) -> Work:
    """bf16 autocast on a GPU; a training step is loss, gradients and AdamW.

    `inference_graph` and `training_graph` are the same as CUDA graphs: what the device takes where the host is no
    limit. The kernels of the last of them are listed for CHELA.
    """
    torch.manual_seed(0)
    options: dict[str, Any] = {"img_size": pixels}
    options |= {} if mixer is None else {"mixer": mixer}
    options |= {"depth": 2} if device.type == "cpu" else {}
    model: Any = timm.create_model(name, device=device, **options)
    with bf16(device):  # some kernels take 16-bit inputs only
        path = paths(model, device) if mixer is not None else "timm"
    if device.type == "cuda" and "reference" in path:
        raise Unavailable("no kernel here: its plain PyTorch form is not what the mixer costs")
    # Two, so that inference runs with its convolution folded, as it would be deployed.
    folded = copy.deepcopy(model).eval()
    if hasattr(folded, "reparameterize"):
        folded.reparameterize()
    return Work(runs(model.train(), folded, pixels, batch, device), path, count(model))


def bf16(device: torch.device) -> torch.autocast:
    """What every run here is under, and the question which path it takes."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def runs(model: nn.Module, folded: nn.Module, pixels: int, batch: int, device: torch.device) -> dict[str, Run]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, pixels, pixels, generator=generator).to(device)
    labels = torch.randint(1000, (batch,), generator=generator).to(device)
    cuda = device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=cuda, capturable=cuda)

    def inference() -> Tensor:
        with torch.inference_mode(), bf16(device):
            return folded(images)

    def training() -> Tensor:
        with bf16(device):
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    graphs = {"inference_graph": Captured(inference), "training_graph": Captured(training)}
    return {"inference": inference, "training": training, **graphs}
