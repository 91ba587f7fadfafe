"""Mixers that carry a state from token to token: where padding goes, and what is said when one should look ahead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from chela_plugin.layers.mixer import Cache, Mixer


class RecurrentMixer(Mixer):
    """A causal mixer whose past is a state; subclasses write `scan`.

    Padding, wherever it stands, is moved behind the tokens of its row before `scan` and back after it. A causal scan
    of such a row can't see its padding, convolution and positions included, so every real output equals the row's
    run alone; all that is left to `scan` is not to let the padding into the state that it hands to the cache.
    """

    def __init__(self, dim: int, *, causal: bool, name: str):
        if not causal:
            raise ValueError(f"{name} only looks back; for a bidirectional model use bidirectional({name})")
        super().__init__(dim, causal=True)

    def path(self, device: torch.device | str) -> str:
        return "reference"

    def scan(self, x: Tensor, length: Tensor | None, cache: Cache | None) -> Tensor:
        """Mix `x` `[B, T, C]`, of which the first `length[b]` tokens are real (all when None); continue `cache`."""
        raise NotImplementedError

    def mix(self, x: Tensor, *, mask: Tensor | None, cache: Cache | None, grid: tuple[int, int] | None) -> Tensor:
        if mask is None:
            return self.scan(x, None, cache)
        tokens_first = mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[..., None].expand_as(x)
        y = self.scan(x.gather(1, tokens_first), mask.sum(1), cache)
        return torch.empty_like(y).scatter(1, tokens_first, y)


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


def real_tokens(length: Tensor, time: int) -> Tensor:
    """Bool `[B, T]`, True at the first `length[b]` places of row b."""
    return torch.arange(time, device=length.device) < length[:, None]


def clear_padding(x: Tensor, length: Tensor | None) -> Tensor:
    """`x` `[B, T, ...]` with zeros behind the first `length[b]` tokens of each row."""
    if length is None:
        return x
    padding = real_tokens(length, x.shape[1]).logical_not()
    return x.masked_fill(padding.view(*padding.shape, *(1,) * (x.dim() - 2)), 0.0)
