"""ChelaForCausalLM as a model: causality, padding, packing, loss, hidden states, checkpointing, compilation, errors."""

import itertools

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

from chela_plugin.lm import ChelaCache, ChelaConfig, ChelaForCausalLM, ChelaModel
from chela_plugin.registry import MixerSpecError, UnknownMixerError, register_mixer

MORE_MIXERS = ["chela(long=explicit)", "chela(long=modal)", "chela(long=implicit)", "identity", "chela + attention"]


class NoCache(nn.Module):
    """A third party's mixer: whole sequences only, weights of its own choice, a buffer that is never saved."""

    def __init__(self, dim, device=None, dtype=None):
        super().__init__()
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        nn.init.constant_(self.proj.weight, 7.0)
        self.register_buffer("window", torch.linspace(0, 1, dim, device=device), persistent=False)

    def forward(self, x, *, attention_mask=None, cu_seqlens=None, cache=None, grid=None):
        return x * self.window


def no_cache(dim, *, causal, depth=None, layer_idx=None, device=None, dtype=None):
    """Test mixer."""
    mixer = NoCache(dim, device=device, dtype=dtype)
    mixer.asked = {"causal": causal, "depth": depth, "layer_idx": layer_idx}
    return mixer


register_mixer("no_cache", no_cache)


def tokens(*shape, seed=1):
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(seed))


# Logits of these models are of size 0.1; sums over 19 tokens in fp32, taken in another order (FFT, chunks): 1e-4.
close = {"rtol": 1e-4, "atol": 1e-4}


def test_future_tokens_do_not_change_the_past(lm_mixer, small_lm):
    model, ids = small_lm(lm_mixer), tokens(2, 19)
    other = ids.clone()
    other[:, 11:] = (other[:, 11:] + 7) % 61
    with torch.no_grad():
        before, after = model(ids, use_cache=False).logits, model(other, use_cache=False).logits
    torch.testing.assert_close(after[:, :11], before[:, :11], **close)
    assert not torch.allclose(after[:, 11:], before[:, 11:])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_each_row_alone(lm_mixer, side, small_lm):
    model, ids, lengths = small_lm(lm_mixer), tokens(3, 13), (13, 9, 1)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        mask[row, 13 - n :] = 1
    mask = mask if side == "left" else mask.flip(1)
    with torch.no_grad():
        together = model(ids, attention_mask=mask).logits
        for row in range(3):
            alone = model(ids[row : row + 1, mask[row].bool()]).logits[0]
            torch.testing.assert_close(together[row, mask[row].bool()], alone, **close)


def test_packed_sequences_equal_each_sequence_alone(lm_mixer, small_lm):
    model, ids, cuts = small_lm(lm_mixer), tokens(1, 20), [0, 5, 6, 20]
    with torch.no_grad():
        packed = model(ids, cu_seqlens=torch.tensor(cuts)).logits
        for a, b in itertools.pairwise(cuts):
            torch.testing.assert_close(packed[:, a:b], model(ids[:, a:b]).logits, **close)


def test_packing_predicts_no_first_token_from_the_sequence_before(small_lm):
    model, ids, cuts = small_lm(), tokens(1, 20), [0, 5, 6, 20, 20]
    packed = model(ids, labels=ids, cu_seqlens=torch.tensor(cuts)).loss
    sums = [model(ids[:, a:b], labels=ids[:, a:b]).loss * (b - a - 1) for a, b in ((0, 5), (6, 20))]
    torch.testing.assert_close(packed, sum(sums) / (4 + 13), **close)


def test_every_parameter_gets_a_finite_gradient(lm_mixer, small_lm):
    model, ids = small_lm(lm_mixer).train(), tokens(2, 19)
    model(ids, labels=ids).loss.backward()
    missing = [k for k, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert missing == []


def test_the_loss_is_that_of_the_next_token(small_lm):
    model, ids = small_lm(), tokens(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    out = model(ids, labels=labels)
    by_hand = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, by_hand)
    counted = int((labels[:, 1:] != -100).sum())
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=2 * counted).loss, by_hand / 2)


