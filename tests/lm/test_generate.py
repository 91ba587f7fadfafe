"""Decoding: with a cache the same tokens come out as without, greedy, sampled and in beams, padded or not."""

import copy

import pytest
import torch

from chela_plugin.lm import ChelaCache

MORE_MIXERS = [
    "chela(long=explicit)",
    "chela(long=modal)",
    "chela(long=implicit)",
    "chela(long=multiscale)",
    "identity",
    "chela + attention",
]
# Decoding equals the full forward pass to 1e-4 in fp32; logits here are of size 1.
close = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def model(lm_mixer, small_lm):
    return small_lm(lm_mixer, pad_token_id=0, apart=True)


# What concerns the host alone: one mixer with long convolutions, one whose cache grows, one recurrent.
@pytest.fixture(scope="module", params=["chela", "attention", "mamba2"])
def host(request, small_lm):
    return small_lm(request.param, pad_token_id=0, apart=True)


def tokens(*shape):
    return torch.randint(1, 61, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_stepping_equals_one_forward_pass(model):
    ids = tokens(2, 12)
    whole = model(ids, use_cache=False).logits
    cache, parts = ChelaCache(model.config), []
    for a, b in ((0, 5), (5, 6), (6, 7), (7, 10), (10, 12)):
        parts.append(model(ids[:, a:b], past_key_values=cache).logits)
        assert cache.get_seq_length() == b
    torch.testing.assert_close(torch.cat(parts, 1), whole, **close)


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}], ids=["greedy", "beam"])
def test_a_cache_changes_no_token(model, mode):
    ids = tokens(2, 7)
    kwargs = {"max_new_tokens": 4, "do_sample": False, **mode}
    without = model.generate(ids, use_cache=False, **kwargs)
    assert without.shape[1] > 7
    for implementation in ("dynamic", "static"):
        assert torch.equal(model.generate(ids, cache_implementation=implementation, **kwargs), without)


@torch.no_grad()
def test_no_tensor_of_a_static_cache_changes_its_shape(model):
    """What a CUDA graph of a step asks for; `tests/gpu/test_decoding_gpu.py` captures them."""
    cache = ChelaCache(model.config, max_cache_len=9)
    model(tokens(2, 5), past_key_values=cache)
    model(tokens(2, 1), past_key_values=cache)
    shapes = [{name: t.shape for name, t in layer.items() if t.numel()} for layer in cache.layers]
    for _ in range(3):
        model(tokens(2, 1), past_key_values=cache)
    assert shapes == [{name: t.shape for name, t in layer.items() if t.numel()} for layer in cache.layers]
    with pytest.raises(ValueError, match="room for 9 tokens and holds 9; 1 more"):
        model(tokens(2, 1), past_key_values=cache)


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}], ids=["greedy", "beam"])
def test_a_left_padded_batch_gives_each_row_what_it_gets_alone(model, mode):
    ids = tokens(2, 7)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    ids = ids * mask
    kwargs = {"max_new_tokens": 4, "do_sample": False, **mode}
    alone = model.generate(ids[1:, 3:], **kwargs)
    for implementation in ("dynamic", "static"):
        together = model.generate(ids, attention_mask=mask, cache_implementation=implementation, **kwargs)
        assert torch.equal(together[1, 3:], alone[0])


def test_another_implementation_of_the_cache_is_refused(host):
    with pytest.raises(ValueError, match="'dynamic' \\(the default\\) or 'static'"):
        host.generate(tokens(1, 3), max_new_tokens=1, cache_implementation="quantized")


def test_sampling_runs_and_a_seed_repeats_it(host):
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(host.generate(tokens(2, 5), max_new_tokens=5, do_sample=True, num_return_sequences=2))
    assert draws[0].shape[0] == 4 and torch.equal(draws[0], draws[1])


def test_a_prompt_may_be_read_in_chunks(host):
    ids = tokens(2, 11)
    kwargs = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(host.generate(ids, prefill_chunk_size=4, **kwargs), host.generate(ids, **kwargs))


def test_a_returned_cache_goes_on_where_it_was(host):
    ids = tokens(2, 6)
    kwargs = {"do_sample": False, "return_dict_in_generate": True}
    first = host.generate(ids, max_new_tokens=3, **kwargs)
    cache, mask = first.past_key_values, torch.ones_like(first.sequences)  # a 0 among them is a token, not padding
    more = host.generate(first.sequences, past_key_values=cache, attention_mask=mask, max_new_tokens=3, **kwargs)
    assert torch.equal(more.sequences, host.generate(ids, max_new_tokens=6, **kwargs).sequences)


@torch.no_grad()
def test_rows_of_a_cache_can_be_chosen_repeated_and_forgotten(host):
    ids, follow = tokens(3, 6), tokens(3, 1)
    cache = host(ids).past_key_values
    wanted = host(follow, past_key_values=copy.deepcopy(cache)).logits

    swapped = copy.deepcopy(cache)
    swapped.reorder_cache(torch.tensor([2, 0, 0]))
    torch.testing.assert_close(host(follow[[2, 0, 0]], past_key_values=swapped).logits, wanted[[2, 0, 0]], **close)

    chosen = copy.deepcopy(cache)
    chosen.batch_select_indices(torch.tensor([1]))
    torch.testing.assert_close(host(follow[1:2], past_key_values=chosen).logits, wanted[1:2], **close)

    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(2)
    again = host(follow.repeat_interleave(2, 0), past_key_values=repeated).logits
    torch.testing.assert_close(again, wanted.repeat_interleave(2, 0), **close)

    cache.reset()
    assert cache.get_seq_length() == 0 and not cache.is_initialized
    torch.testing.assert_close(host(ids, past_key_values=cache).logits, host(ids).logits, **close)
    with pytest.raises(ValueError, match="cannot forget"):
        cache.crop(-1)
