"""fla(layer=...): layers of flash-linear-attention by name."""

import sys

import pytest
import torch

from chela_plugin import MixerSpecError, create_mixer
from chela_plugin.registry import MixerUnavailableError

pytest.importorskip("fla")


def test_layer_and_options_reach_the_class():
    module = create_mixer("fla(layer=GatedLinearAttention, num_heads=2, expand_k=1.0)", 64, causal=True, layer_idx=3)
    assert type(module.layer).__name__ == "GatedLinearAttention"
    assert (module.layer.hidden_size, module.layer.num_heads, module.layer.layer_idx) == (64, 2, 3)
    assert module.path("cuda") == "fla"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fla(layer=GatedLinearAtention)", "did you mean GatedLinearAttention"),
        ("fla(layer=GatedLinearAttention, num_head=2)", "did you mean 'num_heads'"),
        ("fla(layer=GatedDeltaNet, nonsense=2)", "valid options: .*expand_v"),  # its constructor takes **kwargs
        ("fla(layer=YOCOCrossAttention)", "can't stand alone"),
        ("fla(layer=LogLinearMamba2)", "needs num_heads"),
        ("fla", "needs the option 'layer'"),
    ],
)
def test_a_wrong_layer_or_option_is_one_clear_error(spec, message):
    with pytest.raises(MixerSpecError, match=message):
        create_mixer(spec, 64, causal=True)


def test_a_cpu_is_refused_with_what_to_use_instead():
    module = create_mixer("fla(layer=GatedLinearAttention)", 64, causal=True)
    with pytest.raises(ValueError, match=r"runs on a GPU only .* gla, retnet"):
        module(torch.randn(1, 4, 64))


def test_a_bidirectional_host_is_sent_to_bidirectional():
    with pytest.raises(ValueError, match=r"use bidirectional\(fla\(layer=GatedLinearAttention\)\)"):
        create_mixer("fla(layer=GatedLinearAttention)", 64, causal=False)
    module = create_mixer("bidirectional(fla(layer=GatedLinearAttention))", 64, causal=False)
    assert module.path("cuda") == "fla"


def test_reset_makes_the_weights_anew_on_meta_too():
    module = create_mixer("fla(layer=GatedDeltaNet, num_heads=2, head_dim=32)", 64, causal=True, device="meta")
    assert all(parameter.is_meta for parameter in module.parameters())
    module.to_empty(device="cpu")
    for parameter in module.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    module.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_without_fla_the_pip_line_is_shown(monkeypatch):
    monkeypatch.setitem(sys.modules, "fla.layers", None)
    from chela_plugin.mixers.fla import layer_class

    with pytest.raises(MixerUnavailableError, match=r"pip install 'chela-plugin\[lm\]'"):
        layer_class("GatedLinearAttention")


@pytest.mark.gpu
@pytest.mark.parametrize("layer", ["GatedLinearAttention, num_heads=2", "GatedDeltaNet, num_heads=2, head_dim=32"])
def test_padded_and_packed_rows_equal_the_row_alone_on_a_gpu(layer):
    module = create_mixer(f"fla(layer={layer})", 64, causal=True, device="cuda", dtype=torch.bfloat16).eval()
    x = torch.randn(2, 100, 64, device="cuda", dtype=torch.bfloat16)
    mask = torch.ones(2, 100, dtype=torch.bool, device="cuda")
    mask[1, :30] = False
    alone = module(x[1:, 30:])
    torch.testing.assert_close(module(x, attention_mask=mask)[1:, 30:], alone, rtol=0.02, atol=0.02)  # bf16
    packed = module(x[1:], cu_seqlens=torch.tensor([0, 30, 100], device="cuda"))
    torch.testing.assert_close(packed[:, 30:], alone, rtol=0.02, atol=0.02)