def test_only_the_logits_asked_for_are_computed(small_lm):
    model, ids = small_lm(), tokens(2, 9)
    logits = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, logits[:, -2:], **close)
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 4])).logits, logits[:, [0, 4]], **close)


def test_hidden_states_are_each_blocks_input_and_the_final_features(small_lm):
    model, ids = small_lm(), tokens(2, 9)
    out = model.model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    torch.testing.assert_close(out.hidden_states[0], model.get_input_embeddings()(ids))
    torch.testing.assert_close(out.hidden_states[-1], out.last_hidden_state)
    assert len(model(ids, output_hidden_states=True, labels=ids).hidden_states) == 3
    loss, logits = model(ids, labels=ids, return_dict=False)
    assert loss.dim() == 0 and logits.shape == (2, 9, 61)


def test_embeddings_may_be_passed_instead_of_ids(small_lm):
    model, ids = small_lm(), tokens(2, 9)
    torch.testing.assert_close(model(inputs_embeds=model.model.embed_tokens(ids)).logits, model(ids).logits)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")  # its new name came after 5.17
@pytest.mark.parametrize("mixer", ["chela", "attention", "gla", "mamba2"])
def test_gradient_checkpointing_changes_nothing(mixer, small_lm):
    model, ids, grads = small_lm(mixer).train(), tokens(2, 9), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        out = model(ids, labels=ids, use_cache=True)
        assert (out.past_key_values is None) == checkpointing
        out.loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)  # with and without a cache: other chunks


def test_training_makes_no_cache_unless_asked(small_lm):
    model, ids = small_lm(), tokens(2, 9)
    assert isinstance(model(ids).past_key_values, ChelaCache)
    assert model(ids, use_cache=False).past_key_values is None
    assert model(ids, labels=ids).past_key_values is None
    assert model(ids, attention_mask=torch.ones_like(ids)).past_key_values is None
    assert model.train()(ids).past_key_values is None


def test_parameters_are_the_mixers_and_8_d_squared_a_block(lm_mixer):
    dim, depth = 192, 2
    config = ChelaConfig(
        vocab_size=61, hidden_size=dim, num_hidden_layers=depth, mixer=lm_mixer, tie_word_embeddings=True
    )
    with torch.device("meta"):
        model = ChelaForCausalLM(config)
    mixers = sum(p.numel() for layer in model.model.layers for p in layer.mixer.parameters())
    norms = (2 * depth + 1) * dim
    assert sum(p.numel() for p in model.parameters()) == mixers + depth * 8 * dim**2 + 61 * dim + norms


def test_no_initialisation_but_its_own_touches_a_mixer(small_lm):
    model = small_lm("no_cache + attention")
    assert (model.model.layers[0].mixer.proj.weight == 7).all()
    assert model.model.layers[0].mixer.asked == {"causal": True, "depth": 2, "layer_idx": 0}
    assert model.model.layers[0].mlp.gate_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)  # 1,536 draws


def test_native_is_chela(small_lm):
    native, chela = small_lm("native"), small_lm("chela")
    assert native.config.mixer == "native"
    assert all(torch.equal(a, b) for a, b in zip(native.parameters(), chela.parameters(), strict=True))


@pytest.mark.parametrize("mixer", ["chela", "attention + mamba2", "gla + retnet", "conv + gated_deltanet"])
def test_a_compiled_model_has_no_graph_break(mixer, small_lm):
    torch._dynamo.reset()
    model, ids = small_lm(mixer), tokens(2, 9)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits, **close)
    model.train()
    torch.testing.assert_close(compiled(ids, labels=ids).loss, model(ids, labels=ids).loss, **close)


def test_auto_classes_know_the_model_type():
    config = AutoConfig.for_model("chela", vocab_size=61, hidden_size=32, num_hidden_layers=1, mixer="attention")
    assert isinstance(config, ChelaConfig)
    assert type(AutoModel.from_config(config)) is ChelaModel
    assert type(AutoModelForCausalLM.from_config(config)) is ChelaForCausalLM


