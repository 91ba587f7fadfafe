"""The sequence backbone: padding changes nothing, pooling takes what it says, pairs share their towers."""

import pytest
import torch

from chela_plugin.harness import backbones
from chela_plugin.harness.backbones import build, match_parameters
from chela_plugin.harness.config import SequenceBackbone
from chela_plugin.harness.sequence_model import pool, sinusoids
from chela_plugin.harness.tasks import Examples

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 0, 0, 0, 0], [5, 0, 0, 0, 0, 0, 0, 0]])
DATA = Examples(TOKENS, torch.zeros(3, dtype=torch.long), 4, "accuracy", vocabulary=10, padding=0)


def backbone(**changes) -> SequenceBackbone:
    return SequenceBackbone(**({"kind": "sequence", "dim": 32, "depth": 2, "mlp_hidden": 48} | changes))


def model(mixer="chela", data=DATA, **changes):
    torch.manual_seed(0)
    return build(backbone(**changes), data, mixer, 48).eval()


@pytest.mark.parametrize("pooling", ["first", "last", "mean"])
@pytest.mark.parametrize(
    ("mixer", "causal"), [("chela", True), ("chela", False), ("attention", False), ("mamba2", True)]
)
def test_padding_behind_a_sequence_changes_nothing(mixer, causal, pooling):
    net = model(mixer, causal=causal, pooling=pooling, positions="sinusoidal")
    with torch.no_grad():
        together = net(TOKENS)
        alone = torch.cat([net(TOKENS[i : i + 1, :n]) for i, n in enumerate((8, 4, 1))])
    assert torch.allclose(together, alone, atol=1e-5)  # float32 sums in another order


def test_a_causal_backbone_does_not_look_ahead_and_a_two_sided_one_does():
    changed = TOKENS[:1].clone()
    changed[0, -1] = 7
    for causal in (True, False):
        net = model("chela", causal=causal, pooling="first")
        with torch.no_grad():
            assert torch.equal(net(TOKENS[:1]), net(changed)) == causal


def test_pooling_takes_what_it_says_of_the_tokens_that_are_no_padding():
    x = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[True, True, False], [False, True, True]])
    assert pool(x, mask, "first").tolist() == [[0, 1], [8, 9]]
    assert pool(x, mask, "last").tolist() == [[2, 3], [10, 11]]
    assert pool(x, mask, "mean").tolist() == [[1, 2], [9, 10]]
    assert pool(x, None, "mean").tolist() == [[2, 3], [8, 9]]
    assert pool(x, None, "last").tolist() == [[4, 5], [10, 11]]


def test_a_pair_goes_through_one_tower_and_its_order_matters_in_the_head_alone():
    pairs = Examples(torch.stack((TOKENS, TOKENS.flip(0)), 1), DATA.targets, 2, "accuracy", vocabulary=10, padding=0)
    net = model(data=pairs)
    with torch.no_grad():
        seen = []
        net.compare.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        assert net(pairs.inputs).shape == (3, 2)
        u, v, product, difference = seen[0].chunk(4, dim=-1)
        assert torch.allclose(u, v.flip(0), atol=1e-6)
        assert torch.equal(product, u * v) and torch.equal(difference, u - v)
    assert backbones.tokens_per_example(backbone(), pairs) == 16


def test_signals_and_reconstruction():
    signal = Examples(torch.randn(3, 8, 2), DATA.targets, 4, "accuracy")
    assert model(data=signal)(signal.inputs).shape == (3, 4)
    assert model(data=signal)(signal.inputs.half()).shape == (3, 4)  # as Speech Commands keeps them
    assert backbones.tokens_per_example(backbone(), signal) == 8
    whole = Examples(TOKENS, TOKENS, 10, "accuracy")
    net = model(data=whole, causal=True, pooling="last")
    assert net(TOKENS).shape == (3, 8, 10)
    assert net(TOKENS).std(1).min() > 0  # places differ by their position alone


def test_sinusoids_are_those_of_the_formula():
    table = sinusoids(50, 8)
    assert table.shape == (50, 8)
    assert table[0].tolist() == [0.0] * 4 + [1.0] * 4
    assert torch.allclose(table[7, 0], torch.tensor(7.0).sin())
    assert torch.allclose(table[7, 3], torch.tensor(7e-4).sin())


def test_parameters_are_matched_by_the_mlps_width():
    config = backbone(dim=64, mlp_hidden=170)
    target = backbones.parameters(build(config, DATA, "attention", 170))
    for mixer in ("chela", "conv", "bidirectional(gla)"):
        found = match_parameters(lambda hidden, m=mixer: build(config, DATA, m, hidden), target, 0.02, 170)
        assert abs(found.ratio - 1) <= 0.02
