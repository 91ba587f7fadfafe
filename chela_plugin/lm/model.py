"""ChelaModel and ChelaForCausalLM: a plain pre-norm language model whose mixers a string chooses."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from chela_plugin.lm.cache import CACHE_NAME, ChelaCache, output
from chela_plugin.lm.config import ChelaConfig
from chela_plugin.lm.decoding import CapturedCall
from chela_plugin.lm.fused_block import GatedMLP, kernels_for
from chela_plugin.lm.hosting import fill_missing, lacks_storage, mark_initialised, own_part
from chela_plugin.registry import create_mixer
from chela_plugin.residual import in_turn


def only_one(past_key_values: ChelaCache | None, cache: ChelaCache | None) -> ChelaCache | None:
    """The cache of a call, under whichever of its two names it came."""
    if past_key_values is not None and cache is not None:
        raise ValueError("past_key_values and cache are two names of one argument; pass one")
    return cache if past_key_values is None else past_key_values


class SwiGLU(nn.Module):
    """`(SiLU(x W_gate) * x W_up) W_down` (arXiv:2002.05202)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`SiLU(gate) * up`: on a GPU by fla's kernel where it is installed, in one pass each way.

    torch alone reads or writes 14 tensors of the MLP's width where 8 do, and keeps one more for the backward pass.
    Compiled, inductor fuses it itself.
    """
    if gate.is_cuda and gate.dtype != torch.float64 and not torch.compiler.is_compiling():
        fused = fla_swiglu()
        if fused is not None and os.environ.get("CHELA_BACKEND") != "reference":
            return fused(gate, up)
    return F.silu(gate) * up


@functools.cache
def fla_swiglu() -> Callable[[Tensor, Tensor], Tensor] | None:
    """fla's, or None where it can't be imported."""
    try:
        from fla.modules.activations import swiglu as fused
    except Exception:  # a mismatch of fla with torch, triton or transformers takes many forms
        return None
    return fused


class ChelaBlock(GradientCheckpointingLayer):
    """`x + mixer(norm(x))`, then `x + mlp(norm(x))`."""

    causal = True

    def __init__(self, config: ChelaConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.mixer_spec = config.mixer_specs()[layer_idx]
        self.mixer_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mixer = self._new_mixer()
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, cast(int, config.intermediate_size))
        mark_initialised(self.mixer)
        self.mixer_from_meta: bool = lacks_storage(self.mixer)

    def _new_mixer(self, **placement) -> nn.Module:
        depth = self.config.num_hidden_layers
        return create_mixer(
            self.mixer_spec,
            self.config.hidden_size,
            causal=self.causal,
            depth=depth,
            layer_idx=self.layer_idx,
            **placement,
        )

    def fill_mixer(self) -> None:
        """Give a mixer that `from_pretrained` built without storage what no checkpoint brought."""
        if self.mixer_from_meta:
            fill_missing(self.mixer, self._new_mixer)
        self.mixer_from_meta = False

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: dict[str, Tensor] | None = None,
    ) -> Tensor:
        options = {"attention_mask": attention_mask, "cu_seqlens": cu_seqlens, "cache": cache}
        sum_and_norm = getattr(self.mixer, "sum_and_norm", in_turn)
        x, normed = sum_and_norm(x, None, self.mixer_norm)
        x, normed = sum_and_norm(x, self.mixer(normed, **options), self.mlp_norm)
        linears = (self.mlp.gate_proj, self.mlp.up_proj, self.mlp.down_proj)
        fused = kernels_for(normed, linears) if torch.is_grad_enabled() else None
        if fused is None:
            return x + self.mlp(normed)
        return x + GatedMLP.apply(normed, *(linear.weight for linear in linears), fused)


class ChelaPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about both models."""

    config: ChelaConfig
    config_class = ChelaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # Trainer: `num_items_in_batch` is honoured
    _no_split_modules = ["ChelaBlock"]  # noqa: RUF012 - transformers reads a plain list here
    _is_stateful = True  # the cache can't be cropped: no assisted decoding
    _can_compile_fullgraph = True

    def initialize_weights(self) -> None:
        super().initialize_weights()
        for module in self.modules():
            if isinstance(module, ChelaBlock):
                module.fill_mixer()


