"""Model FLOPs of training, and what devices can do at most: the two sides of MFU.

A language model's, forward and backward, for each token: `6 N + 12 S + 3 G(T)`.

- N: parameters in matrix products, i.e. all but the embedding table (arXiv:2001.08361).
- S: numbers of fixed decoding state, all blocks together; a linear recurrence writes each once and reads it once for
  each token, 4 FLOPs forward, and backward costs twice that.
- G(T), for a cache that grows by c numbers with every token: c T for softmax attention (half of the T tokens are seen
  on average, a multiplication and an addition each; with c = 2 D this is the causal half of the 12 L D T of
  arXiv:2204.02311). For all others the cache is a long convolution's history, and G is the lesser of the direct sum,
  c T, and two FFTs of 2 T, 10 c log2(2 T).

S and c are measured on the mixers' own caches. For a mixer without one, and for models of other libraries, only 6 N is
counted. Recomputation (gradient checkpointing) is not counted: that is what makes it model FLOPs.

An image model's are 3 x the matrix products and convolutions of one forward pass, as torch's FlopCounterMode counts
them in plain PyTorch.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn

# Dense bf16 tensor-core TFLOP/s, from the makers' data sheets; the first name that a device's name contains.
PEAK_TFLOPS = (
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H200", 989.0),
    ("B200", 2250.0),
    ("A100", 312.0),
    ("A40", 149.7),
    ("L40S", 362.0),
    ("L4", 121.0),
    ("A10", 125.0),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
)


def peak_flops(device_name: str, precision: str, given_tflops: float | None) -> float | None:
    """FLOP/s of one device: as given, or of a known name at bf16; None where neither is known."""
    if given_tflops is not None:
        return given_tflops * 1e12
    if precision == "32-true":
        return None
    return next((tflops * 1e12 for name, tflops in PEAK_TFLOPS if name in device_name), None)


def language_flops(model: nn.Module, context: int) -> tuple[float, str]:
    """FLOPs a token of a model on the CPU, and the formula that was used. Leaves the model as it is."""
    config: Any = model.config
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    n = sum(p.numel() for p in model.parameters())
    if not getattr(config, "tie_word_embeddings", False):
        n -= embedding.weight.numel()
    if getattr(config, "model_type", None) != "chela":
        return 6.0 * n, "6 N"
    counted = 0.0
    states: dict[str, tuple[float, float] | None] = {}
    for block in model.model.layers:  # type: ignore[operator, union-attr]
        name = str(block.mixer_spec)  # type: ignore[union-attr]
        if name not in states:
            states[name] = _state(block.mixer, config.hidden_size)  # type: ignore[union-attr, arg-type]
        found = states[name]
        if found is None:
            return 6.0 * n, "6 N"
        fixed, growth = found
        direct = growth * context
        fast = 10 * growth * math.log2(2 * context)
        counted += 12 * fixed + 3 * (direct if block.mixer_spec.name == "attention" else min(direct, fast))  # type: ignore[union-attr]
    return 6.0 * n + counted, "6 N + 12 S + 3 G(T)"


@torch.no_grad()
def _state(mixer: nn.Module, dim: int) -> tuple[float, float] | None:
    """Numbers of a mixer's cache: the fixed ones, and those that each further token adds; None without a cache."""
    probe: Any = copy.deepcopy(mixer).float().eval()
    try:
        cache = probe.init_cache(1, device=torch.device("cpu"), dtype=torch.float32)
        sizes = []
        for _ in range(2):
            probe(torch.zeros(1, 8, dim), cache=cache)
            sizes.append(sum(tensor.numel() for tensor in cache.values()))
    except (AttributeError, NotImplementedError, RuntimeError, ImportError, ValueError):
        return None
    growth = (sizes[1] - sizes[0]) / 8
    return sizes[0] - 8 * growth, growth


@torch.no_grad()
def image_flops(model: nn.Module, shape: tuple[int, int, int]) -> float:
    """FLOPs an image `shape` (channels, height, width) of a model on the CPU. Leaves the model as it is."""
    from torch.utils.flop_counter import FlopCounterMode

    probe = copy.deepcopy(model).eval()
    with FlopCounterMode(display=False) as counter:
        probe(torch.zeros(1, *shape))
    return 3.0 * counter.get_total_flops()
