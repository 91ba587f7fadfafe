"""What ChelaBlock and FlaMixer, the hosts of a language model's mixers, do with their weights and padding masks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

INITIALISED = "_is_hf_initialized"  # transformers' mark, on a module or a tensor, for "leave it as it is"


def tensors_of(mixer: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those that are never saved included."""
    return dict(chain(mixer.named_parameters(), mixer.named_buffers()))


def lacks_storage(mixer: nn.Module) -> bool:
    """Whether the mixer was built on the meta device, as `from_pretrained` builds it."""
    return any(tensor.is_meta for tensor in tensors_of(mixer).values())


def mark_initialised(mixer: nn.Module) -> None:
    """Keep transformers' own initialisation away from a mixer, which comes out of its factory as it asks to be."""
    for module in mixer.modules():
        setattr(module, INITIALISED, True)


@torch.no_grad()
def fill_missing(mixer: nn.Module, new_mixer: Callable[..., nn.Module]) -> None:
    """Give a mixer that was built without storage what no checkpoint brought: missing weights, unsaved buffers.

    They are copied from a mixer made anew, `new_mixer(device=, dtype=)`, so that nothing is asked of a third party's.
    Does nothing while the mixer has no storage.
    """
    tensors = tensors_of(mixer)
    missing = {name: t for name, t in tensors.items() if not (t.is_meta or getattr(t, INITIALISED, False))}
    if not missing:
        return
    some = next(iter(missing.values()))
    dtype = next((t.dtype for t in tensors.values() if t.is_floating_point()), None)
    made = tensors_of(new_mixer(device=some.device, dtype=dtype))
    for name, tensor in missing.items():
        tensor.copy_(placed_like(made[name], tensor))


def placed_like(source: Tensor, target: Tensor) -> Tensor:
    """`source`, distributed as `target` is where that is a DTensor (FSDP)."""
    if not hasattr(target, "placements"):
        return source
    from torch.distributed.tensor import distribute_tensor

    placed: Any = target
    return distribute_tensor(source, placed.device_mesh, placed.placements)


def own_part(attention_mask: Tensor | None, batch: int, length: int, seen: int) -> Tensor | None:
    """The part of a padding mask over all tokens that belongs to the `length` new ones; ValueError for other masks."""
    if attention_mask is None:
        return None
    if attention_mask.shape not in ((batch, length), (batch, seen + length)):
        raise ValueError(
            f"attention_mask is a padding mask [B, T] = [{batch}, {length}]"
            + (f" or [B, seen + T] = [{batch}, {seen + length}]" if seen else "")
            + f", got {list(attention_mask.shape)}; masks between pairs of tokens (3-D, 4-D) are not supported"
        )
    return attention_mask[:, -length:]
