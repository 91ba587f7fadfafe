"""FlaMixer: a mixer of the registry in the place of a fla layer, speaking fla's calling convention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from fla.models.utils import FLACache
from torch import Tensor, nn

from chela_plugin.lm.hosting import INITIALISED, fill_missing, lacks_storage, mark_initialised, own_part
from chela_plugin.registry import MixerSpec, create_mixer


@dataclass
class MixerState:
    """What a FlaMixer keeps in fla's cache. fla maps its functions over the fields, tensors in dicts included.

    Attributes:
        tensors: the mixer's own cache, batch first.
        made_for: the layer that made it, so that another model's is recognised.
        ended: why no call can go on from here; empty where one can.
    """

    tensors: dict[str, Tensor]
    made_for: str
    ended: str = ""

    @property
    def device(self) -> torch.device:
        return next((tensor.device for tensor in self.tensors.values()), torch.device("cpu"))


class FlaMixer(nn.Module):
    """The mixer that `spec` names, called as fla's layers are: three return values, states in fla's cache.

    Args:
        spec: the mixer.
        dim: width D.
        depth, layer_idx: number of blocks, and this one's place.
        device, dtype: as for any torch module.

    Raises MixerSpecError, MixerUnavailableError and ValueError as `create_mixer` with `causal=True`.
    """

    def __init__(self, spec: MixerSpec, dim: int, *, depth: int, layer_idx: int, device: Any = None, dtype: Any = None):
        super().__init__()
        self.spec, self.dim, self.depth, self.layer_idx = spec, dim, depth, layer_idx
        self.mixer = self._new_mixer(device=device, dtype=dtype)
        # The mixer came out of its factory as it asks to be initialised; fla would draw its Linear and Conv1d layers
        # again, and call reset_parameters of a part whose weights were just loaded.
        mark_initialised(self.mixer)
        if lacks_storage(self.mixer):
            # To be filled by reset_parameters. transformers does not call it on a module without tensors of its own.
            self.register_buffer("empty", torch.empty(0), persistent=False)
        else:
            setattr(self, INITIALISED, True)

    def _new_mixer(self, **placement: Any) -> nn.Module:
        return create_mixer(self.spec, self.dim, causal=True, depth=self.depth, layer_idx=self.layer_idx, **placement)

    def reset_parameters(self) -> None:
        """Values for every weight and buffer that no checkpoint brought; fla's initialisation calls this."""
        fill_missing(self.mixer, self._new_mixer)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: FLACache | None = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        cu_seqlens: Tensor | None = None,
        cp_context: Any = None,
        **others: Any,
    ) -> tuple[Tensor, None, FLACache | None]:
        """Mix `hidden_states` `[B, T, D]`.

        Args:
            attention_mask: `[B, T]` or `[B, seen + T]`, nonzero where there is a token; the last T columns count. A
                single token that follows a cached past is taken as one, whatever its mask says.
            past_key_values: fla's cache; the call continues behind the tokens that it has seen, and updates it. One
                that can't be continued (packed sequences, a mixer that can't decode) is refused by the next call.
            cu_seqlens: `[N + 1]` integers, 0 to T: sequences behind one another in a batch of 1.
            others: arguments of fla's own layers (`lower_bound`, `cu_seqlens_cpu`, ...).

        Returns the mixed tokens, None (no attention weights), and the cache.

        Raises ValueError for a mask that is not 2-D, a cache of another model, and what the mixer refuses.
        """
        if cp_context is not None:
            raise ValueError(f"mixer {str(self.spec)!r} has no context parallelism; train without cp_context")
        batch, length = hidden_states.shape[:2]
        state = None if past_key_values is None else self._state(past_key_values, hidden_states, cu_seqlens)
        seen = 0 if past_key_values is None else past_key_values.get_seq_length(self.layer_idx)
        mask = own_part(attention_mask, batch, length, seen)
        if state is None or state.ended:
            out = self.mixer(hidden_states, attention_mask=mask, cu_seqlens=cu_seqlens)
        elif mask is None or (length == 1 and seen):
            out = self.mixer(hidden_states, cache=state.tensors)
        else:
            out = self._padding_first(hidden_states, mask, state.tensors)
        if past_key_values is not None:
            past_key_values.update(recurrent_state=state, layer_idx=self.layer_idx, offset=length)
        return out, None, past_key_values

    def _padding_first(self, x: Tensor, mask: Tensor, cache: dict[str, Tensor]) -> Tensor:
        """Rows that go into a cache must end in a token. fla's may end in padding, an evaluation batch's usually do."""
        order = mask.bool().to(torch.uint8).argsort(dim=1, stable=True)
        index = order[..., None].expand_as(x)
        y = self.mixer(x.gather(1, index), attention_mask=mask.gather(1, order), cache=cache)
        return torch.empty_like(y).scatter(1, index, y)

    def _state(self, past: FLACache, x: Tensor, cu_seqlens: Tensor | None) -> MixerState:
        """This layer's part of the cache, made if it isn't there yet."""
        if not isinstance(past, FLACache):
            raise ValueError(f"past_key_values takes fla's cache, got {type(past).__name__}: a cache of another model")
        held = past[self.layer_idx] if self.layer_idx < len(past) else None
        made_for = f"block {self.layer_idx} of {self.depth}, width {self.dim}, mixer {str(self.spec)!r}"
        if held is None:
            if cu_seqlens is not None:
                return MixerState({}, made_for, ended="packed sequences (cu_seqlens) leave no state behind")
            try:
                mixer: Any = self.mixer
                return MixerState(mixer.init_cache(len(x), device=x.device, dtype=x.dtype), made_for)
            except (AttributeError, NotImplementedError):
                return MixerState({}, made_for, ended=f"mixer {str(self.spec)!r} has no cache; pass use_cache=False")
        state = held["recurrent_state"]
        if not isinstance(state, MixerState) or state.made_for != made_for:
            other = state.made_for if isinstance(state, MixerState) else "a layer of fla"
            raise ValueError(f"this cache belongs to another model: made for {other}, used with {made_for}")
        if state.ended:
            raise ValueError(f"this cache can't be continued: {state.ended}")
        if cu_seqlens is not None:
            raise ValueError("cu_seqlens starts sequences of its own; it can't continue a cache")
        rows = next((len(tensor) for tensor in state.tensors.values()), len(x))
        if rows != len(x):
            raise ValueError(f"this cache holds {rows} rows, the input has {len(x)}")
        return state

    def extra_repr(self) -> str:
        return str(self.spec)
