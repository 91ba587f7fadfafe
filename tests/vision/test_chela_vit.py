"""ChelaViT: a citizen of timm whose mixer is a string, in every block and in every saved config."""

import json

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import save_for_hf
from torch import nn

from chela_plugin.registry import MixerSpecError, UnknownMixerError, register_mixer
from chela_plugin.unordered import warn_of_order
from chela_plugin.vision import ChelaViT

MIXERS = ["chela", "attention", "linear_attention", "conv", "identity", "bidirectional(gla)", "bidirectional(mamba2)"]
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_classes": 5}


class GridProbe(nn.Module):
    """A mixer that remembers the grids it was called with and whose weights tell whether someone touched them."""

    uses_grid = True

    def __init__(self, dim, device=None, dtype=None):
        super().__init__()
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.tap = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.grids = []
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.constant_(self.proj.weight, 7.0)
        nn.init.constant_(self.tap, 3.0)

    def forward(self, x, *, attention_mask=None, cu_seqlens=None, cache=None, grid=None):
        self.grids.append(grid)
        return x * self.tap


def grid_probe(dim, *, causal, depth=None, layer_idx=None, device=None, dtype=None):
    """Test mixer."""
    probe = GridProbe(dim, device=device, dtype=dtype)
    probe.asked = {"causal": causal, "depth": depth, "layer_idx": layer_idx}
    return probe


register_mixer("grid_probe", grid_probe)


def tiny(mixer="attention", **kwargs):
    torch.manual_seed(0)
    return timm.create_model("chela_vit_tiny", mixer=mixer, **{**TINY, **kwargs}).eval()


@pytest.fixture
def image():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("size, dim", [("tiny", 192), ("small", 384), ("base", 768)])
def test_both_names_create_the_same_architecture(size, dim):
    short = timm.create_model(f"chela_vit_{size}", mixer="attention", device="meta")
    long = timm.create_model(f"chela_vit_{size}_patch16_224", mixer="attention", device="meta")
    assert (short.embed_dim, len(short.blocks)) == (long.embed_dim, len(long.blocks)) == (dim, 12)
    assert short.pretrained_cfg["architecture"] == f"chela_vit_{size}_patch16_224"
    assert {f"chela_vit_{size}", f"chela_vit_{size}_patch16_224"} <= set(timm.list_models("chela_vit*"))


def test_small_has_the_parameters_of_timms_vit_small_within_3_percent():
    ours, theirs = (timm.create_model(name, device="meta") for name in ("chela_vit_small", "vit_small_patch16_224"))
    assert ours.mixer == "chela"
    assert parameters(ours) == pytest.approx(parameters(theirs), rel=0.03)  # near enough to compare at equal size


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_gives_finite_outputs_and_gradients(mixer, image):
    model = tiny(mixer).train()
    out = model(image)
    out.square().mean().backward()
    assert out.shape == (2, 5) and out.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("mixer", MIXERS)
