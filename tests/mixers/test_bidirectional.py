"""bidirectional(...): any causal mixer for hosts that see the whole sequence."""

import pytest
import torch

from chela_plugin import create_mixer

INNER = ["mamba2", "mamba", "gla", "gla(decay=head)", "retnet", "gated_deltanet", "attention", "linear_attention"]


def mixer(spec, **options):
    torch.manual_seed(0)
    return create_mixer(spec, 48, causal=False, **options)


def tokens():
    torch.manual_seed(1)
    return torch.randn(2, 37, 48, dtype=torch.float64)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("share", [True, False])
def test_every_token_sees_every_other(inner, share):
    module, x = mixer(f"bidirectional({inner}, share={share})", dtype=torch.float64), tokens()
    y = module(x)
    for t in (0, 20, 36):
        changed = x.clone()
        changed[:, t] *= -2
        moved = (module(changed) - y).abs().amax(-1)
        assert (moved[:, max(t - 1, 0) : t + 2] > 0).all()
        assert (moved > 0).all()


@pytest.mark.parametrize("inner", INNER)
def test_sharing_keeps_the_parameters_of_one_mixer(inner):
    alone = sum(p.numel() for p in create_mixer(inner, 48, causal=True).parameters())
    assert sum(p.numel() for p in mixer(f"bidirectional({inner})").parameters()) == alone + 2 * 48
    assert sum(p.numel() for p in mixer(f"bidirectional({inner}, share=False)").parameters()) == 2 * alone + 2 * 48


@pytest.mark.parametrize("share", [True, False])
def test_it_is_the_mean_of_the_mixer_run_both_ways(share):
    module, x = mixer(f"bidirectional(mamba2, share={share})", dtype=torch.float64), tokens()
    ahead, back = module.mixers[0], module.mixers[-1]
    wanted = (ahead(x) + back(x.flip(1)).flip(1)) / 2
    torch.testing.assert_close(module(x), wanted, rtol=1e-10, atol=1e-10)


def test_the_two_directions_can_differ_though_the_mixer_is_shared():
    module, x = mixer("bidirectional(gla)", dtype=torch.float64), tokens()
    torch.testing.assert_close(module(x.flip(1)).flip(1), module(x), rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        module.weight[0] += 0.1
    assert not torch.allclose(module(x.flip(1)).flip(1), module(x))


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_the_row_alone(inner, share, side):
    module, x = mixer(f"bidirectional({inner}, share={share})", dtype=torch.float64), tokens()
    mask = torch.ones(2, 37, dtype=torch.bool)
    mask[1, slice(0, 14) if side == "left" else slice(23, 37)] = False
    y = module(x, attention_mask=mask)
    torch.testing.assert_close(y[1, mask[1]], module(x[1:, mask[1]])[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(y[:1], module(x[:1]), rtol=1e-10, atol=1e-10)


def test_packed_sequences_equal_each_alone():
    module, x = mixer("bidirectional(mamba2)", dtype=torch.float64), tokens()[:1]
    y = module(x, cu_seqlens=torch.tensor([0, 9, 37]))
    torch.testing.assert_close(y[:, :9], module(x[:, :9]), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(y[:, 9:], module(x[:, 9:]), rtol=1e-10, atol=1e-10)


def test_a_causal_host_is_told_to_take_the_mixer_itself():
    with pytest.raises(ValueError, match=r"use mamba2\(d_state=64\) itself"):
        create_mixer("bidirectional(mamba2(d_state=64))", 48, causal=True)
    with pytest.raises(ValueError, match="has no cache"):
        mixer("bidirectional(gla)")(tokens().float(), cache={})


@pytest.mark.parametrize("share", [True, False])
def test_folding_reaches_the_mixer_inside(share):
    module, x = mixer(f"bidirectional(conv, share={share})", dtype=torch.float64), tokens()
    wanted = module(x)
    assert all(inner.conv.folded for inner in module.reparameterize().mixers)
    torch.testing.assert_close(module(x), wanted, rtol=1e-10, atol=1e-10)
    assert mixer("bidirectional(gla)").reparameterize() is not None  # nothing to fold, no error


def test_reset_reaches_the_mixer_inside():
    module = mixer("bidirectional(mamba2, share=False)", device="meta").to_empty(device="cpu")
    for parameter in module.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    module.reset_parameters()
    assert module(tokens().float()).isfinite().all()
    assert module.path("cpu") == "reference"
