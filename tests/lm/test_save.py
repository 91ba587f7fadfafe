"""Saving and loading: the mixer string travels in the config, every tensor comes back bit for bit."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from chela_plugin.lm import ChelaForCausalLM
from chela_plugin.registry import UnknownMixerError, register_mixer

MORE_MIXERS = [
    "chela(long=explicit, norm=batch)",
    "chela(long=modal)",
    "chela(long=implicit)",
    "2*identity + attention(head_dim=16)",
    "windowed",
]


class Windowed(nn.Module):
    """A third party's mixer with a buffer that no checkpoint holds and no way to make it again."""

    def __init__(self, dim, device=None, dtype=None):
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim,), 5.0, device=device, dtype=dtype))
        self.register_buffer("window", torch.linspace(0, 1, dim, device=device), persistent=False)

    def forward(self, x, *, attention_mask=None, cu_seqlens=None, cache=None, grid=None):
        return x * self.window * self.scale


def windowed(dim, *, causal, depth=None, layer_idx=None, device=None, dtype=None):
    """Test mixer."""
    return Windowed(dim, device=device, dtype=dtype)


register_mixer("windowed", windowed)


def same_tensors(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_saved_model_comes_back_bit_for_bit(lm_mixer, tmp_path, small_lm):
    model, ids = small_lm(lm_mixer, num_hidden_layers=3), torch.arange(9)[None]
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["mixer"] == model.config.mixer
    assert [f.suffix for f in tmp_path.glob("model*")] == [".safetensors"]
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(back) is ChelaForCausalLM and back.config.mixer == model.config.mixer
    assert same_tensors(model, back)
    with torch.no_grad():  # equal weights, at addresses aligned otherwise: vectorised sums may differ in the last bit
        torch.testing.assert_close(back(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)


def test_tied_weights_are_saved_once_and_tied_again(tmp_path, small_lm):
    model = small_lm("attention", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert back.lm_head.weight is back.model.embed_tokens.weight and same_tensors(model, back)


def test_a_model_can_be_loaded_in_half_precision(tmp_path, small_lm):
    small_lm("chela").save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert back.lm_head.weight.dtype == torch.bfloat16
    assert back(torch.arange(9)[None]).logits.isfinite().all()


def test_weights_that_a_checkpoint_lacks_are_those_of_a_new_mixer(tmp_path, small_lm):
    model = small_lm("windowed")
    model.save_pretrained(tmp_path)
    kept = {k: v for k, v in model.state_dict().items() if "layers.1.mixer" not in k}
    kept["model.layers.0.mixer.scale"] = torch.full((32,), 2.0)
    back = ChelaForCausalLM.from_pretrained(None, config=model.config, state_dict=kept)
    scales = [layer.mixer.scale for layer in back.model.layers]
    assert (scales[0] == 2).all() and (scales[1] == 5).all()
    back.initialize_weights()
    assert (scales[0] == 2).all()


def test_a_checkpoint_of_a_mixer_that_is_not_here_says_which(tmp_path, small_lm):
    small_lm("attention").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"mixer": "elsewhere + attention"}))
    with pytest.raises(UnknownMixerError, match="elsewhere"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_checkpoint_remembers_which_distribution_its_mixers_come_from(tmp_path, small_lm):
    small_lm("windowed + attention").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["mixer_distributions"] == {"windowed": ""}  # registered by this program, not installed
    saved = {"mixer": "elsewhere + attention", "mixer_distributions": {"elsewhere": "else-where"}}
    (tmp_path / "config.json").write_text(json.dumps(config | saved))
    with pytest.raises(UnknownMixerError, match="pip install else-where"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    small_lm("attention").save_pretrained(tmp_path)
    assert "mixer_distributions" not in json.loads((tmp_path / "config.json").read_text())


def test_loading_with_another_mixer_is_no_silent_success(tmp_path, small_lm):
    small_lm("attention").save_pretrained(tmp_path)
    _, info = ChelaForCausalLM.from_pretrained(tmp_path, mixer="identity", output_loading_info=True)
    assert info["unexpected_keys"]
