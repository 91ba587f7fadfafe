"""Mixers that carry a state from token to token: where padding goes, and what is said when one should look ahead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from chela_plugin.layers.attend import empty_state
from chela_plugin.layers.causal_conv import CausalConv
from chela_plugin.layers.mixer import Cache, Mixer


class RecurrentMixer(Mixer):
    """A causal mixer whose past is a state; subclasses write `scan`, and those that decode have an output `proj`.

    Args:
        name: as mixer strings have it, for the error message.
        state: shape of one row's state; None where the mixer has no cache.

    Padding, wherever it stands, is moved behind the tokens of its row before `scan` and back after it. A causal scan
    of such a row can't see its padding, convolution and positions included, so every real output equals the row's
    run alone; all that is left to `scan` is not to let the padding into the state that it hands to the cache.
    """

    proj: nn.Linear

    def __init__(self, dim: int, *, causal: bool, name: str, state: tuple[int, ...] | None = None):
        if not causal:
            raise ValueError(f"{name} only looks back; for a bidirectional model use bidirectional({name})")
        super().__init__(dim, causal=True)
        self.state_shape = state

    def path(self, device: torch.device | str) -> str:
        return "reference"

    def init_cache(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Cache:
        if self.state_shape is None:
            return super().init_cache(batch_size)
        return {"state": empty_state(self.proj.weight, (batch_size, *self.state_shape), device, dtype)}

    def scan(self, x: Tensor, length: Tensor | None, cache: Cache | None) -> Tensor:
        """Mix `x` `[B, T, C]`, of which the first `length[b]` tokens are real (all when None); continue `cache`."""
        raise NotImplementedError

    def mix(self, x: Tensor, *, mask: Tensor | None, cache: Cache | None, grid: tuple[int, int] | None) -> Tensor:
        if mask is None:
            return self.scan(x, None, cache)
        tokens_first = mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[..., None].expand_as(x)
        y = self.scan(x.gather(1, tokens_first), mask.sum(1), cache)
        return torch.empty_like(y).scatter(1, tokens_first, y)


class ConvolvedMixer(RecurrentMixer):
    """One that convolves with a few taps, `conv`, ahead of its recurrence; the cache holds the last inputs too."""

    conv: CausalConv

    def init_cache(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Cache:
        inputs = self.conv.init_state(batch_size, device=device, dtype=dtype)
        return {"conv": inputs, **super().init_cache(batch_size, device=device, dtype=dtype)}

    def convolve(self, x: Tensor, length: Tensor | None, cache: Cache | None) -> Tensor:
        """`conv` of `x` `[B, T, channels]`, behind the inputs in `cache`, which is updated."""
        if cache is None:
            return self.conv(x, None, length)[0]
        y, cache["conv"] = self.conv(x, cache["conv"], length)
        return y


def recur(
    whole: Callable[..., tuple[Tensor, Tensor | None]],
    step: Callable[..., tuple[Tensor, Tensor]],
    tokens: dict[str, Tensor],
    length: Tensor | None,
    cache: Cache | None,
    *,
    still: tuple[str, ...],
    **shared: Any,
) -> Tensor:
    """A recurrence over `tokens` (each `[B, T, ...]`), behind the state in `cache`, which is updated.

    Args:
        whole: the recurrence over a sequence, `whole(**tokens, **shared, initial_state=, output_final_state=)`, to
            outputs `[B, T, ...]` and the last state.
        step: the same for one token, `step(**tokens without T, **shared, state=)`.
        length: `[B]`, real tokens of each row, those before its padding (None: all are).
        still: what is 0 for a token that leaves the state as it is.
        shared: arguments that have no T.
    """
    if cache is None:
        return whole(**tokens, **shared)[0]
    time = next(iter(tokens.values())).shape[1]
    if time == 1 and length is None:
        one = {name: tensor[:, 0] for name, tensor in tokens.items()}
        o, cache["state"] = step(**one, **shared, state=cache["state"])
        return o[:, None]
    tokens = tokens | {name: clear_padding(tokens[name], length) for name in still}
    o, final = whole(**tokens, **shared, initial_state=cache["state"], output_final_state=True)
    assert final is not None
    cache["state"] = final
    return o


def real_tokens(length: Tensor | None, time: int) -> Tensor | None:
    """Bool `[B, T]`, True at the first `length[b]` places of row b; None where all are real."""
    return None if length is None else torch.arange(time, device=length.device) < length[:, None]


def clear_padding(x: Tensor, length: Tensor | None) -> Tensor:
    """`x` `[B, T, ...]` with zeros behind the first `length[b]` tokens of each row."""
    real = real_tokens(length, x.shape[1])
    if real is None:
        return x
    padding = real.logical_not()
    return x.masked_fill(padding.view(*padding.shape, *(1,) * (x.dim() - 2)), 0.0)