def test_the_config_keeps_the_canonical_string():
    assert ChelaConfig(mixer="2 * attention( head_dim : 16 )+identity").mixer == "2*attention(head_dim=16) + identity"
    assert ChelaConfig(hidden_size=192, mixer="attention").intermediate_size == 512


def test_resizing_the_vocabulary_leaves_the_rest_alone(small_lm):
    model, ids = small_lm(tie_word_embeddings=True), tokens(2, 9)
    logits = model(ids).logits
    model.resize_token_embeddings(70)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(model(ids).logits[..., :61], logits, **close)


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        ({"mixer": "atention"}, UnknownMixerError, "attention"),
        ({"mixer": "attention +"}, MixerSpecError, "attention"),
        ({"mixer": "attention(heads=2)"}, MixerSpecError, "num_heads"),
        ({"mixer": nn.Identity}, StrictDataclassFieldValidationError, "'mixer' expected str"),
        ({"hidden_size": "32"}, StrictDataclassFieldValidationError, "'hidden_size' expected int"),
        ({"hidden_size": 0, "mixer": "attention"}, ValueError, "hidden_size"),
        ({"num_hidden_layers": 0, "mixer": "attention"}, ValueError, "num_hidden_layers"),
    ],
)
def test_a_bad_config_is_refused_when_it_is_made(kwargs, error, message):
    with pytest.raises(error, match=message):
        ChelaConfig(**kwargs)


def test_a_mixer_that_needs_the_whole_sequence_is_refused(small_lm):
    with pytest.raises(ValueError, match=r"bidirectional"):
        small_lm("bidirectional(gla)")


def test_contradictory_arguments_are_refused(small_lm):
    model, ids = small_lm(), tokens(2, 9)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(ids, inputs_embeds=torch.zeros(2, 9, 32))
    for shape in ((2, 9, 9), (2, 1, 9, 9), (2, 8), (9,)):
        with pytest.raises(ValueError, match="padding mask"):
            model(ids, attention_mask=torch.ones(shape))
    with pytest.raises(ValueError, match="batch of 1"):
        model(ids, cu_seqlens=torch.tensor([0, 9]))
    with pytest.raises(ValueError, match="cache"):
        model(ids[:1], cu_seqlens=torch.tensor([0, 9]), use_cache=True)
    with pytest.raises(TypeError, match="position_ids"):
        model(ids, position_ids=torch.arange(9)[None])


def test_a_cache_of_another_model_is_refused(small_lm):
    model, ids = small_lm(), tokens(2, 9)
    with pytest.raises(ValueError, match="DynamicCache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="another model"):
        model(ids, past_key_values=small_lm("identity")(ids).past_key_values)
    with pytest.raises(ValueError, match="2 rows, the input has 1"):
        model(ids[:1], past_key_values=model(ids).past_key_values)


def test_a_mixer_without_a_cache_is_named_when_one_is_asked_for(small_lm):
    model, ids = small_lm("attention + no_cache"), tokens(2, 9)
    assert model(ids).past_key_values is None
    with pytest.raises(ValueError, match=r"'no_cache' has no cache; pass use_cache=False"):
        model(ids, use_cache=True)
    with pytest.raises(ValueError, match=r"'no_cache' has no cache"):
        model.generate(ids, max_new_tokens=2)
    assert model.generate(ids, max_new_tokens=2, use_cache=False, pad_token_id=0).shape == (2, 11)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_a_cache_can_not_be_written_twice(small_lm):
    model, ids = small_lm(), tokens(2, 9)
    cache = model(ids).past_key_values
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(ids, past_key_values=cache)


@torch.no_grad()
def test_a_cache_goes_by_both_of_its_names(small_lm):
    model = small_lm("chela")
    ids = tokens(2, 9)
    cache = model(ids[:, :8]).past_key_values
    assert model(ids[:, 8:], cache=cache).past_key_values is cache and cache.seen == 9
    with pytest.raises(ValueError, match="two names of one argument"):
        model(ids, cache=cache, past_key_values=cache)
