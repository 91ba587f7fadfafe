"""Mixer strings as timm's `attn_layer`; these tests fail where a timm moves the private seams that this needs."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from timm.layers import Attention
from timm.models import save_for_hf
from timm.models import vision_transformer as vit
from torch import nn

from chela_plugin.attn_layer import AttnLayers, MapMixer, MixerAttention, install
from chela_plugin.registry import MixerSpecError, UnknownMixerError, installed
from chela_plugin.unordered import warn_of_order


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


def test_masks_that_a_mixer_cannot_honour_are_refused_and_not_ignored():
    attention = MixerAttention("offset", 24)
    with pytest.raises(ValueError, match="use_key_only_attn_mask=True"):
        attention(torch.randn(1, 4, 24), attn_mask=torch.zeros(4, 4))
    with pytest.raises(ValueError, match="use_key_only_attn_mask=True"):
        attention(torch.randn(2, 4, 24), attn_mask=torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match="is_causal"):
        attention(torch.randn(1, 4, 24), is_causal=True)


def naflex(spec="chela", **arguments):
    torch.manual_seed(0)
    return timm.create_model(
        "naflexvit_base_patch16_gap", depth=2, embed_dim=32, num_heads=2, num_classes=5, attn_layer=spec, **arguments
    ).eval()


@pytest.mark.parametrize("spec", ["chela", "attention", "bidirectional(gla)"])
def test_naflex_images_padded_to_one_batch_score_as_each_alone(spec):
    model = naflex(spec, use_key_only_attn_mask=True)
    images = []
    for height, width in ((2, 3), (3, 4)):
        places = torch.cartesian_prod(torch.arange(height), torch.arange(width))
        images.append((torch.randn(1, height * width, 16 * 16 * 3), places[None]))
    alone = [model(x, patch_coord=at, patch_valid=torch.ones(at.shape[:2], dtype=torch.bool)) for x, at in images]
    x, at, there = (
        torch.randn(2, 12, 768),
        torch.zeros(2, 12, 2, dtype=torch.long),
        torch.zeros(2, 12, dtype=torch.bool),
    )
    for i, (patches, places) in enumerate(images):
        n = patches.shape[1]
        x[i, :n], at[i, :n], there[i, :n] = patches[0], places[0], True
    # The same sums over other lengths, fp32.
    torch.testing.assert_close(model(x, patch_coord=at, patch_valid=there), torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_naflex_masks_between_pairs_are_refused():
    there = torch.tensor([[True, True, False, False]])
    with pytest.raises(ValueError, match="use_key_only_attn_mask=True"):
        naflex()(torch.randn(1, 4, 768), patch_coord=torch.zeros(1, 4, 2, dtype=torch.long), patch_valid=there)


def test_a_naflex_model_that_would_ignore_the_string_says_so():
    for ignoring in ({"rope_type": "axial"}, {"swiglu_mlp": True}):
        with pytest.raises(ValueError, match=r"ignore attn_layer='chela'.*swap_mixers"):
            naflex(**ignoring)


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "beit_base_patch16_224", "vit_relpos_small_patch16_224"])
def test_a_model_that_takes_no_attn_layer_says_so(name):
    with pytest.raises(TypeError, match="attn_layer"):
        timm.create_model(name, attn_layer="offset", device="meta")


def test_a_causal_mixer_warns_once_and_names_the_remedy():
    warn_of_order.cache_clear()
    with pytest.warns(UserWarning, match=r"bidirectional\(mamba2\)") as caught:
        small(attn_layer="mamba2")
    assert len([w for w in caught if "causal" in str(w.message)]) == 1


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_a_scriptable_model_is_scripted_with_chela_in_it():
    model = small(attn_layer="chela", scriptable=True).eval()
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x), rtol=1e-5, atol=1e-6)  # same ops


def former(token_mixers, name="poolformer_s12", **arguments):
    return timm.create_model(name, token_mixers=token_mixers, dims=(16, 16, 24, 32), num_classes=5, **arguments)


@pytest.fixture
def narrow(monkeypatch):
    """poolformer_s12 with one block a stage, so that building one takes no time."""
    entry = timm.models._registry._model_entrypoints

    def poolformer_s12(pretrained=False, **kwargs):
        fixed = {"depths": (1, 1, 1, 1), "norm_layers": timm.layers.GroupNorm1, "use_mlp_head": False}
        return timm.models.metaformer._create_metaformer("poolformer_s12", pretrained, **fixed, **kwargs)

    monkeypatch.setitem(entry, "poolformer_s12", poolformer_s12)


def test_metaformer_takes_a_pattern_over_its_stages(narrow):
    model = former("chela + native")
    kinds = [stage.blocks[0].token_mixer for stage in model.stages]
    assert [getattr(kind, "spec", "native") for kind in kinds] == ["chela", "native", "chela", "native"]
    assert kinds[0].uses_grid and kinds[0].mixer.conv.dims == 2
    model(torch.randn(2, 3, 64, 96)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_metaformer_takes_strings_among_classes(narrow):
    model = former(["offset", timm.models.metaformer.SepConv, "native", "chela"])
    names = [type(stage.blocks[0].token_mixer).__name__ for stage in model.stages]
    assert names == ["MapMixer", "SepConv", "Pooling", "MapMixer"]
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)


def test_mixers_in_metaformer_keep_their_initialisation_and_pickle(narrow):
    mixer = former("offset").stages[3].blocks[0].token_mixer
    assert isinstance(mixer, MapMixer) and torch.equal(mixer.mixer.out.weight, torch.eye(32))
    again = pickle.loads(pickle.dumps(mixer))
    assert torch.equal(again.mixer.out.weight, mixer.mixer.out.weight)


def test_the_strings_are_saved_with_timms_own_models(narrow, tmp_path):
    x = torch.randn(1, 3, 32, 32)
    for name, model in (("vit", small(attn_layer="chela")), ("former", former("chela(long=modal) + native"))):
        save_for_hf(model, str(tmp_path / name), safe_serialization=True)
        back = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True)
        torch.testing.assert_close(back.eval()(x), model.eval()(x), rtol=0, atol=0)


def test_bad_token_mixers_are_refused(narrow):
    with pytest.raises(UnknownMixerError, match="did you mean 'offset'"):
        former("ofset")
    with pytest.raises(MixerSpecError):
        former(["offset", "offset", "offset +", "offset"])


@pytest.mark.parametrize("spec", ["chela", "linear_attention", "attention", "bidirectional(gla)"])
def test_mixers_of_ours_run_in_timms_vit(spec):
    model = small(attn_layer=spec)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.blocks.parameters())
