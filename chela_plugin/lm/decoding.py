"""Decoding as a CUDA graph: one launch a token, for any mixers whose caches keep their shapes.

A decoding step of a small batch is bound by the host: some 25 launches a block. A graph holds them all. It needs
tensors that stay where they are: `ChelaCache(config, max_cache_len=...)` gives attention and look-ahead convolutions
room ahead of time; recurrent states keep their shape anyway. `generate(..., cache_implementation="static")` does all
this by itself, a capture for each call.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from chela_plugin.lm.cache import CACHE_NAME, ChelaCache, output


class CapturedDecoding:
    """Steps of `model` behind `cache`: the first runs as usual, the second is captured, the others are replays.

    Args:
        model: a `ChelaForCausalLM` in eval mode on a CUDA device. Its weights must stay as and where they are.
        cache: a `ChelaCache` that a prompt has been read into; made with `max_cache_len`, unless all mixers are
            recurrent.

    A call takes the next tokens `[B, 1]` and returns logits `[B, 1, vocabulary]`, which the next call overwrites. In
    between, rows of the cache may be reordered (beam search) but not added or removed.

    Raises ValueError where the device is no CUDA device, the cache is empty or full, or a block's cache grows with each
    token.
    """

    def __init__(self, model: nn.Module, cache: ChelaCache):
        check_device(cast(Any, model).device)
        if not cache.is_initialized:
            raise ValueError("this cache is empty: read a prompt first, model(input_ids, past_key_values=cache)")
        self.model, self.cache = model, cache
        self.blocks = cast(Any, model).model.layers
        self.graph: Any = None
        self.warm = False

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        if not self.warm:  # compiles kernels, fills libraries' workspaces, and is a step like any other
            self.warm = True
            return self._step(tokens)
        if self.graph is None:
            self._capture(tokens)
        self.cache.check_room(1)
        self._settle()
        self.tokens.copy_(tokens)
        self.graph.replay()
        self.cache.seen += 1
        for block, state in zip(self.blocks, self.cache.layers, strict=True):
            advance = getattr(block.mixer, "advance", None)
            if advance is not None:
                advance(state)
        return self.logits

    def _step(self, tokens: Tensor) -> Tensor:
        return cast(Any, self.model)(tokens, past_key_values=self.cache, use_cache=True).logits

    def _capture(self, tokens: Tensor) -> None:
        self.tokens = tokens.clone()
        self.held = [dict(state) for state in self.cache.layers]
        seen = self.cache.seen
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.logits = self._step(self.tokens)
            self._settle()
        self.cache.seen = seen  # nothing ran yet
        self.graph = graph

    def _settle(self) -> None:
        """Bring what a step or a reordering put into new tensors back to the ones that the graph reads."""
        for block, state, held in zip(self.blocks, self.cache.layers, self.held, strict=True):
            for name, tensor in state.items():
                if not tensor.numel() or tensor is held.get(name):
                    continue  # without elements: numbers of the host
                if name not in held or tensor.shape != held[name].shape:
                    raise ValueError(
                        f"the cache of mixer {str(block.mixer_spec)!r} changes its shape at a step ({name}: "
                        f"{list(tensor.shape)}): make it with ChelaCache(config, max_cache_len=...), or decode without "
                        "a CUDA graph"
                    )
                state[name] = held[name].copy_(tensor)


def check_device(device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(f"CUDA graphs need a CUDA device, the model is on {device}")


class CapturedCall:
    """A model's forward call whose decoding steps are replays of a CUDA graph; for one call of `generate`."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.steps: CapturedDecoding | None = None

    def __call__(self, input_ids: Tensor, return_dict: bool = True, **inputs: Any) -> Any:
        cache = inputs[CACHE_NAME]
        if input_ids.shape[1] != 1 or not cache.is_initialized or inputs.get("output_hidden_states"):
            return cast(Any, self.model)(input_ids, return_dict=return_dict, **inputs)
        if self.steps is None or self.steps.cache is not cache:
            self.steps = CapturedDecoding(self.model, cache)
        return output(logits=self.steps(input_ids), cache=cache)
