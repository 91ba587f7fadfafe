"""ChelaFormer: four stages of any mixer, images of any size, a citizen of timm."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import nn

from chela_plugin import swap_mixers
from chela_plugin.registry import MixerSpecError, installed
from chela_plugin.vision import ChelaFormer

TINY = {"depths": (1, 2, 1, 1), "dims": (16, 24, 32, 40), "num_classes": 5}


def tiny(mixer="chela", **kwargs):
    torch.manual_seed(0)
    return timm.create_model("chela_former_s12", mixer=mixer, **{**TINY, **kwargs}).eval()


class Offset(nn.Module):
    """A mixer whose weights tell whether someone touched them."""

    def __init__(self, dim, *, causal, depth=None, layer_idx=None, device=None, dtype=None):
        super().__init__()
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.constant_(self.proj.weight, 7.0)

    def forward(self, x, **_arguments):
        return self.proj(x)


@pytest.fixture(autouse=True)
def offset(monkeypatch):
    monkeypatch.setattr(installed, "at_run_time", {"offset": Offset})


@pytest.fixture
def image():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("size", "blocks"), [("s12", 12), ("s24", 24)])
def test_the_sizes_are_poolformers(size, blocks):
    model = timm.create_model(f"chela_former_{size}", device="meta")
    assert [model.mixer, len(model.all_blocks())] == ["chela", blocks]
    theirs = timm.create_model(f"poolformer_{size}", device="meta")
    assert model.feature_info == theirs.feature_info
    assert [len(stage.blocks) for stage in model.stages] == [len(stage.blocks) for stage in theirs.stages]


@pytest.mark.parametrize("mixer", ["chela", "conv", "attention", "bidirectional(gla)", "bidirectional(mamba2)"])
def test_every_mixer_gives_finite_outputs_and_gradients(mixer, image):
    model = tiny(mixer).train()
    out = model(image)
    out.square().mean().backward()
    assert out.shape == (2, 5) and out.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_pattern_runs_over_the_blocks_of_all_stages():
    names = [type(block.mixer).__name__ for block in tiny("chela + 2*attention").all_blocks()]
    assert names == ["Chela", "Attention", "Attention", "Chela", "Attention"]
    places = [block.mixer.depth for block in tiny().all_blocks()]
    assert places == [5] * 5


@pytest.mark.parametrize("size", [(64, 64), (37, 75), (32, 160)])
def test_images_of_any_size_and_every_stage_reads_its_own_grid(size):
    model = tiny()
    maps = model.forward_intermediates(torch.randn(1, 3, *size), intermediates_only=True)
    assert model(torch.randn(1, 3, *size)).shape == (1, 5)
    for i, features in enumerate(maps):
        exact = [side / (4 * 2**i) for side in size]
        assert all(abs(n - x) <= 1 for n, x in zip(features.shape[-2:], exact, strict=True))


def test_no_parameter_depends_on_the_size_of_the_image():
    with pytest.raises(TypeError, match="img_size"):
        tiny(img_size=64)
    assert not [name for name, _ in tiny().named_parameters() if "pos" in name]


def test_features_come_at_four_strides(image):
    model = tiny(features_only=True)
    assert [m.shape for m in model(image)] == [(2, 16, 16, 16), (2, 24, 8, 8), (2, 32, 4, 4), (2, 40, 2, 2)]
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    assert len(tiny(features_only=True, out_indices=(1, 2))(image)) == 2


def test_neighbouring_stages_of_one_width_are_two_scales_all_the_same(image):
    model = tiny(dims=(16, 16, 32, 32), features_only=True)
    assert [m.shape for m in model(image)] == [(2, 16, 16, 16), (2, 16, 8, 8), (2, 32, 4, 4), (2, 32, 2, 2)]


def test_intermediates_agree_with_the_forward_pass_and_with_pruned_models(image):
    model = tiny()
    final, maps = model.forward_intermediates(image)
    torch.testing.assert_close(final, model.forward_features(image), rtol=0, atol=0)
    torch.testing.assert_close(maps[-1], final, rtol=0, atol=0)
    (second,) = model.forward_intermediates(image, indices=[1], stop_early=True, intermediates_only=True)
    model.prune_intermediate_layers([1])
    assert (len(model.stages), model.num_features) == (2, 24)
    torch.testing.assert_close(model(image), second, rtol=0, atol=0)
    with pytest.raises(ValueError, match="NCHW"):
        model.forward_intermediates(image, output_fmt="NLC")


def test_the_classifier_can_be_replaced(image):
    model = tiny(global_pool="max")
    features = model.forward_features(image)
    pooled = model.forward_head(features, pre_logits=True)
    model.reset_classifier(3)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled, rtol=0, atol=0)
    assert model(image).shape == (2, 3)
    model.reset_classifier(0, "")
    assert model(image).shape == (2, 40, 2, 2)
    model.reset_classifier(3)
    assert model(image).shape == (2, 3, 2, 2)
    with pytest.raises(AssertionError, match="width"):
        model.reset_classifier(3, "catavgmax")


def test_parameters_are_grouped_by_stem_and_blocks_in_order():
    model = tiny()
    groups = timm.models.group_parameters(model, model.group_matcher())
    assert sum(len(names) for names in groups.values()) == len(list(model.parameters()))
    order = {name: place for place, names in groups.items() for name in names}
    firsts = [order[f"stages.{s}.blocks.{b}.norm1.weight"] for s, b in ((0, 0), (1, 0), (1, 1), (2, 0), (3, 0))]
    assert order["stem.conv.weight"] < firsts[0] and firsts == sorted(firsts) and len(set(firsts)) == 5


def test_gradient_checkpointing_changes_nothing(image):
    model = tiny("attention").train()
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(image).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-6)  # the same operations, run twice


def test_a_model_built_without_storage_gets_all_its_values():
    model = tiny(device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
    model.init_weights()
    assert all(t.isfinite().all() for t in (*model.parameters(), *model.buffers()))
    # 4 x 40 x 40 draws of deviation 0.02 have a sample deviation within 1 %.
    assert model.stages[3].blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_mixers_keep_their_own_initialisation():
    block = tiny("offset").stages[3].blocks[0]
    assert (block.mixer.proj.weight == 7).all()


def test_stochastic_depth_and_layer_scale_act_in_every_block():
    model = tiny("identity", drop_path_rate=0.4, init_values=1e-5)
    rates = [getattr(b.drop_path1, "drop_prob", 0.0) for b in model.all_blocks()]
    assert rates == sorted(rates) and rates[-1] == pytest.approx(0.4)
    assert all((b.ls2.gamma == 1e-5).all() for b in model.all_blocks())


def test_device_and_dtype_reach_every_parameter(image):
    model = tiny(dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(image.bfloat16()).dtype == torch.bfloat16
    assert all(p.is_meta for p in tiny(device="meta").parameters())


def test_a_saved_model_comes_back_with_its_mixer(image, tmp_path):
    model = tiny("chela(long=modal) + conv")
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    assert json.loads((tmp_path / "config.json").read_text())["model_args"]["mixer"] == "chela(long=modal) + conv"
    back = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(back(image), model(image), rtol=0, atol=0)


def test_swapped_mixers_are_those_that_the_string_builds(image):
    model = tiny("conv")
    assert swap_mixers(model, "chela + native") == 3
    assert model.mixer == "chela + conv + chela + conv + chela"
    rebuilt = tiny(model.mixer)
    rebuilt.load_state_dict(model.state_dict())
    torch.testing.assert_close(rebuilt(image), model(image), rtol=0, atol=0)


def test_export_gives_the_same_outputs(image):
    model = tiny()
    exported = torch.export.export(model, (image,)).module()
    # Export decomposes some operations; sums may be grouped differently.
    torch.testing.assert_close(exported(image), model(image), rtol=1e-4, atol=1e-5)


def test_bad_arguments_are_refused_with_one_clear_error():
    with pytest.raises(MixerSpecError):
        tiny("chela +")
    with pytest.raises(TypeError, match="string"):
        ChelaFormer(mixer=nn.Identity)
    with pytest.raises(TypeError, match="mixr"):
        tiny(mixr="chela")
