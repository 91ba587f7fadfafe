"""fla's calling convention with mixers of ours: masks, packing, caches, decoding, checkpointing, refusals."""

import inspect
import itertools
import warnings

import pytest
import torch
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # fla says that it found no GPU
    from fla import models
    from fla.models.utils import Cache
from transformers import AutoModelForCausalLM, DynamicCache

from chela_plugin.lm import ChelaCache, ChelaConfig
from chela_plugin.registry import register_mixer

MORE_MIXERS = ["chela(long=explicit)", "chela(long=modal)", "chela(long=implicit)", "chela + attention"]
# Decoding and packing equal the full forward pass to 1e-4 in fp32; logits here are of size 1.
close = {"rtol": 1e-4, "atol": 1e-4}


def build(token_mixer, name="TransformerConfig", **options):
    torch.manual_seed(0)
    config_class = getattr(models, name)
    fused = {key: False for key in inspect.signature(config_class.__init__).parameters if key.startswith("fuse_")}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 61, "pad_token_id": 0, "eos_token_id": None}
    config = config_class(token_mixer=token_mixer, **(fused | sizes | options))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in (model.get_input_embeddings().weight, model.lm_head.weight):
            parameter.mul_(20)  # logits far enough apart that no tie decides which token is greedy
    return model


@pytest.fixture(scope="module")
def model(lm_mixer):
    return build(lm_mixer)


# What concerns the adapter alone: a mixer with long convolutions, one whose cache grows, one recurrent; three families.
@pytest.fixture(
    scope="module", params=[("chela", "TransformerConfig"), ("attention", "GLAConfig"), ("mamba2", "HGRNConfig")]
)
def host(request):
    return build(*request.param)


def tokens(*shape):
    return torch.randint(1, 61, shape, generator=torch.Generator().manual_seed(1))


def padded(side):
    """Two rows of 9 and 5 tokens in one batch, its mask, and where the tokens of each row are."""
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    there = [slice(0, 9), slice(4, 9) if side == "left" else slice(0, 5)]
    mask[1, slice(0, 4) if side == "left" else slice(5, 9)] = 0
    return ids * mask, mask, there


@torch.no_grad()
def test_an_attention_module_returns_three_values(host):
    mixer, x, cache = host.model.layers[1].attn, torch.randn(2, 5, 32), Cache()
    out, weights, same = mixer(x, past_key_values=cache, use_cache=True, lower_bound=None, cu_seqlens_cpu=None)
    assert out.shape == x.shape and weights is None and same is cache
    assert cache.get_seq_length(1) == 5
    assert mixer(x)[2] is None


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_row_equals_the_row_alone(model, side, use_cache):
    ids, mask, there = padded(side)
    logits = model(ids, attention_mask=mask, use_cache=use_cache).logits
    for row, part in enumerate(there):
        torch.testing.assert_close(logits[row, part], model(ids[row : row + 1, part]).logits[0], **close)


@pytest.mark.parametrize("use_cache", [None, False])
@torch.no_grad()
def test_packed_sequences_equal_each_alone(model, use_cache):
    ids, cuts = tokens(1, 12), [0, 5, 6, 12]
    logits = model(ids, cu_seqlens=torch.tensor(cuts), use_cache=use_cache).logits
    for start, end in itertools.pairwise(cuts):
        torch.testing.assert_close(logits[:, start:end], model(ids[:, start:end]).logits, **close)


@pytest.mark.parametrize("chunks", [[1] * 12, [5, 1, 4, 2]])
@torch.no_grad()
def test_prefill_in_chunks_and_steps_equals_one_forward_pass(model, chunks):
    ids, cache, logits = tokens(2, 12), None, []
    for part in ids.split(chunks, dim=1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), model(ids, use_cache=False).logits, **close)
    assert cache.get_seq_length() == 12


@torch.no_grad()
def test_every_state_has_the_batch_first(model):
    cache = model(tokens(3, 6), use_cache=True).past_key_values
    tensors = [tensor for layer in cache for tensor in layer["recurrent_state"].tensors.values()]
    assert all(len(tensor) == 3 for tensor in tensors)


