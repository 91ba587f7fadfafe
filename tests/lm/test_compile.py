"""torch.compile: one graph without breaks, for training and prefill, and not one more for each length."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter


@pytest.fixture(autouse=True)
def forget():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tokens(length):
    return torch.randint(0, 61, (2, length), generator=torch.Generator().manual_seed(length))


# Two graphs: the first length's own, and one for all others. A third where the lengths cross from the short form of
# the convolution to the FFT (64 tokens), or a scale of the multiscale kernel begins (16 (2^i - 1) tokens).
@pytest.mark.parametrize(
    ("mixer", "first", "graphs"),
    [("chela", 70, 2), ("chela", 40, 4), ("chela(long=modal)", 70, 2), ("attention", 9, 2)],
)
def test_training_over_twenty_lengths_is_no_graph_a_length(mixer, first, graphs, small_lm):
    model, counter = small_lm(mixer, num_hidden_layers=1).train(), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for length in range(first, first + 20):
        compiled(tokens(length), labels=tokens(length)).loss.backward()
    assert counter.frame_count <= graphs


@torch.no_grad()
def test_prefill_over_twenty_lengths_is_no_graph_a_length(small_lm):
    model, counter = small_lm("chela", num_hidden_layers=1), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for length in range(70, 90):
        out = compiled(tokens(length), use_cache=True)
    assert counter.frame_count <= 2
    assert out.past_key_values.seen == 89


@pytest.mark.parametrize("length", [40, 70])
def test_the_compiled_model_has_the_logits_and_gradients_of_the_eager_one(length, small_lm):
    model, ids = small_lm("chela", num_hidden_layers=1).double().train(), tokens(length)

    def run(call):
        model.zero_grad()
        out = call(ids, labels=ids)
        out.loss.backward()
        return [out.logits.detach(), *(p.grad.clone() for p in model.parameters())]

    # The same sums in fp64 through another FFT length and another layout: a few units in the last place, summed.
    torch.testing.assert_close(run(torch.compile(model, fullgraph=True, backend="aot_eager")), run(model))
