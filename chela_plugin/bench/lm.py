"""Suite `lm`: training steps and decoding of language models of one size, ours and fla's own models.

All take the same tokens, loss code and optimizer: bf16 weights, AdamW (fused), tied embeddings, cross entropy of the
final features through the output layer in chunks (fla's FusedLinearCrossEntropyLoss on a GPU where fla is installed;
the weight's gradient is summed over its chunks in bf16, for in fp32 it takes the H100's ordinary cores, 44 of the 221
ms of a step).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from chela_plugin.bench import peers
from chela_plugin.bench.cases import Build, Case, Unavailable, Work
from chela_plugin.bench.graphs import Captured
from chela_plugin.bench.layers import count, dtype_on
from chela_plugin.bench.timing import Run
from chela_plugin.harness.backbones import paths
from chela_plugin.harness.extras import need

LOSS_CHUNK = 4096  # tokens


@dataclass(frozen=True)
class Sizes:
    """Of the models, and of what they run on."""

    dim: int
    depth: int
    mlp: int
    vocabulary: int
    mamba2_depth: int  # blocks of Mamba-2 without an MLP that make as many parameters
    tokens: int  # a training step
    lengths: tuple[int, ...]
    decoding: tuple[tuple[int, int], ...]  # (batch, prompt)
    new_tokens: int


SIZES = {
    "cuda": Sizes(
        1024, 24, 2816, 32000, 47, 32768, (2048, 8192, 32768), ((1, 2048), (64, 2048), (1, 8192), (1, 32768)), 32
    ),
    "cpu": Sizes(64, 2, 160, 256, 4, 256, (64, 128), ((1, 64), (4, 64)), 4),
}
OURS = ("chela", "chela(long=multiscale)", "attention", "mamba2(expand=1.25)", "gla", "gated_deltanet")
DECODING = ("chela", "attention", "gla")
PROFILED = ("chela", "attention", "fla GLAForCausalLM")  # a training step's kernels, at the first length


def cases(device: torch.device) -> list[Case]:
    sizes = SIZES[device.type]
    peer_models: dict[str, Callable[[Sizes, torch.device], nn.Module]] = {
        "fla GLAForCausalLM": gla_model,
        "fla Mamba2ForCausalLM on mamba_ssm kernels": mamba2_model,
        "transformers Llama, SDPA": llama_model,
    }
    builders = {spec: partial(our_model, spec) for spec in OURS} | peer_models
    # One model and optimizer for all lengths: their making takes longer than the steps.
    trained = functools.cache(lambda name: to_train(builders[name], sizes, device))
    found = []
    whats = ("train_step", "train_step_graph")[: 2 if device.type == "cuda" else 1]
    for length in sizes.lengths:
        shape = (sizes.tokens // length, length)
        contenders: dict[str, Build] = {
            name: partial(training, name, trained, sizes, shape, device) for name in builders
        }
        axes: dict[str, int | str] = {"B": shape[0], "T": length, "D": sizes.dim, "depth": sizes.depth}
        profiled = PROFILED if length == sizes.lengths[0] else ()
        units = dict.fromkeys(whats, (sizes.tokens, "tokens"))
        found.append(Case(axes, whats, contenders, units, profiled=profiled))
    for batch, prompt in sizes.decoding:
        models: dict[str, Callable[[Sizes, torch.device], nn.Module]] = {
            spec: partial(our_model, spec) for spec in DECODING
        }
        models["fla GLAForCausalLM"] = gla_model
        axes = {"B": batch, "prompt": prompt, "D": sizes.dim, "depth": sizes.depth}
        found.append(
            Case(
                axes,
                ("prefill", "decode"),
                {name: partial(decoding, build, sizes, (batch, prompt), device) for name, build in models.items()},
                {"prefill": (batch * prompt, "tokens"), "decode": (batch * sizes.new_tokens, "tokens")},
                clock=True,
            )
        )
    return found


# Models ---------------------------------------------------------------------------------------------------------------


def our_model(mixer: str, sizes: Sizes, device: torch.device) -> nn.Module:
    need("transformers", "lm")
    from chela_plugin.lm import ChelaConfig, ChelaForCausalLM

    config = ChelaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.dim,
        num_hidden_layers=sizes.depth,
        intermediate_size=sizes.mlp,
        mixer=mixer,
        tie_word_embeddings=True,
    )
    with device:
        model = ChelaForCausalLM(config)
    if device.type == "cuda" and "reference" in paths(model, device):
        raise Unavailable("no kernel here: its plain PyTorch form is not what the mixer costs")
    return model


def gla_model(sizes: Sizes, device: torch.device) -> nn.Module:
    peers.needs_cuda(device, "fla")
    models = peers.fla("models")
    config = models.GLAConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.dim,
        num_hidden_layers=sizes.depth,
        intermediate_size=sizes.mlp,
        tie_word_embeddings=True,
    )
    with device:
        return models.GLAForCausalLM(config)


def mamba2_model(sizes: Sizes, device: torch.device) -> nn.Module:
    """Blocks of one mixer and no MLP, as published (expand 2); its layers in eval mode for the reason in `peers`."""
    peers.needs_mamba_ssm(device)
    models = peers.fla("models")
    config = models.Mamba2Config(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.dim,
        num_hidden_layers=sizes.mamba2_depth,
        tie_word_embeddings=True,
    )
    model = models.Mamba2ForCausalLM(config).to(device)
    for module in model.modules():
        if type(module).__name__ == "Mamba2":
            module.eval()
    return model


def llama_model(sizes: Sizes, device: torch.device) -> nn.Module:
    need("transformers", "lm")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.dim,
        num_hidden_layers=sizes.depth,
        intermediate_size=sizes.mlp,
        num_attention_heads=sizes.dim // 64,
        max_position_embeddings=max(sizes.lengths),
        tie_word_embeddings=True,
    )
    config._attn_implementation = "sdpa"
    with device:
        return LlamaForCausalLM(config)


def new(build: Callable[[Sizes, torch.device], nn.Module], sizes: Sizes, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return build(sizes, device).to(device=device, dtype=dtype_on(device))


# Work -----------------------------------------------------------------------------------------------------------------


def to_train(
    build: Callable[[Sizes, torch.device], nn.Module], sizes: Sizes, device: torch.device
) -> tuple[Any, torch.optim.Optimizer]:
    model: Any = new(build, sizes, device)
    training_mode = {module: module.training for module in model.modules()}
    model.train()
    for module, was in training_mode.items():
        if type(module).__name__ == "Mamba2":
            module.train(was)
    cuda = device.type == "cuda"
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=cuda, capturable=cuda)


def training(
    name: str,
    trained: Callable[[str], tuple[Any, torch.optim.Optimizer]],
    sizes: Sizes,
    shape: tuple[int, int],
    device: torch.device,
) -> Work:
    """`train_step`: forward, backward, optimizer; `train_step_graph` (on a GPU): the same as a CUDA graph."""
    model, optimizer = trained(name)
    loss_of, loss_name = loss_code(device)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(sizes.vocabulary, (shape[0], shape[1] + 1), generator=generator).to(device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    features = getattr(model, "backbone", None) or model.model

    def train_step() -> Tensor:
        hidden = features(input_ids=inputs, use_cache=False)[0]
        loss = loss_of(hidden, targets, model.lm_head.weight)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    first = train_step()
    if not bool(first.isfinite()):
        raise Unavailable(f"its loss is {float(first)} at the first step")
    state = [value for group in optimizer.state.values() for value in group.values() if isinstance(value, Tensor)]
    resident = sum(t.numel() * t.element_size() for t in [*model.parameters(), *state]) / 2**20
    notes = {"loss_code": loss_name, "first_loss": round(float(first), 4)}
    path = paths(model, device) if "chela_plugin" in type(model).__module__ else "peer"
    runs: dict[str, Run] = {"train_step": train_step, "train_step_graph": Captured(train_step)}
    return Work(runs, path, count(model), round(resident, 1), notes)


def loss_code(device: torch.device) -> tuple[Callable[[Tensor, Tensor, Tensor], Tensor], str]:
    """Mean cross entropy of features `[B, T, D]`, targets `[B, T]` and the output weight `[V, D]`; and its name."""
    if device.type == "cuda":
        try:
            fused = peers.fla("modules").FusedLinearCrossEntropyLoss(accumulate_grad_in_fp32=False)
        except Unavailable:
            pass
        else:
            return lambda h, t, w: fused(h.flatten(0, 1), t.flatten(), w), "fla FusedLinearCrossEntropyLoss, bf16 sums"
    return chunked_cross_entropy, f"torch, {LOSS_CHUNK} tokens at a time, recomputed in the backward pass"


def chunked_cross_entropy(features: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    def part(h: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, weight).float(), t, reduction="sum")

    parts = zip(features.flatten(0, 1).split(LOSS_CHUNK), targets.flatten().split(LOSS_CHUNK), strict=True)
    total = sum(checkpoint(part, h, t, use_reentrant=False) for h, t in parts)
    assert isinstance(total, Tensor)
    return total / targets.numel()


def decoding(
    build: Callable[[Sizes, torch.device], nn.Module], sizes: Sizes, shape: tuple[int, int], device: torch.device
) -> Work:
    """`decode`: new tokens one by one behind the prompt, greedy, eager; every call goes on behind the last one's."""
    model: Any = new(build, sizes, device).eval()
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(sizes.vocabulary, shape, generator=generator).to(device)

    @torch.no_grad()
    def prefill() -> tuple[Tensor, Any]:
        out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1:].argmax(-1), out.past_key_values

    token, cache = prefill()

    @torch.no_grad()
    def decode() -> None:
        nonlocal token, cache
        for _ in range(sizes.new_tokens):
            out = model(input_ids=token, past_key_values=cache, use_cache=True)
            token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values

    path = paths(model, device) if "chela_plugin" in type(model).__module__ else "peer"
    return Work({"prefill": prefill, "decode": decode}, path, count(model), notes={"eager": True})