def test_rows_of_a_batch_do_not_see_each_other(mixer, image):
    model = tiny(mixer)
    # One row alone may take another matmul blocking than two: a few ulp of fp32 sums.
    torch.testing.assert_close(model(image)[:1], model(image[:1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixer", ["chela", "attention", "conv"])
def test_small_patches_on_small_images_as_the_digits_task_uses_them(mixer):
    model = timm.create_model(
        "chela_vit_tiny",
        img_size=8,
        patch_size=1,
        in_chans=1,
        num_classes=10,
        embed_dim=64,
        depth=4,
        mixer=mixer,
        mlp_ratio=2.0,
    )
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_a_pattern_fills_the_depth_and_native_is_chela():
    model = tiny("attention + 2*identity", depth=5)
    names = [type(block.mixer).__name__ for block in model.blocks]
    assert names == ["Attention", "Identity", "Identity", "Attention", "Identity"]
    assert model.mixer == "attention + 2*identity"
    assert [type(b.mixer) for b in tiny("native").blocks] == [type(b.mixer) for b in tiny("chela").blocks]


def test_each_block_tells_its_mixer_that_order_does_not_matter_and_where_it_stands():
    asked = [block.mixer.asked for block in tiny("grid_probe", depth=3).blocks]
    assert asked == [{"causal": False, "depth": 3, "layer_idx": i} for i in range(3)]


@pytest.mark.parametrize("height, width", [(32, 32), (24, 40)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_mixer_that_reads_the_grid_gets_that_of_this_image(height, width, dynamic):
    model = tiny("grid_probe", img_size=32 if dynamic else (height, width), dynamic_img_size=dynamic)
    model(torch.randn(1, 3, height, width))
    assert [block.mixer.grids for block in model.blocks] == [[(height // 8, width // 8)]] * 2


def test_padded_dynamic_images_round_the_grid_up():
    model = tiny("grid_probe", dynamic_img_size=True, dynamic_img_pad=True)
    model(torch.randn(1, 3, 30, 33))
    assert model.blocks[0].mixer.grids == [(4, 5)]


@pytest.mark.parametrize("mode", ["", "jax", "jax_nlhb", "moco", "skip", "reset"])
def test_no_scheme_of_the_host_reinitialises_a_mixer(mode):
    for block in tiny("grid_probe", weight_init=mode).blocks:
        assert (block.mixer.proj.weight == 7).all() and (block.mixer.tap == 3).all()


def test_a_mixer_built_without_storage_resets_its_own_parameters():
    model = tiny("grid_probe", device="meta").to_empty(device="cpu")
    model.init_weights()
    assert all((block.mixer.tap == 3).all() for block in model.blocks)
    assert model.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)  # 4,096 draws: 1 % spread


@pytest.mark.parametrize("mixer", ["chela", "attention", "bidirectional(gla)"])
def test_gradient_checkpointing_changes_nothing(mixer, image):
    model = tiny(mixer).train()
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(image).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-6)  # the same operations, run twice


@pytest.mark.parametrize("mixer", ["chela", "attention"])
def test_features_only_gives_maps_that_downstream_models_take(mixer):
    model = tiny(mixer, features_only=True, depth=4, out_indices=(0, 3))
    maps = model(torch.randn(2, 3, 32, 32))
    assert [m.shape for m in maps] == [(2, 32, 4, 4)] * 2
    assert model.feature_info.channels() == [32, 32] and model.feature_info.reduction() == [8, 8]


def test_intermediates_agree_with_the_forward_pass(image):
    model = tiny("chela", global_pool="")
    final, features = model.forward_intermediates(image)
    torch.testing.assert_close(final, model.forward_features(image), rtol=0, atol=0)
    assert [f.shape for f in features] == [(2, 32, 4, 4)] * 2
    (last,) = model.forward_intermediates(image, indices=1, norm=True, output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(last, final, rtol=0, atol=0)
    torch.testing.assert_close(model.get_intermediate_layers(image, n=1, norm=True)[0], final, rtol=0, atol=0)
    torch.testing.assert_close(features[1].flatten(2).mT, model.get_intermediate_layers(image)[0], rtol=0, atol=0)
    out = model.forward_intermediates(image, indices=[0], stop_early=True, output_dict=True)
    torch.testing.assert_close(out["image_intermediates"][0], features[0], rtol=0, atol=0)


def test_pruning_keeps_what_earlier_layers_need(image):
    model = tiny("chela", depth=3)
    wanted = model.forward_intermediates(image, indices=[1], intermediates_only=True)[0]
    model.prune_intermediate_layers([1])
    assert len(model.blocks) == 2
    torch.testing.assert_close(model.forward_intermediates(image, intermediates_only=True)[-1], wanted)


@pytest.mark.parametrize("mixer", ["chela", "conv", "attention", "bidirectional(mamba2)"])
def test_another_input_size_keeps_every_parameter_but_the_position_embedding(mixer):
    model = tiny(mixer)
    before = {k: v.shape for k, v in model.named_parameters()}
    model.set_input_size(img_size=(48, 40))
    assert model(torch.randn(1, 3, 48, 40)).shape == (1, 5)
    changed = {k for k, v in model.named_parameters() if v.shape != before[k]}
    assert changed == {"pos_embed"}


@pytest.mark.parametrize("mixer", ["chela", "attention"])
def test_dynamic_sizes_agree_with_a_fixed_one(mixer, image):
    fixed, dynamic = tiny(mixer), tiny(mixer, dynamic_img_size=True)
    dynamic.load_state_dict(fixed.state_dict())
    # At the size trained for, resampling the position embedding is the identity up to rounding.
    torch.testing.assert_close(dynamic(image), fixed(image), rtol=1e-4, atol=1e-5)
    assert dynamic(torch.randn(1, 3, 56, 24)).shape == (1, 5)


def test_weights_carry_over_to_another_resolution(tmp_path):
    model = tiny("chela")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 5, "input_size": (3, 32, 32)}
    larger = tiny("chela", img_size=64, pretrained=True, pretrained_cfg_overlay=overlay)
    torch.testing.assert_close(larger.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight, rtol=0, atol=0)
    assert larger.pos_embed.shape[1] == 64


def test_a_model_saved_for_one_shape_of_image_loads_for_another(tmp_path):
    save_for_hf(tiny("chela", img_size=(32, 48)), str(tmp_path), safe_serialization=True)
    small = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    large = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=(64, 40))
    assert (small.patch_embed.grid_size, large.patch_embed.grid_size) == ((4, 6), (8, 5))
    wanted = resample_abs_pos_embed(small.pos_embed, new_size=[8, 5], old_size=[4, 6], num_prefix_tokens=0)
    torch.testing.assert_close(large.pos_embed, wanted, rtol=0, atol=0)
    for name, parameter in large.named_parameters():
        assert name == "pos_embed" or torch.equal(parameter, small.get_parameter(name))


@pytest.mark.parametrize("mixer", ["chela", "chela(long=explicit) + attention"])
def test_a_saved_model_comes_back_with_its_mixer(mixer, image, tmp_path):
    model = tiny(mixer)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    assert json.loads((tmp_path / "config.json").read_text())["model_args"]["mixer"] == mixer
    back = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert back.mixer == mixer
    torch.testing.assert_close(back(image), model(image), rtol=0, atol=0)


def test_the_default_mixer_is_saved_too(tmp_path):
    save_for_hf(timm.create_model("chela_vit_tiny", **TINY), str(tmp_path), safe_serialization=True)
    assert json.loads((tmp_path / "config.json").read_text())["model_args"]["mixer"] == "chela"


def test_the_classifier_can_be_replaced(image):
    model = tiny()
    model.reset_classifier(3)
    assert model(image).shape == (2, 3)
    model.reset_classifier(0, "")
    assert model(image).shape == (2, 16, 32)
    with pytest.raises(AssertionError, match="class token"):
        model.reset_classifier(3, "token")


def test_every_parameter_has_a_group_and_layers_come_in_order():
    model = tiny("chela", depth=3)
    groups = timm.models.group_parameters(model, model.group_matcher())
    assert sum(len(names) for names in groups.values()) == len(list(model.parameters()))
    order = {name: place for place, names in groups.items() for name in names}
    firsts = [order[next(n for n in order if n.startswith(f"blocks.{i}.mixer"))] for i in range(3)]
    assert order["pos_embed"] < firsts[0] < firsts[1] < firsts[2] < order["head.weight"]


def test_weight_decay_spares_the_position_embedding_and_what_a_mixer_marks():
    model = tiny("grid_probe")
    model.blocks[1].mixer.tap._no_weight_decay = True
    assert model.no_weight_decay() == {"pos_embed", "blocks.1.mixer.tap"}


@pytest.mark.parametrize("mixer", MIXERS)
def test_device_and_dtype_reach_the_mixers(mixer):
    model = tiny(mixer, dtype=torch.bfloat16)
    assert {p.dtype for block in model.blocks for p in block.mixer.parameters()} <= {torch.bfloat16, torch.float32}
    assert model.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    out = model(torch.randn(1, 3, 32, 32, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
    assert all(p.is_meta for p in tiny(mixer, device="meta").parameters())


@pytest.mark.parametrize("mixer", ["chela", "attention"])
def test_export_gives_the_same_outputs(mixer, image):
    model = tiny(mixer)
    exported = torch.export.export(model, (image,)).module()
    # Export decomposes some operations; sums may be grouped differently.
    torch.testing.assert_close(exported(image), model(image), rtol=1e-4, atol=1e-5)


def test_fx_traces_the_backbone_with_blocks_as_leaves(image):
    model = tiny("chela")
    traced = timm.models.FeatureGraphNet(model, out_indices=(1,), out_map=["blocks.1"])
    (features,) = traced(image)
    torch.testing.assert_close(features, model.forward_intermediates(image, output_fmt="NLC")[1][1])


@pytest.mark.parametrize("mixer", ["chela", "attention"])
def test_a_compiled_model_has_no_graph_break(mixer, image):
    torch._dynamo.reset()
    model = tiny(mixer)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(image), model(image), rtol=1e-4, atol=1e-5)


def test_stochastic_depth_and_layer_scale_act_in_every_block():
    model = tiny(drop_path_rate=0.5, init_values=1e-5, depth=3)
    assert [getattr(b.drop_path1, "drop_prob", 0.0) for b in model.blocks] == pytest.approx([0, 0.25, 0.5])
    assert all((b.ls1.gamma == 1e-5).all() for b in model.blocks)


def test_dropped_patches_leave_the_rest_in_order():
    model = tiny("attention", patch_drop_rate=0.5).train()
    tokens = torch.arange(16.0).view(1, 16, 1)
    kept = model.patch_drop(tokens).flatten()
    assert len(kept) == 8 and (kept.diff() > 0).all()
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize("spec", ["mamba2", "gla", "gated_deltanet"])
def test_a_mixer_that_is_only_causal_runs_and_warns_once_with_the_remedy(spec, image):
    warn_of_order.cache_clear()
    with pytest.warns(UserWarning, match=rf"bidirectional\({spec}\)") as caught:
        model = tiny(f"attention + {spec}", depth=4)
    assert len([w for w in caught if "causal" in str(w.message)]) == 1
    assert model(image).isfinite().all()


def test_an_option_that_no_mixer_of_images_takes_is_an_error_and_not_a_warning():
    with pytest.raises(ValueError, match="not divisible by head_dim"):
        tiny("chela(head_dim=7)")


def test_bad_arguments_are_refused_with_one_clear_error(image):
    with pytest.raises(UnknownMixerError, match="attention"):
        tiny("atention")
    with pytest.raises(MixerSpecError):
        tiny("chela +")
    with pytest.raises(TypeError, match="string"):
        tiny(nn.Identity)
    with pytest.raises(ValueError, match="class token"):
        tiny(global_pool="token")
    with pytest.raises(ValueError, match="grid"):
        tiny("attention + grid_probe", patch_drop_rate=0.25)
    with pytest.raises(TypeError, match="mixr"):
        tiny(mixr="chela")
    with pytest.raises(TypeError, match="attn_mask"):
        tiny()(image, attn_mask=torch.ones(16, 16))
    with pytest.raises(ValueError, match="attn_mask"):
        tiny().get_intermediate_layers(image, attn_mask=torch.ones(16, 16))
    with pytest.raises(ValueError, match="is_causal"):
        tiny().forward_intermediates(image, is_causal=True)
    with pytest.raises(ValueError, match="output_fmt"):
        tiny().forward_intermediates(image, output_fmt="NHWC")
    for wrong in ({"img_size": 36}, {"img_size": (32, 20)}, {"patch_size": 5}):
        with pytest.raises(ValueError, match="not whole patches"):
            tiny(**wrong)
    with pytest.raises(ValueError, match="not whole patches"):
        tiny().set_input_size(img_size=(30, 32))
    with pytest.raises(AssertionError, match=r"divisible by patch size"):
        tiny(dynamic_img_size=True)(torch.randn(1, 3, 30, 32))
    with pytest.raises(AssertionError, match=r"Input height \(48\)"):
        tiny()(torch.randn(1, 3, 48, 32))


def test_a_dropped_patch_has_no_place_in_a_feature_map(image):
    with pytest.raises(ValueError, match="NLC"):
        tiny(patch_drop_rate=0.5).train().forward_intermediates(image)


def test_importing_the_package_imports_no_mixer():
    import subprocess
    import sys

    script = (
        "import sys, chela_plugin.vision\n"
        "print([m for m in sys.modules if m.startswith(('chela_plugin.mixers.', 'chela_plugin.layers.'))])"
    )
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "[]"


def test_the_class_can_be_used_without_the_registry(image):
    model = ChelaViT(img_size=32, patch_size=8, embed_dim=32, depth=1, num_classes=2, mixer="attention")
    assert model(image).shape == (2, 2)
