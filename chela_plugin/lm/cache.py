"""ChelaCache: what the blocks of a language model remember between forward calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from chela_plugin.lm.config import ChelaConfig

# What outputs and `generate` call a cache: `cache` since transformers 5.24, `past_key_values` before.
CACHE_NAME = "cache" if "cache" in (field.name for field in fields(CausalLMOutputWithPast)) else "past_key_values"


def output(cache: ChelaCache | None, **others: Any) -> CausalLMOutputWithPast:
    """transformers' output, the cache under the name of the version."""
    others[CACHE_NAME] = cache
    return CausalLMOutputWithPast(**others)


class ChelaCache(Cache):
    """One mixer cache a block (a dict of tensors, batch first) and the number of tokens seen.

    It starts empty; the first forward call fills it, when the batch size is known. What a block keeps, and how that
    grows with the sequence, is its mixer's affair: a recurrent state stays as it is, attention's keys get longer.

    Args:
        config: the model's.
        max_cache_len: with a number, as in transformers' StaticCache, there is room for so many tokens from the start
            and no tensor grows, so that a CUDA graph can hold a step (`decoding.py`).
    """

    def __init__(self, config: ChelaConfig, max_cache_len: int | None = None):
        if max_cache_len is not None and max_cache_len < 1:
            raise ValueError(f"max_cache_len is at least 1, got {max_cache_len}")
        super().__init__(layers=[])
        self.room = max_cache_len
        self.layers: list[dict[str, Tensor]] = []  # type: ignore[assignment]  # transformers' layers hold keys and values
        self.made_for = _signature(config)
        self.seen = 0

    def check(self, config: ChelaConfig, batch: int) -> None:
        """Raise ValueError unless this cache fits a model of `config` and a batch of `batch` rows."""
        if self.made_for != _signature(config):
            raise ValueError(
                f"this cache belongs to another model: made for {self.made_for}, used with {_signature(config)}"
            )
        if self.layers and self.batch_size not in (-1, batch):
            raise ValueError(f"this cache holds {self.batch_size} rows, the input has {batch}")

    @property
    def max_cache_len(self) -> int | None:  # a read-only property of transformers' own caches too
        """Tokens that there is room for; None: as many as come."""
        return self.room

    def check_room(self, tokens: int) -> None:
        """Raise ValueError unless so many more tokens fit."""
        if self.room is not None and self.seen + tokens > self.room:
            raise ValueError(
                f"this cache has room for {self.room} tokens and holds {self.seen}; {tokens} more need a "
                "larger max_cache_len"
            )

    @property
    def batch_size(self) -> int:
        """Rows held, or -1 while nothing is."""
        return next((len(tensor) for layer in self.layers for tensor in layer.values()), -1)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, padding included."""
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Tokens that there is room for; -1: no limit."""
        return -1 if self.room is None else self.room

    @property
    def is_initialized(self) -> bool:
        return bool(self.layers)

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_linear(self) -> list[bool]:
        """False for every block: what it keeps is not transformers' own layer of a linear attention."""
        return [False] * len(self.layers)

    @property
    def is_croppable(self) -> bool:
        return False

    def crop(self, tokens_to_remove: int) -> None:
        """Refuses: a recurrent state can't be walked back."""
        raise ValueError("a ChelaCache cannot forget tokens; copy it before the step instead (copy.deepcopy)")

    def reset(self) -> None:
        """Forget everything."""
        self.layers = []
        self.seen = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was, in every tensor."""
        self._each_tensor(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (integers or a bool mask)."""
        self._each_tensor(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, behind one another."""
        self._each_tensor(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    @torch.no_grad()
    def _each_tensor(self, change: Callable[[Tensor], Tensor]) -> None:
        for layer in self.layers:
            for name, tensor in layer.items():
                layer[name] = change(tensor)


def _signature(config: ChelaConfig) -> str:
    return f"{config.num_hidden_layers} blocks of width {config.hidden_size} with mixer {config.mixer!r}"
