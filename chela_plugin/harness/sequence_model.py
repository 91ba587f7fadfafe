"""A model from sequences to one answer each: the language model's blocks, then pooling and a head."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from chela_plugin.lm import ChelaConfig
from chela_plugin.lm.model import ChelaBlock


class TwoSidedBlock(ChelaBlock):
    """The block with a mixer that sees the whole sequence."""

    causal = False


def sinusoids(length: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Position embeddings `[length, dim]` of arXiv:1706.03762, section 3.5; sines first, then cosines."""
    half = (dim + 1) // 2
    rates = torch.exp(torch.arange(half, device=device) * (-math.log(10_000.0) / max(1, half - 1)))
    angles = torch.arange(length, device=device)[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), dim=1)[:, :dim]


class SequenceModel(nn.Module):
    """Tokens `[N, T]`, pairs of them `[N, 2, T]`, or signals `[N, T, C]` to logits `[N, classes]`.

    Padding is masked in the mixers and in the pooling. Of a pair, both towers share all weights, and the head sees
    `[u, v, u * v, u - v]` through one hidden layer, as in Long Range Arena's matching model (arXiv:2011.04006, section
    2.2.3). With `reconstruct`, the pooled vector must give back every token of the sequence: position embeddings are
    added to it and an MLP decodes each place alone, logits `[N, T, classes]`, as MAD's compression task does
    (arXiv:2403.17844, appendix B).

    Args:
        config: sizes and the mixers' pattern; its `vocab_size` counts the token ids.
        classes: of the answer.
        channels: of a signal; 0 for tokens.
        causal: whether the mixers are.
        pooling: which features of the last block are the sequence's.
        positions: whether sinusoidal position embeddings are added to the input.
        padding: the token id that is no part of a sequence.
        pair: whether inputs come in pairs.
        reconstruct: whether the answer is the sequence itself.
    """

    def __init__(
        self,
        config: ChelaConfig,
        classes: int,
        *,
        channels: int,
        causal: bool,
        pooling: Literal["first", "last", "mean"],
        positions: bool,
        padding: int | None,
        pair: bool,
        reconstruct: bool,
    ):
        super().__init__()
        dim = config.hidden_size
        self.pooling, self.positions, self.padding = pooling, positions, padding
        self.embed: nn.Module = nn.Linear(channels, dim) if channels else nn.Embedding(config.vocab_size, dim)
        block = ChelaBlock if causal else TwoSidedBlock
        self.layers = nn.ModuleList(block(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(dim, eps=config.norm_eps)
        self.compare = nn.Sequential(nn.Linear(4 * dim, dim), nn.ReLU()) if pair else None
        self.decode = None
        if reconstruct:
            hidden = (nn.Linear(dim, dim), nn.GELU(), nn.RMSNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.RMSNorm(dim))
            self.decode = nn.Sequential(nn.RMSNorm(dim), *hidden)
        self.head = nn.Linear(dim, classes)
        if not channels:
            nn.init.normal_(self.embed.weight, std=config.initializer_range)
        for layer in self.layers:
            for weight in layer.get_submodule("mlp").parameters():
                nn.init.normal_(weight, std=config.initializer_range)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.compare is not None:
            u, v = self.features(inputs.flatten(0, 1)).unflatten(0, (-1, 2)).unbind(1)
            return self.head(self.compare(torch.cat((u, v, u * v, u - v), dim=-1)))
        pooled = self.features(inputs)
        if self.decode is None:
            return self.head(pooled)
        length, dim = inputs.shape[1], pooled.shape[-1]
        return self.head(self.decode(pooled[:, None] + sinusoids(length, dim, pooled.device).to(pooled.dtype)))

    def features(self, inputs: Tensor) -> Tensor:
        """One vector a sequence, `[N, D]`."""
        mask = None
        if self.padding is not None and not inputs.is_floating_point():
            mask = inputs != self.padding
        if isinstance(self.embed, nn.Linear):
            inputs = inputs.to(self.embed.weight.dtype)  # long signals are kept in half precision
        x = self.embed(inputs)
        if self.positions:
            x = x + sinusoids(x.shape[1], x.shape[2], x.device).to(x.dtype)
        for layer in self.layers:
            x = layer(x, attention_mask=mask)
        return pool(self.norm(x), mask, self.pooling)


def pool(x: Tensor, mask: Tensor | None, how: Literal["first", "last", "mean"]) -> Tensor:
    """`[N, T, D]` to `[N, D]`: the first, the last, or the mean of the places where `mask` `[N, T]` is true."""
    if how == "mean":
        if mask is None:
            return x.mean(1)
        return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1).to(x.dtype)
    if mask is None:
        return x[:, 0 if how == "first" else -1]
    place = mask.long().argmax(1) if how == "first" else mask.shape[1] - 1 - mask.flip(1).long().argmax(1)
    return x.gather(1, place[:, None, None].expand(-1, 1, x.shape[2])).squeeze(1)
