"""`swap_mixers` on models that are built already."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import timm
import torch
from torch import nn

from chela_plugin import swap_mixers
from chela_plugin.attn_layer import MixerAttention
from chela_plugin.registry import MixerSpecError, installed
from chela_plugin.vision import ChelaViT


class Mean(nn.Module):
    def __init__(self, dim, *, causal, depth=None, layer_idx=None, device=None, dtype=None, size: int = 1):
        super().__init__()
        if size == 13:
            raise ValueError("not thirteen")
        self.place = (causal, depth, layer_idx)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x, **_arguments):
        return self.proj(x.mean(1, keepdim=True) + x)


@pytest.fixture(autouse=True)
def mean(monkeypatch):
    monkeypatch.setattr(installed, "at_run_time", {"mean": Mean})


def vit(name="vit_tiny_patch16_224", **arguments):
    return timm.create_model(name, **{"depth": 4, "embed_dim": 48, "num_heads": 4, "num_classes": 5, **arguments})


def held(model):
    return [b.attn.spec if isinstance(b.attn, MixerAttention) else "native" for b in model.blocks]


def test_a_pattern_is_laid_over_the_blocks_in_order():
    model = vit()
    before = [block.attn for block in model.blocks]
    assert swap_mixers(model, "mean + 2*native") == 2
    assert held(model) == ["mean", "native", "native", "mean"]
    assert model.blocks[1].attn is before[1]
    assert [model.blocks[i].attn.mixer.place for i in (0, 3)] == [(False, 4, 0), (False, 4, 3)]
    assert model(torch.randn(2, 3, 224, 224)).shape == (2, 5)


def test_new_mixers_take_the_device_dtype_and_mode_of_the_old():
    model = vit(dtype=torch.bfloat16, device="meta").eval()
    swap_mixers(model, "mean")
    parameter = model.blocks[0].attn.mixer.proj.weight
    assert (parameter.dtype, parameter.is_meta, model.blocks[0].attn.mixer.training) == (torch.bfloat16, True, False)


def test_swapped_mixers_can_be_swapped_again():
    model = vit()
    swap_mixers(model, "mean")
    assert swap_mixers(model, "mean(size=2) + native") == 2
    assert held(model) == ["mean(size=2)", "mean", "mean(size=2)", "mean"]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("deit_tiny_distilled_patch16_224", 224),  # two prefix tokens
        ("eva02_tiny_patch14_224", 224),  # rotary positions
        ("vit_relpos_small_patch16_224", 224),  # relative position bias, no class token
        ("vit_tiny_r_s16_p8_224", 224),  # convolutional stem
        ("deit3_small_patch16_224", 224),
        ("vit_small_patch14_reg4_dinov2", 518),  # register tokens
        ("naflexvit_base_patch16_gap", 384),
    ],
)
def test_the_vit_family_is_swapped_and_runs(name, size):
    model = vit(name)
    assert swap_mixers(model, "mean + native") == 2
    assert model(torch.randn(1, 3, size, size)).shape == (1, 5)


def test_beit_is_swapped_and_runs():
    model = timm.create_model("beit_base_patch16_224", depth=2, embed_dim=48, num_heads=4, num_classes=5)
    assert swap_mixers(model, "mean") == 2
    assert model(torch.randn(1, 3, 224, 224)).shape == (1, 5)


def test_metaformer_is_swapped_on_maps_and_on_tokens():
    model = timm.models.metaformer.MetaFormer(
        depths=(1, 1, 2, 1),
        dims=(16, 16, 24, 32),
        token_mixers=[timm.models.metaformer.SepConv] * 2 + [timm.models.metaformer.Attention] * 2,
        norm_layers=[timm.models.metaformer.LayerNorm2dNoBias] * 2 + [timm.models.metaformer.LayerNormNoBias] * 2,
        num_classes=5,
    )
    assert swap_mixers(model, "chela") == 5
    mixers = [block.token_mixer.mixer for stage in model.stages for block in stage.blocks]
    assert [mixer.conv.dims for mixer in mixers] == [2, 2, 1, 1, 1]
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)
    assert swap_mixers(model, "native + mean") == 2


def test_a_model_inside_another_module_is_found():
    model = nn.Sequential(vit(), nn.Identity())
    assert swap_mixers(model, "mean") == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", "no block whose mixer can be replaced$"),
        ("swin_tiny_patch4_window7_224", "12 x WindowAttention, which does not map"),
    ],
)
def test_a_model_without_a_place_for_mixers_is_an_error(name, message):
    with pytest.raises(ValueError, match=message):
        swap_mixers(timm.create_model(name, device="meta"), "mean")


def test_a_model_of_fla_without_our_hook_names_the_remedy():
    program = """
        import chela_plugin
        from fla.models import GLAConfig, GLAForCausalLM
        model = GLAForCausalLM(GLAConfig(hidden_size=64, num_hidden_layers=2, num_heads=2, vocab_size=9))
        try:
            chela_plugin.swap_mixers(model, "identity")
        except ValueError as error:
            print("chela_plugin.register()" in str(error))
        chela_plugin.register()
        print(chela_plugin.swap_mixers(model, "identity"))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        env={**os.environ, "CHELA_AUTOLOAD": "0", "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.split() == ["True", "2"], done.stderr


def test_replacing_nothing_is_an_error():
    with pytest.raises(ValueError, match="nothing to replace"):
        swap_mixers(vit(), "native")


def test_an_error_leaves_the_model_as_it_was():
    model = vit()
    with pytest.raises(ValueError, match="not thirteen"):
        swap_mixers(model, "3*mean + mean(size=13)")
    with pytest.raises(MixerSpecError):
        swap_mixers(model, "mean +")
    assert held(model) == ["native"] * 4


def test_a_chela_vit_is_swapped_and_its_saved_string_follows():
    model = timm.create_model("chela_vit_tiny", depth=4, embed_dim=48, mixer="identity", num_classes=5)
    assert isinstance(model, ChelaViT)
    assert swap_mixers(model, "native + mean") == 2
    assert model.mixer == "identity + mean + identity + mean"
    assert swap_mixers(model, "mean(size=2)") == 4
    assert model.mixer == "mean(size=2)"
    assert model._model_args["mixer"] == "mean(size=2)"
    assert model(torch.randn(1, 3, 224, 224)).shape == (1, 5)


def test_a_language_model_is_swapped_and_its_config_follows(tmp_path):
    from chela_plugin.lm import ChelaConfig, ChelaForCausalLM

    model = ChelaForCausalLM(ChelaConfig(vocab_size=9, hidden_size=48, num_hidden_layers=3, mixer="identity"))
    assert swap_mixers(model, "native + 2*mean") == 2
    assert model.config.mixer == "identity + 2*mean"
    assert model.model.layers[1].mixer.place == (True, 3, 1)
    model.save_pretrained(tmp_path)
    again = ChelaForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(again(ids, use_cache=False).logits, model.eval()(ids, use_cache=False).logits)