class ChelaModel(ChelaPreTrainedModel):
    """Token embedding, blocks, final RMSNorm. No position embedding: order is the mixers' affair."""

    def __init__(self, config: ChelaConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(ChelaBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: ChelaCache | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: ChelaCache | None = None,
    ) -> BaseModelOutputWithPast | tuple:
        """Token ids to features.

        Args:
            input_ids: `[B, T]` integers; or `inputs_embeds` `[B, T, D]` instead.
            attention_mask: `[B, T]` or, with a cache, `[B, seen + T]`: nonzero where there is a token, padding on one
                side of a row.
            past_key_values, cache: A `ChelaCache` of this model, under its name before or since transformers 5.24; the
                call continues behind the tokens that it has seen.
            use_cache: Return a cache. By default `config.use_cache` outside training, where every mixer can decode and
                there is no mask or packing (a state can't go on behind padding). Never under gradient checkpointing.
            cu_seqlens: `[N + 1]` integers, 0 to T: sequences behind one another in a batch of 1. No cache, no mask.
            output_hidden_states: Also return the input of every block and the final features.

        Returns:
            `last_hidden_state` `[B, T, D]`, `past_key_values` (`cache` since transformers 5.24, which reads both),
            `hidden_states`.

        Raises ValueError for arguments that contradict each other, a mask that is not 2-D, a cache of another model,
        and `use_cache=True` where a mixer can't decode.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length = x.shape[:2]
        plain = attention_mask is None and cu_seqlens is None
        cache = self._cache(only_one(past_key_values, cache), use_cache, batch, x, plain)
        mask = own_part(attention_mask, batch, length, 0 if cache is None else cache.seen)
        keep_all = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden_states = []
        for i, layer in enumerate(self.layers):
            hidden_states += [x] if keep_all else []
            x = layer(x, attention_mask=mask, cu_seqlens=cu_seqlens, cache=None if cache is None else cache.layers[i])
        x = self.norm(x)
        if cache is not None:
            cache.seen += length
        all_hidden = (*hidden_states, x) if keep_all else None
        named: dict[str, Any] = {CACHE_NAME: cache}
        out = BaseModelOutputWithPast(last_hidden_state=x, hidden_states=all_hidden, **named)
        return out if (self.config.return_dict if return_dict is None else return_dict) else out.to_tuple()

    def _cache(
        self, cache: ChelaCache | None, use_cache: bool | None, batch: int, x: Tensor, plain: bool
    ) -> ChelaCache | None:
        """The cache that this call reads and writes, with its layers made; None if there is none."""
        recomputes = self.training and self.gradient_checkpointing
        asked = use_cache is True or cache is not None
        if cache is None:
            wanted = use_cache
            if use_cache is None:
                wanted = self.config.use_cache and plain and not self.training
            if not wanted or recomputes:
                return None
            cache = ChelaCache(self.config)
        elif recomputes:
            raise ValueError("gradient checkpointing runs every block twice, a cache would be written twice: pass none")
        if not isinstance(cache, ChelaCache):
            raise ValueError(
                f"past_key_values takes a ChelaCache, got {type(cache).__name__}: a cache of another model"
            )
        cache.check(self.config, batch)
        cache.check_room(x.shape[1])
        if not cache.layers:
            for layer in self.layers:
                mixer = cast(Any, layer.mixer)
                try:
                    state = new_state(mixer, batch, x, cache.max_cache_len)
                except (AttributeError, NotImplementedError) as error:
                    cache.reset()
                    if not asked:
                        return None
                    raise ValueError(f"mixer {str(layer.mixer_spec)!r} has no cache; pass use_cache=False") from error
                cache.layers.append(state)
        return cache


def new_state(mixer: Any, batch: int, x: Tensor, max_tokens: int | None) -> dict[str, Tensor]:
    """What `mixer` keeps, empty; with room for `max_tokens` where it asks how many there will be."""
    grows = max_tokens and "max_tokens" in inspect.signature(mixer.init_cache).parameters
    room = {"max_tokens": max_tokens} if grows else {}
    return mixer.init_cache(batch, device=x.device, dtype=x.dtype, **room)


class ChelaForCausalLM(ChelaPreTrainedModel, GenerationMixin):
    """`ChelaModel` with an output layer over the vocabulary and the next-token loss."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - transformers reads a plain dict

    def __init__(self, config: ChelaConfig):
        super().__init__(config)
        self.model = ChelaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: ChelaCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        cache: ChelaCache | None = None,
    ) -> CausalLMOutputWithPast | tuple:
        """Token ids to logits and, with `labels`, the loss. Arguments as `ChelaModel.forward`, and:

        labels: `[B, T]`, usually `input_ids` itself: the shift by one happens here; -100 is ignored. With `cu_seqlens`
            the first token of a sequence is not predicted from the sequence before it.
        logits_to_keep: Only the last so many positions (0: all), or the positions of a 1-D integer tensor.
        num_items_in_batch: The loss is a sum over tokens divided by this, instead of their mean.
        """
        if use_cache is None and labels is not None:
            use_cache = False
        out = self.model(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=only_one(past_key_values, cache),
            use_cache=use_cache,
            cu_seqlens=cu_seqlens,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            if cu_seqlens is not None:
                starts = cu_seqlens.new_zeros(labels.shape[1] + 1).index_fill_(0, cu_seqlens[:-1].long(), 1)
                labels = labels.masked_fill(starts[:-1].bool().to(labels.device), -100)
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch)
        out = output(loss=loss, logits=logits, hidden_states=out.hidden_states, cache=out.get(CACHE_NAME))
        return out if (self.config.return_dict if return_dict is None else return_dict) else out.to_tuple()

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """transformers' own, without position ids: no mixer takes them."""
        inputs = GenerationMixin.prepare_inputs_for_generation(cast(Any, self), *args, **kwargs)
        inputs.pop("position_ids", None)
        return inputs

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict,
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        given = model_kwargs.get(CACHE_NAME)
        if given is not None:
            GenerationMixin._prepare_cache_for_generation(
                cast(Any, self), generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        elif generation_config.cache_implementation not in (None, "dynamic", "static"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r}: a ChelaCache is 'dynamic' (the "
                "default) or 'static'"
            )
        if generation_config.use_cache is not False and model_kwargs.get(CACHE_NAME) is None:
            static = generation_config.cache_implementation == "static"
            room = max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0) if static else None
            model_kwargs[CACHE_NAME] = ChelaCache(self.config, max_cache_len=room)

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
        """Whether `generate` takes `get_compiled_call` for its steps: with a static cache on a CUDA device."""
        cache = model_kwargs.get(CACHE_NAME)
        static = isinstance(cache, ChelaCache) and cache.max_cache_len is not None
        return static and self.device.type == "cuda" and not generation_config.disable_compile

    def get_compiled_call(self, compile_config: Any) -> Callable:
        """A CUDA graph where transformers would compile: a step is then one launch, and nothing is compiled anew."""
        return CapturedCall(self)


# In place of the stand-ins of auto.py.
AutoModel.register(ChelaConfig, ChelaModel, exist_ok=True)
AutoModelForCausalLM.register(ChelaConfig, ChelaForCausalLM, exist_ok=True)
