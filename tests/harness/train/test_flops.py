"""Model FLOPs against formulas written out by hand, and the shipped configs."""

import pytest

from chela_plugin.harness.train.config import LanguageModel, load_run, shipped
from chela_plugin.harness.train.flops import language_flops, peak_flops
from chela_plugin.harness.train.language import new_model

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96}


def count(mixer, context):
    model = new_model(LanguageModel(config={**SIZES, "mixer": mixer}), 50)
    n = sum(p.numel() for p in model.parameters()) - 50 * 64
    return language_flops(model, context)[0] - 6 * n


def test_attention_counts_the_causal_half():
    assert count("attention", 128) == pytest.approx(12 * 2 * 64 * 128 / 2, rel=1e-3)  # a counter lies in its cache, too


def test_a_recurrence_counts_its_state_whatever_the_length():
    state = count("linear_attention", 128)
    assert state == count("linear_attention", 4096) and state % 12 == 0 and state > 0


def test_peaks_are_known_by_name_or_given():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16-mixed", None) == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16-true", None) == 756e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "32-true", None) is None
    assert peak_flops("abacus", "32-true", 0.5) == 5e11


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_config_is_valid(name):
    load_run(name)
