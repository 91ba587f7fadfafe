"""Mixers against independent code: transformers' Mamba layers with our weights, and formulas summed over all pairs."""

from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from torch.nn import functional as F

from chela_plugin import create_mixer
from chela_plugin.kernels.rotary import rotate

TIME = 41  # odd, past a chunk of 32


def compare(module, oracle, pairs, dim):
    """Same output and same gradients. `pairs`: our parameter's name, the oracle's parameter."""
    torch.manual_seed(0)
    ours = dict(module.named_parameters())
    assert set(ours) == set(pairs)
    with torch.no_grad():
        for parameter in ours.values():  # away from initial values that are all alike
            parameter += 0.1 * torch.randn_like(parameter)
        for name, theirs in pairs.items():
            theirs.copy_(ours[name].view(theirs.shape))
    x = torch.randn(2, TIME, dim)
    weight = torch.randn(2, TIME, dim)
    got, wanted = module(x), oracle(x)
    # Both fp32 (the oracle casts to it), summed in another order.
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
    got_grads = torch.autograd.grad((got * weight).sum(), [ours[name] for name in pairs])
    wanted_grads = torch.autograd.grad((wanted * weight).sum(), list(pairs.values()))
    for name, mine, theirs in zip(pairs, got_grads, wanted_grads, strict=True):
        atol = 1e-4 * theirs.abs().max().item()
        torch.testing.assert_close(
            mine, theirs.view(mine.shape), rtol=1e-3, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_mamba_equals_the_one_of_transformers():
    modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    from transformers import MambaConfig

    config = MambaConfig(hidden_size=48, state_size=7, expand=2, time_step_rank=3, num_hidden_layers=1)
    oracle = modeling.MambaMixer(config, layer_idx=0).eval()
    module = create_mixer("mamba(d_state=7)", 48, causal=True)
    pairs = {
        "in_proj.weight": oracle.in_proj.weight,
        "conv.weight": oracle.conv1d.weight,
        "conv.bias": oracle.conv1d.bias,
        "x_proj.weight": oracle.x_proj.weight,
        "step_proj.weight": oracle.dt_proj.weight,
        "step_bias": oracle.dt_proj.bias,
        "log_rate": oracle.A_log,
        "skip": oracle.D,
        "proj.weight": oracle.out_proj.weight,
    }
    compare(module, oracle, pairs, 48)


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2_equals_the_one_of_transformers(groups):
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    from transformers import Mamba2Config

    config = Mamba2Config(
        hidden_size=48, state_size=20, expand=2, head_dim=24, num_heads=4, n_groups=groups, chunk_size=16,
        num_hidden_layers=1,
    )  # fmt: skip
    oracle = modeling.Mamba2Mixer(config, layer_idx=0).eval()
    if groups > 1 and Version(version("transformers")) < Version("5.23"):
        pytest.skip(
            "transformers' Mamba-2 before 5.23 normalises all groups at once, the published one each on its own"
        )
    module = create_mixer(f"mamba2(d_state=20, head_dim=24, num_groups={groups})", 48, causal=True)
    pairs = {
        "in_proj.weight": oracle.in_proj.weight,
        "conv.weight": oracle.conv1d.weight,
        "conv.bias": oracle.conv1d.bias,
        "step_bias": oracle.dt_bias,
        "log_rate": oracle.A_log,
        "skip": oracle.D,
        "norm.weight": oracle.norm.weight,
        "proj.weight": oracle.out_proj.weight,
    }
    compare(module, oracle, pairs, 48)


def scores_to_output(module, scores, v, gate):
    """Heads from `[B, H, T, T]` scores, through RMSNorm and the swish gate to the output."""
    o = torch.einsum("bhts,bshv->bthv", scores, v)
    o = o * (o.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    weight = getattr(module.norm, "weight", None)
    o = o if weight is None else o * weight
    return (o.flatten(-2) * F.silu(gate)) @ module.proj.weight.T


def test_gla_equals_its_formula_over_all_pairs():
    module = create_mixer("gla(num_heads=2)", 24, causal=True, dtype=torch.float64)
    x = torch.randn(2, 13, 24, dtype=torch.float64)
    q, k = ((x @ w.weight.T).view(2, 13, 2, 6) for w in (module.q, module.k))
    v = (x @ module.v.weight.T).view(2, 13, 2, 12)
    alpha = torch.sigmoid(x @ module.narrow.weight.T @ module.alpha.weight.T + module.alpha.bias) ** (1 / 16)
    alpha = alpha.view(2, 13, 2, 6)
    scores = x.new_zeros(2, 2, 13, 13)
    for t in range(13):
        for s in range(t + 1):
            scores[:, :, t, s] = (q[:, t] * k[:, s] * alpha[:, s + 1 : t + 1].prod(1)).sum(-1) / 6**0.5
    wanted = scores_to_output(module, scores, v, x @ module.g.weight.T)
    torch.testing.assert_close(module(x), wanted, rtol=1e-10, atol=1e-10)


def test_gla_with_a_decay_a_head_equals_its_formula_over_all_pairs():
    module = create_mixer("gla(num_heads=2, decay=head)", 24, causal=True, dtype=torch.float64)
    x = torch.randn(2, 13, 24, dtype=torch.float64)
    q, k = ((x @ w.weight.T).view(2, 13, 2, 6) for w in (module.q, module.k))
    v = (x @ module.v.weight.T).view(2, 13, 2, 12)
    alpha = torch.sigmoid(x @ module.alpha.weight.T + module.alpha.bias) ** (1 / 16)
    scores = x.new_zeros(2, 2, 13, 13)
    for t in range(13):
        for s in range(t + 1):
            scores[:, :, t, s] = (q[:, t] * k[:, s]).sum(-1) * alpha[:, s + 1 : t + 1].prod(1) / 6**0.5
    wanted = scores_to_output(module, scores, v, x @ module.g.weight.T)
    torch.testing.assert_close(module(x), wanted, rtol=1e-10, atol=1e-10)


def test_retnet_equals_its_formula_over_all_pairs():
    module = create_mixer("retnet(num_heads=3)", 24, causal=True, dtype=torch.float64)
    x = torch.randn(2, 13, 24, dtype=torch.float64)
    q, k = (rotate((x @ w.weight.T).view(2, 13, 3, 4), torch.arange(13)) for w in (module.q, module.k))
    v = (x @ module.v.weight.T).view(2, 13, 3, 8)
    gamma = 1 - 2.0 ** (-5 - torch.arange(3, dtype=torch.float64))
    lag = torch.arange(13)[:, None] - torch.arange(13)
    decay = torch.where(lag >= 0, gamma[:, None, None] ** lag.clamp(min=0), 0.0)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * decay / 2
    wanted = scores_to_output(module, scores, v, x @ module.g.weight.T)
    # gamma is made in fp32 in the mixer: 1e-7, times a dozen tokens.
    torch.testing.assert_close(module(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("phi", ["elu1", "relu"])
def test_linear_attention_is_a_weighted_mean_of_values(causal, phi):
    module = create_mixer(f"linear_attention(num_heads=3, phi={phi})", 24, causal=causal, dtype=torch.float64)
    x = torch.randn(2, 13, 24, dtype=torch.float64)
    q, k, v = (x @ module.qkv.weight.T).view(2, 13, 3, 3, 8).unbind(2)
    q, k = (F.elu(y) + 1 if phi == "elu1" else F.relu(y) for y in (q, k))
    scores = torch.einsum("bthk,bshk->bhts", q, k)
    scores = scores.tril() if causal else scores
    share = scores / (scores.sum(-1, keepdim=True) + 1e-6)
    wanted = torch.einsum("bhts,bshv->bthv", share, v).flatten(-2) @ module.proj.weight.T
    torch.testing.assert_close(module(x), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_softmax_over_rotated_keys(causal):
    module = create_mixer("attention(num_heads=3, rope=True)", 24, causal=causal, dtype=torch.float64)
    x = torch.randn(2, 13, 24, dtype=torch.float64)
    q, k, v = (x @ module.qkv.weight.T).view(2, 13, 3, 3, 8).unbind(2)
    q, k = rotate(q, torch.arange(13)), rotate(k, torch.arange(13))
    scores = torch.einsum("bthk,bshk->bhts", q, k) / 8**0.5
    if causal:
        scores = scores.masked_fill(torch.ones(13, 13).triu(1).bool(), -torch.inf)
    wanted = torch.einsum("bhts,bshv->bthv", scores.softmax(-1), v).flatten(-2) @ module.proj.weight.T
    torch.testing.assert_close(module(x), wanted, rtol=1e-10, atol=1e-10)


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def score(t, s):
        return (rotate(q, torch.tensor([t])) * rotate(k, torch.tensor([s]))).sum()

    torch.testing.assert_close(rotate(q, torch.tensor([9])).norm(), q.norm(), rtol=1e-12, atol=0)
    torch.testing.assert_close(score(7, 3), score(104, 100), rtol=1e-10, atol=1e-10)
    assert not torch.isclose(score(7, 3), score(7, 4))
