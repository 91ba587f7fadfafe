"""Captured decoding without a device: a stand-in for CUDA graphs that runs at a replay what a capture recorded."""

import contextlib

import pytest
import torch
from torch import Tensor

from chela_plugin.layers import streaming
from chela_plugin.lm import ChelaCache, decoding
from chela_plugin.lm.decoding import CapturedDecoding

MORE_MIXERS = ["chela(long=multiscale)", "chela(long=explicit)", "chela(long=none)", "conv(long=implicit) + attention"]


def tokens(*shape):
    return torch.randint(1, 61, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def graphs(monkeypatch):
    """A capture leaves every tensor as it was; a replay runs the captured step on the tensors that it captured."""
    steps = []

    class Graph:
        def replay(self):
            step = steps[-1]
            monkeypatch.setattr(streaming, "captured", lambda x: True)
            seen = step.cache.seen
            step.logits.copy_(step._step(step.tokens))
            step._settle()
            step.cache.seen = seen
            monkeypatch.setattr(streaming, "captured", lambda x: False)

    @contextlib.contextmanager
    def graph(captured):
        held = [(t, t.clone()) for state in steps[-1].cache.layers for t in state.values()]
        monkeypatch.setattr(streaming, "captured", lambda x: True)
        yield
        monkeypatch.setattr(streaming, "captured", lambda x: False)
        for tensor, before in held:
            tensor.copy_(before)

    made = CapturedDecoding.__init__
    monkeypatch.setattr(CapturedDecoding, "__init__", lambda self, *args: (steps.append(self), made(self, *args))[1])
    monkeypatch.setattr(decoding, "check_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)


@torch.no_grad()
def test_replayed_steps_equal_one_forward_pass(lm_mixer, graphs, small_lm):
    model, ids = small_lm(lm_mixer, pad_token_id=0).double(), tokens(2, 150)
    whole = model(ids, use_cache=False).logits
    cache = ChelaCache(model.config, max_cache_len=150)
    found = [model(ids[:, :9], past_key_values=cache).logits]
    step = CapturedDecoding(model, cache)
    places: dict[tuple[int, str], Tensor] = {}
    for t in range(9, 150):
        found.append(step(ids[:, t : t + 1]).clone())
        for i, state in enumerate(cache.layers):
            for name, tensor in state.items():
                if t > 10 and tensor.numel():
                    assert places.setdefault((i, name), tensor) is tensor
    assert cache.seen == 150 and step.graph is not None
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-9, atol=1e-9)  # fp64, other orders of summation
    with pytest.raises(ValueError, match="room for 150 tokens and holds 150"):
        step(ids[:, :1])


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["chela", "chela(long=multiscale) + attention"])
def test_rows_may_be_reordered_between_replays(mixer, graphs, small_lm):
    model, ids, order = small_lm(mixer, pad_token_id=0).double(), tokens(3, 20), torch.tensor([2, 0, 0])
    cache = ChelaCache(model.config, max_cache_len=20)
    model(ids[:, :9], past_key_values=cache)
    step = CapturedDecoding(model, cache)
    for t in range(9, 15):
        step(ids[:, t : t + 1])
    cache.reorder_cache(order)
    mixed = torch.cat([ids[order, :15], ids[:, 15:]], 1)
    for t in range(15, 20):
        logits = step(ids[:, t : t + 1])
    torch.testing.assert_close(logits[:, 0], model(mixed, use_cache=False).logits[:, -1], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_what_a_graph_cannot_hold_is_refused_by_name(graphs, small_lm):
    model = small_lm("attention", pad_token_id=0).double()
    with pytest.raises(ValueError, match="empty: read a prompt first"):
        CapturedDecoding(model, ChelaCache(model.config))
    step = CapturedDecoding(model, model(tokens(1, 5)).past_key_values)
    step(tokens(1, 1))
    with pytest.raises(ValueError, match=r"'attention' changes its shape at a step.*max_cache_len"):
        step(tokens(1, 1))


def test_a_model_on_a_cpu_is_refused(small_lm):
    model = small_lm("chela", pad_token_id=0).double()
    with pytest.raises(ValueError, match="need a CUDA device, the model is on cpu"):
        CapturedDecoding(model, model(tokens(1, 5)).past_key_values)
