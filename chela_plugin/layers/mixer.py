"""The calling convention of every token mixer, checked in one place.

A mixer maps `x: [B, T, C]` to `[B, T, C]`. Any `nn.Module` with this `forward` signature is one; our own derive from
`Mixer`, which checks the arguments, runs packed sequences one per row, and calls `mix`. A third party's need not.

    forward(x, *, attention_mask=None, cu_seqlens=None, cache=None, grid=None) -> [B, T, C]
    init_cache(batch_size, *, device=None, dtype=None) -> dict of tensors, batch first   (causal mixers that can decode)
    step(x: [B, C], cache) -> [B, C]                                                     (one token; updates the cache)
    init_cache(..., max_tokens=None), advance(cache)                      (where a cache grows: see `Mixer.advance`)
    reset_parameters()                                                                   (every weight of the mixer)
    path(device) -> str                                                                  (which implementation runs)
    uses_grid: bool                                                                      (if True, hosts pass `grid`)
    plain() -> nn.Module                        (optional: the same weights in a form that TorchScript and ONNX know)
    sum_and_norm(x, branch, norm) -> (s, norm(s))     (optional: s = x + branch, in fewer passes than a host would take)
    mlp_of(mlp, x) -> mlp(x)                                                           (optional: likewise, for an MLP)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from chela_plugin.kernels.packing import check_cu_seqlens

from .gelu_mlp import mlp_of
from .residual import sum_and_norm

Cache = dict[str, Tensor]


class Mixer(nn.Module):
    """Base of the built-in mixers: argument checks and packing; subclasses write `mix`.

    Args of `forward`:
        x: `[B, T, C]`, already normalised by the block.
        attention_mask: `[B, T]`, nonzero where there is a token. Padding stands on the left or on the right of a row;
            outputs at padded places are unspecified but finite. Equal to running every row alone.
        cu_seqlens: `[N + 1]` integers from 0 to T, as in FlashAttention: B is 1 and the rows lie behind one another.
            Equal to running every sequence alone.
        cache: what `init_cache` returned. The call continues after the tokens that the cache has seen and updates its
            entries in place. Every tensor in it has the batch at dim 0, so that beam search can reorder them.
        grid: `(height, width)` with `height * width == T`, for mixers with `uses_grid`.

    Raises ValueError for arguments that contradict each other or that this mixer can't honour.
    """

    uses_grid = False  # no annotation: TorchScript can't read one here
    # Of the host's residual stream: no business of the mixer's own weights.
    sum_and_norm, mlp_of = staticmethod(sum_and_norm), staticmethod(mlp_of)

    def __init__(self, dim: int, *, causal: bool):
        super().__init__()
        self.dim = dim
        self.causal = causal

    def mix(self, x: Tensor, *, mask: Tensor | None, cache: Cache | None, grid: tuple[int, int] | None) -> Tensor:
        """The mixer itself; `mask` is bool `[B, T]` or None."""
        raise NotImplementedError

    def path(self, device: torch.device | str) -> str:
        """Name of the implementation that runs on `device`: 'torch', 'reference', 'triton', 'sdpa', 'fla', ..."""
        return "torch"

    def __prepare_scriptable__(self) -> nn.Module:
        """What `torch.jit.script` compiles in place of this module; without a plain form an error that says so."""
        raise TypeError(
            f"{type(self).__name__} can't be compiled by TorchScript as it is: create the model under timm's "
            "scriptable=True, with chela, conv or attention as its mixers; torch.export takes every mixer"
        )

    def init_cache(self, batch_size: int, *, device=None, dtype=None) -> Cache:
        raise NotImplementedError(f"{type(self).__name__} cannot decode token by token")

    def advance(self, cache: Cache) -> None:
        """What a step does on the host, for a step that is the replay of a CUDA graph; called after each replay.

        A graph can hold a step whose cache was made with `init_cache(..., max_tokens=n)`: then no tensor in it grows.
        """

    def step(self, x: Tensor, cache: Cache) -> Tensor:
        """One token: `x` `[B, C]` to `[B, C]`. Equal to `forward` with T = 1."""
        return self(x.unsqueeze(1), cache=cache).squeeze(1)

    def forward(
        self,
        x: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: Cache | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        name = type(self).__name__
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"{name} expects x of shape [B, T, {self.dim}], got {list(x.shape)}")
        if cache is not None and not self.causal:
            raise ValueError(
                f"{name} was built with causal=False and has no cache: it needs the whole sequence at once"
            )
        if grid is not None:
            if not self.uses_grid:
                raise ValueError(f"{name} has no two-dimensional form; call it without grid")
            if grid[0] * grid[1] != x.shape[1]:
                raise ValueError(f"grid {grid[0]} x {grid[1]} does not hold the {x.shape[1]} tokens of x")
        if cu_seqlens is not None:
            if attention_mask is not None or cache is not None or grid is not None:
                raise ValueError(f"{name}: cu_seqlens goes without attention_mask, cache and grid")
            rows, there = unpack(x, cu_seqlens)
            return pack(self.mix(rows, mask=there, cache=None, grid=None), there)
        mask = None
        if attention_mask is not None:
            if attention_mask.shape != x.shape[:2]:
                raise ValueError(
                    f"{name} takes a padding mask of shape [B, T] = {list(x.shape[:2])}, "
                    f"got {list(attention_mask.shape)}"
                )
            mask = attention_mask.to(device=x.device, dtype=torch.bool)
            # Reads the mask, so not while compiling.
            if cache is not None and not torch.compiler.is_compiling() and not bool(mask[:, -1].all()):
                raise ValueError(
                    f"{name}: rows that go into a cache are padded on the left, or the cache ends in padding"
                )
            if cache is not None and x.shape[1] == 1:
                mask = None  # one token at the end of a row is no padding: a step, as in `step`
        return self.mix(x, mask=mask, cache=cache, grid=grid)


def unpack(x: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """`[1, total, C]` to rows `[N, longest, C]` padded with zeros on the right, and their bool mask `[N, longest]`."""
    check_cu_seqlens(cu_seqlens, x.shape[0], x.shape[1], read=True)
    lengths = cu_seqlens.diff().to(x.device)
    mask = torch.arange(int(lengths.max()), device=x.device) < lengths[:, None]
    rows = x.new_zeros(*mask.shape, x.shape[-1]).masked_scatter(mask[..., None], x[0])
    return rows, mask


def pack(rows: Tensor, mask: Tensor) -> Tensor:
    """The inverse of `unpack`."""
    return rows[mask][None]
