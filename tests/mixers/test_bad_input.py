"""One clear error for each thing a mixer can't do, when it is built; and nothing heavy imported before."""

import subprocess
import sys

import pytest
import torch

from chela_plugin import create_mixer


@pytest.mark.parametrize("name", ["retnet", "gla", "gated_deltanet", "mamba", "mamba2"])
def test_a_recurrent_mixer_sends_a_bidirectional_host_to_bidirectional(name):
    with pytest.raises(ValueError, match=rf"use bidirectional\({name}\)"):
        create_mixer(name, 64, causal=False)


@pytest.mark.parametrize(
    ("spec", "dim", "message"),
    [
        ("attention(num_heads=5)", 64, r"64 channels are not divisible by num_heads=5; choose one of \[1, 2, 4"),
        ("attention(head_dim=48)", 64, "64 channels are not divisible by head_dim=48"),
        ("attention(num_heads=2, head_dim=16)", 64, "num_heads=2 x head_dim=16 must make 64 channels"),
        ("attention(num_heads=0)", 64, "num_heads must be at least 1"),
        ("attention(head_dim=-4)", 64, "head_dim must be at least 1"),
        ("attention(rope=True, num_heads=3)", 15, "head_dim=5 is odd; use rope=False"),
        ("attention", 100, "not divisible by a head_dim of 32 or 16 or 8"),
        ("linear_attention(phi=silu)", 64, "use norm=rms"),
        ("linear_attention(num_heads=7)", 64, "not divisible by num_heads=7"),
        ("retnet(expand_k=0.3)", 64, "expand_k=0.3 of 64 channels makes 19.2"),
        ("retnet(num_heads=32)", 32, "not divisible by num_heads=32"),
        ("retnet(num_heads=16)", 16, "not divisible by num_heads=16"),
        ("retnet(num_heads=0)", 64, "num_heads must be at least 1"),
        ("retnet(num_heads=6)", 36, "leaves an odd 3"),
        ("gla(num_heads=5)", 64, "32 channels are not divisible by num_heads=5"),
        ("gla(expand_v=0.0)", 64, "expand_v=0.0"),
        ("gated_deltanet(num_heads=5)", 64, "not divisible by num_heads=5"),
        ("gated_deltanet(taps=0)", 64, "at least one tap"),
        ("mamba(d_state=0)", 64, "d_state must be at least 1"),
        ("mamba(expand=1.3)", 64, "expand=1.3 of 64 channels"),
        ("mamba2(head_dim=48)", 64, "128 channels are not divisible by head_dim=48"),
        ("mamba2(d_state=300)", 64, "d_state must be 1 to 256"),
        ("mamba2(num_groups=3)", 64, "num_groups=3 must divide the 2 heads"),
        ("mamba2(head_dim=512)", 512, "mamba2: heads are at most 256 wide, here 512"),
        ("linear_attention(num_heads=1)", 512, "linear_attention: heads are at most 256 wide, here 512"),
        ("retnet(num_heads=1)", 512, "retnet: heads are at most 256 wide, here 512"),
        ("gla(num_heads=1, decay=head)", 512, r"gla\(decay=head\): heads are at most 256 wide, here 512"),
        ("conv(expand=0)", 64, "expand must be above 0"),
        ("conv(expand=-1.0)", 64, "expand must be above 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(spec, dim, message):
    with pytest.raises(ValueError, match=message):
        create_mixer(spec, dim, causal=True)


def test_default_sizes_fit_common_widths():
    for dim in (16, 48, 64, 96, 128, 192, 320, 384, 512, 768, 1024, 2048, 2304, 5120):
        for name in (
            "attention",
            "linear_attention",
            "retnet",
            "gla",
            "gated_deltanet",
            "mamba",
            "mamba2",
            "conv",
            "chela",
        ):
            create_mixer(name, dim, causal=True, device="meta")
        create_mixer("gla(decay=head)", dim, causal=True, device="meta")


def test_wrong_calls_are_refused():
    module = create_mixer("gla", 64, causal=True)
    x = torch.randn(2, 5, 64)
    with pytest.raises(ValueError, match=r"expects x of shape \[B, T, 64\]"):
        module(x[..., :32])
    with pytest.raises(ValueError, match="padding mask of shape"):
        module(x, attention_mask=torch.ones(2, 1, 5, 5))
    with pytest.raises(ValueError, match="no two-dimensional form"):
        module(x, grid=(1, 5))
    with pytest.raises(ValueError, match="cu_seqlens must run from 0 to T = 5"):
        module(x[:1], cu_seqlens=torch.tensor([0, 4]))
    two_sided = create_mixer("attention", 64, causal=False)
    with pytest.raises(ValueError, match="has no cache"):
        two_sided(x, cache={})


def test_importing_every_mixer_imports_no_optional_package():
    code = """
import importlib, sys
for name in "attention bidirectional conv fla gated_deltanet gla identity linear_attention mamba mamba2".split():
    importlib.import_module(f"chela_plugin.mixers.{name}")
print([each for each in ("fla", "transformers", "timm", "mamba_ssm", "lightning") if each in sys.modules])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
