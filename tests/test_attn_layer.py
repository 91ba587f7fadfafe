"""Mixer strings as timm's `attn_layer`; these tests fail where a timm moves the private seams that this needs."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from timm.layers import Attention
from timm.models import vision_transformer as vit
from torch import nn

from chela_plugin.attn_layer import AttnLayers, MixerAttention, install
from chela_plugin.registry import MixerSpecError, UnknownMixerError, installed


class Offset(nn.Module):
    """Adds the mean over tokens; its projection starts as the identity, so that a re-initialisation would show."""

    def __init__(
        self, dim, *, causal, depth=None, layer_idx=None, device=None, dtype=None, size: int = 1, grid: bool = False
    ):
        super().__init__()
        if causal:
            raise ValueError("two-sided only")
        self.uses_grid = grid
        self.out = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.eye_(self.out.weight)
        nn.init.ones_(self.out.bias)

    def forward(self, x, **_arguments):
        return self.out(x + x.mean(1, keepdim=True))


@pytest.fixture(autouse=True)
def offset(monkeypatch):
    monkeypatch.setattr(installed, "at_run_time", {"offset": Offset})


def small(**arguments):
    return timm.create_model(
        "vit_tiny_patch16_224", depth=2, embed_dim=24, num_heads=3, img_size=32, num_classes=5, **arguments
    )


def test_timms_table_is_ours_and_keeps_timms_own_entries():
    install()
    assert isinstance(vit.ATTN_LAYERS, AttnLayers)
    assert vit.ATTN_LAYERS.get("attn") is vit.ATTN_LAYERS.get("") is Attention
    assert vit.ATTN_LAYERS.get("native") is Attention
    assert vit.ATTN_LAYERS.get("diff").__name__ == "DiffAttention"


def test_a_mixer_string_builds_timms_vit_with_that_mixer():
    model = small(attn_layer="offset(size=2)")
    assert [type(block.attn) for block in model.blocks] == [MixerAttention] * 2
    assert model.blocks[0].attn.spec == "offset(size=2)"
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize("weight_init", ["", "jax", "jax_nlhb", "moco", "reset", "skip"])
def test_a_mixer_keeps_its_own_initialisation(weight_init):
    out = small(attn_layer="offset", weight_init=weight_init).blocks[0].attn.mixer.out
    assert torch.equal(out.weight, torch.eye(24))
    assert torch.equal(out.bias, torch.ones(24))


def test_fix_init_scales_the_mixers_output_projection():
    model = small(attn_layer="offset", fix_init=True)
    for i, block in enumerate(model.blocks):
        assert torch.allclose(block.attn.mixer.out.weight, torch.eye(24) / (2 * (i + 1)) ** 0.5)


def test_fix_init_says_so_where_a_mixer_has_no_projection():
    with pytest.raises(ValueError, match="no output projection"):
        small(attn_layer="identity", fix_init=True)


def test_the_model_can_be_copied_pickled_and_exported():
    model = small(attn_layer="offset").eval()
    x = torch.randn(1, 3, 32, 32)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    attention = model.blocks[0].attn
    assert torch.equal(pickle.loads(pickle.dumps(attention)).mixer.out.weight, attention.mixer.out.weight)
    assert torch.allclose(torch.export.export(model, (x,)).module()(x), expected, atol=1e-6)  # same ops, same order


def test_timms_own_dropout_reaches_the_mixers_output():
    assert small(attn_layer="offset", proj_drop_rate=0.25).blocks[0].attn.proj_drop.p == 0.25


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"attn_layer": "ofset"}, UnknownMixerError, "did you mean 'offset'.*timm's own: 'attn', 'diff'"),
        ({"attn_layer": "offset + native"}, MixerSpecError, r"swap_mixers\(model, pattern\)"),
        ({"attn_layer": "offset(size=x)"}, MixerSpecError, "expects int"),
        ({"attn_layer": "offset(grid=True)"}, ValueError, "needs the patch grid"),
        ({"attn_layer": "offset", "attn_drop_rate": 0.1}, ValueError, "set it to 0"),
        ({"attn_layer": "offset", "block_fn": vit.ParallelScalingBlock}, ValueError, "ignores attn_layer='offset'"),
        ({"attn_layer": "offset", "block_fn": vit.DiffParallelScalingBlock}, ValueError, "ignores attn_layer='offset'"),
    ],
)
def test_what_cannot_be_honoured_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        small(**arguments)


def test_blocks_with_an_attention_of_their_own_still_work_without_a_mixer_string():
    assert small(block_fn=vit.ParallelScalingBlock)(torch.randn(1, 3, 32, 32)).shape == (1, 5)


def test_masks_are_refused_and_not_ignored():
    attention = MixerAttention("offset", 24)
    with pytest.raises(ValueError, match="attn_mask"):
        attention(torch.randn(1, 4, 24), attn_mask=torch.zeros(4, 4))
    with pytest.raises(ValueError, match="is_causal"):
        attention(torch.randn(1, 4, 24), is_causal=True)


@pytest.mark.parametrize("spec", ["chela", "linear_attention", "attention", "bidirectional(gla)"])
def test_mixers_of_ours_run_in_timms_vit(spec):
    model = small(attn_layer=spec)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.blocks.parameters())