@torch.no_grad()
def test_a_reordered_cache_goes_on_as_the_reordered_rows(model):
    ids, order = tokens(3, 8), torch.tensor([2, 0, 2])
    cache = model(ids[:, :5], use_cache=True).past_key_values
    cache.reorder_cache(order)
    logits = model(ids[order, 5:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(logits, model(ids[order]).logits[:, 5:], **close)


@torch.no_grad()
def generate(model, **options):
    return model.generate(max_new_tokens=6, do_sample=False, **options)


def test_greedy_decoding_gives_the_same_tokens_with_a_cache_and_without(model):
    ids = tokens(2, 7)
    mask = torch.ones_like(ids)
    with_cache, without = (generate(model, input_ids=ids, attention_mask=mask, use_cache=on) for on in (True, False))
    assert torch.equal(with_cache, without)


def test_beam_search_gives_the_same_tokens_with_a_cache_and_without(model):
    ids, mask, _ = padded("left")
    options = {"input_ids": ids, "attention_mask": mask, "num_beams": 3}
    assert torch.equal(generate(model, **options, use_cache=True), generate(model, **options, use_cache=False))


def test_a_left_padded_batch_decodes_as_its_rows_alone(model):
    ids, mask, there = padded("left")
    together = generate(model, input_ids=ids, attention_mask=mask)[:, 9:]
    for row, part in enumerate(there):
        alone = ids[row : row + 1, part]
        alone = generate(model, input_ids=alone, attention_mask=torch.ones_like(alone))[:, alone.shape[1] :]
        assert torch.equal(together[row : row + 1], alone)


@torch.no_grad()
def test_a_cache_of_rows_padded_on_the_right_goes_on_behind_their_last_tokens(host):
    ids, mask, there = padded("right")
    cache = host(ids, attention_mask=mask, use_cache=True).past_key_values
    more = tokens(2, 3)
    logits = host(more, attention_mask=torch.cat([mask, torch.ones_like(more)], 1), past_key_values=cache).logits
    for row, part in enumerate(there):
        alone = torch.cat([ids[row : row + 1, part], more[row : row + 1]], 1)
        torch.testing.assert_close(logits[row], host(alone).logits[0, -3:], **close)


def test_gradient_checkpointing_changes_no_gradient(host):
    ids = tokens(2, 9)

    def gradients():
        host.zero_grad()
        out = host(ids, labels=ids)
        out.loss.backward()
        return [p.grad.clone() for p in host.parameters() if p.grad is not None]

    host.train()
    plain = gradients()
    host.gradient_checkpointing_enable()
    again = gradients()
    assert host(ids).past_key_values is None
    host.gradient_checkpointing_disable()
    host.eval()
    # The same sums in the same order; only their alignment in memory differs.
    torch.testing.assert_close(plain, again, rtol=1e-4, atol=1e-5)


def test_training_keeps_no_cache(host):
    assert host.train()(tokens(2, 5)).past_key_values is None
    host.eval()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mask": torch.ones(2, 9, 9)}, r"padding mask \[B, T\] = \[2, 9\], got \[2, 9, 9\]"),
        ({"attention_mask": torch.ones(2, 8)}, r"padding mask \[B, T\] = \[2, 9\], got \[2, 8\]"),
        ({"cu_seqlens": torch.tensor([0, 4, 9])}, "batch of 1"),
        ({"cp_context": object()}, "no context parallelism"),
    ],
)
@pytest.mark.parametrize("use_cache", [True, False])
def test_what_cannot_be_honoured_is_refused(host, arguments, message, use_cache):
    with pytest.raises(ValueError, match=message):
        host(tokens(2, 9), use_cache=use_cache, **arguments)


@pytest.mark.parametrize(
    "foreign",
    [
        lambda: build("gla")(tokens(2, 4), use_cache=True).past_key_values,
        lambda: build("chela", num_hidden_layers=3)(tokens(2, 4), use_cache=True).past_key_values,
        lambda: Cache.from_legacy_cache(({"recurrent_state": torch.zeros(2, 3)},)),
    ],
    ids=["other mixer", "other depth", "fla's own"],
)
def test_a_cache_of_another_model_is_refused(foreign):
    with pytest.raises(ValueError, match="cache belongs to another model"):
        build("chela")(tokens(2, 1), past_key_values=foreign())


@pytest.mark.parametrize("foreign", [DynamicCache, lambda: ChelaCache(ChelaConfig())], ids=["Dynamic", "Chela"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_cache_of_another_kind_is_refused(foreign, use_cache):
    with pytest.raises((ValueError, TypeError), match=r"fla's cache|FLA cache"):
        build("chela")(tokens(2, 1), past_key_values=foreign(), use_cache=use_cache)


@torch.no_grad()
def test_a_cache_of_another_batch_size_is_refused(host):
    cache = host(tokens(3, 4), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="holds 3 rows, the input has 2"):
        host(tokens(2, 1), past_key_values=cache)


@torch.no_grad()
def test_packed_sequences_leave_no_cache_to_continue(host):
    cache = host(tokens(1, 9), cu_seqlens=torch.tensor([0, 4, 9]), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="packed sequences"):
        host(tokens(1, 1), past_key_values=cache)


@torch.no_grad()
def test_packed_sequences_do_not_continue_a_cache(host):
    cache = host(tokens(1, 9), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="can't continue a cache"):
        host(tokens(1, 9), cu_seqlens=torch.tensor([0, 4, 9]), past_key_values=cache)


class CannotDecode(nn.Linear):
    """A mixer without init_cache."""

    def forward(self, x, *, attention_mask=None, cu_seqlens=None, cache=None, grid=None):
        return super().forward(x)


def cannot_decode(dim, *, causal, depth=None, layer_idx=None, device=None, dtype=None):
    """Test mixer."""
    return CannotDecode(dim, dim, device=device, dtype=dtype)


register_mixer("cannot_decode_in_fla", cannot_decode)


def test_a_mixer_that_cannot_decode_runs_whole_sequences_and_says_so_when_asked_to():
    model, ids = build("cannot_decode_in_fla"), tokens(2, 5)
    mask = torch.ones_like(ids)
    assert model(ids).logits.shape == (2, 5, 61)
    assert generate(model, input_ids=ids, attention_mask=mask, use_cache=False).shape == (2, 11)
    with pytest.raises(ValueError, match=r"'cannot_decode_in_fla' has no cache; pass use_cache=False"):
        generate(model, input_ids=ids, attention_mask=mask)


def test_attention_residuals_of_fla_are_the_blocks_affair():
    """Built only: fla's fused_attnres is a Triton kernel."""
    model = build("chela", attnres_block_size=2)
    assert model.model.layers[0].use_attnres
