"""A stranger's mixer: one distribution, one entry point, one file; no import of ours in the program that uses it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

MIXER = '''
"""Running mean of the tokens so far, or of all of them, and a linear map."""

import torch
from torch import nn


class Stranger(nn.Module):
    """Mean, then linear."""

    def __init__(self, dim, *, causal, depth=None, layer_idx=None, device=None, dtype=None, bias: bool = True):
        super().__init__()
        self.causal = causal
        self.linear = nn.Linear(dim, dim, bias=bias, device=device, dtype=dtype)

    def reset_parameters(self):
        pass

    def forward(self, x, *, attention_mask=None, cu_seqlens=None, cache=None, grid=None):
        if cu_seqlens is not None or cache is not None or grid is not None:
            raise ValueError("stranger takes no cu_seqlens, cache or grid")
        if not self.causal:
            return self.linear(x.mean(1, keepdim=True).expand_as(x))
        steps = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)
        return self.linear(x.cumsum(1) / steps[:, None])
'''


@pytest.fixture
def site(tmp_path) -> Path:
    """A folder as pip would fill it."""
    site = tmp_path / "site"
    info = site / "strangers_mixer-0.1.dist-info"
    info.mkdir(parents=True)
    (site / "strangers_file.py").write_text(MIXER)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: strangers-mixer\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[chela_plugin.mixers]\nstranger = strangers_file:Stranger\n")
    return site


def run(site: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, cwd=site.parent, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_works_in_the_vision_backbone_and_in_timms_own(site):
    program = """
        import timm, torch
        model = timm.create_model('chela_vit_tiny', mixer='stranger(bias=False)', depth=2, num_classes=10)
        print(type(model.blocks[0].mixer).__name__, model.mixer, tuple(model(torch.randn(1, 3, 224, 224)).shape))
        model = timm.create_model('vit_tiny_patch16_224', attn_layer='stranger', depth=2, num_classes=10)
        print(tuple(model(torch.randn(1, 3, 224, 224)).shape))
    """
    assert run(site, "-c", textwrap.dedent(program)).splitlines() == [
        "Stranger stranger(bias=False) (1, 10)",
        "(1, 10)",
    ]


def test_it_works_in_the_language_model_beside_chela(site):
    program = """
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
        sizes = dict(hidden_size=64, num_hidden_layers=4, vocab_size=50)
        config = AutoConfig.for_model('chela', mixer='stranger + chela', **sizes)
        model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained('saved')
        again = AutoModelForCausalLM.from_pretrained('saved').eval()
        ids = torch.arange(12)[None]
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)
        print([type(layer.mixer).__name__ for layer in again.model.layers], again.config.mixer)
    """
    assert run(site, "-c", textwrap.dedent(program)).splitlines()[-1] == (
        "['Stranger', 'Chela', 'Stranger', 'Chela'] stranger + chela"
    )


def test_it_works_in_an_ablation(site):
    ablation = """
        tasks: [digits]
        mixers: [attention, stranger]
        baseline: attention
        backbone: {kind: vision, dim: 32, depth: 1, patch_size: 2, mlp_hidden: 64}
        training: {steps: 4, batch_size: 8, evaluate_every: 2, accelerator: cpu}
        learning_rates: [1.0e-3]
        seeds: [0]
    """
    (site.parent / "ablation.yaml").write_text(textwrap.dedent(ablation))
    cli = "import sys; from chela_plugin.cli import main; sys.argv[0] = 'chela'; main()"  # the console command's own
    listed = run(site, "-c", cli, "mixers")
    assert "strangers-mixer" in listed
    run(site, "-c", cli, "ablate", "ablation.yaml", "--out", "results")
    rows = [json.loads(line) for line in (site.parent / "results" / "results.jsonl").read_text().splitlines()]
    runs = {row["mixer"]: row["status"] for row in rows if row["record"] == "run"}
    assert runs == {"attention": "finished", "stranger": "finished"}
