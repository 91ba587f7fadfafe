"""CHELA as one node of autograd, and its activations' kernels, under Triton's interpreter against the composed form.

Triton decides at its first import whether kernels are interpreted, so this file runs itself once more in a process of
its own with TRITON_INTERPRET=1.
"""

import os

import pytest
import torch
from compiled import compiled_for_hopper
from torch import nn

from chela_plugin.kernels.qkv_activation.reference import qkv_activation
from chela_plugin.layers import Chela

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that the first test starts")
# fp32 sums in two orders, relative to the whole. The decay's softplus in the kernel is log(1 + e), good to 1e-5 of a
# slow decay, and the terms of the skip's gradient cancel to a hundredth: the norm takes out its own direction.
TOLERANCE = 1e-4


@pytest.mark.skipif(INTERPRETED, reason="this is the process it starts")
def test_the_node_passes_under_the_interpreter(this_file_under_the_interpreter):
    this_file_under_the_interpreter()


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("name", ["activate", "gradient"])
def test_the_kernels_compile_for_a_gpu_that_is_not_here(name):
    """A name of two types in two branches, for one, is nothing to the interpreter."""
    pytest.importorskip("triton")
    from chela_plugin.kernels.qkv_activation import triton as kernels

    kernel = getattr(kernels, name)
    numbers = {"QK": 64, "KEYS": 32, "VALUES": 64, "V": 32, "H": 2, "PAD": 16, "BR": 16, "BC": 64, "BH": 16}
    numbers |= {"DECAY": True, "SKIP": True}
    types = {n: "*bf16" for n in kernel.arg_names if n != "rows" and not n.startswith("stride")}
    types |= dict.fromkeys(("log_decay", "dlog_decay", "dbias"), "*fp32")
    assert compiled_for_hopper(kernel, numbers, types).asm["ptx"]


def chela(dim=32, **options):
    torch.manual_seed(0)
    mixer = Chela(dim, key_dim=12, **{"causal": True, "num_heads": 2, **options})
    for parameter in mixer.parameters():
        if parameter.dim() < 2:
            nn.init.normal_(parameter, std=0.5)  # ones and zeros would hide a factor or a term left out
    mixer.conv.forward = lambda x, **_: x.tanh()  # not this file's affair, and slow to interpret
    return mixer


def outcome(mixer, x, dy):
    named = {name: p for name, p in mixer.named_parameters() if not name.startswith("conv.")}
    names, leaves = ["x", *named], [x, *named.values()]
    y = mixer(x)
    return {"y": y.detach()} | dict(zip(names, torch.autograd.grad(y, leaves, dy), strict=True))


@interpreted
@pytest.mark.parametrize(
    "options",
    [
        {"dim": 32},  # the columns of 2 decays are padded to 16
        {"dim": 96, "num_heads": 3, "decay": "none"},
        {"dim": 40, "causal": False},
    ],
)
def test_outputs_and_all_gradients_equal_the_composed_form(options, monkeypatch):
    mixer = chela(**options)
    x, dy = torch.randn(2, 21, mixer.dim, requires_grad=True), torch.randn(2, 21, mixer.dim)
    assert mixer.fuses(x, x)
    fused = outcome(mixer, x, dy)
    monkeypatch.setattr(mixer, "fuses", lambda x, z: False)
    for name, wanted in outcome(mixer, x, dy).items():
        assert float((fused[name] - wanted).norm() / wanted.norm()) < TOLERANCE, name


@interpreted
def test_activations_equal_their_definition_with_all_gradients():
    from chela_plugin.kernels.qkv_activation import launch

    heads, keys, values, rows = 3, 8, 20, 37
    torch.manual_seed(0)
    from_z, from_x = torch.randn(rows, 2 * heads * keys + 5), torch.randn(rows, heads * values + 16)
    bias, skip, do = torch.randn(heads), torch.randn(heads), torch.randn(rows, heads, values)
    found = launch.activate(from_z, from_x, bias, heads, keys, values)
    leaves = [t.double().requires_grad_() for t in (from_z, from_x, bias)]
    wanted = qkv_activation(*leaves, heads, keys, values)
    grads = [torch.randn(t.shape) for t in found]
    dfrom_z, dfrom_x = torch.zeros_like(from_z), torch.full_like(from_x, torch.nan)
    dbias = launch.gradient(*grads[:3], do, grads[3], from_z, from_x, bias, skip, dfrom_z, dfrom_x)
    total = sum((t * g.double()).sum() for t, g in zip(wanted, grads, strict=True))
    total = total + (wanted[2] * skip.double()[:, None] * do.double()).sum()
    for a, b in zip([*found, dfrom_z, dfrom_x, dbias], [*wanted, *torch.autograd.grad(total, leaves)], strict=True):
        assert float((a.double() - b).norm() / b.norm()) < TOLERANCE


@interpreted
@pytest.mark.parametrize("change", ["hook", "subclass", "dtype", "phi"])
def test_what_the_node_does_not_know_runs_composed(change):
    mixer = chela(phi="relu" if change == "phi" else "silu")
    x = torch.randn(1, 9, mixer.dim)
    if change == "hook":
        mixer.q.register_forward_hook(lambda *_: None)
    elif change == "subclass":
        mixer.v = type("Adapted", (nn.Linear,), {})(mixer.dim, mixer.v.out_features, bias=False)
    elif change == "dtype":
        mixer.double()
        x = x.double()
    assert not mixer.fuses(x, x)
    assert mixer(x).isfinite().all()
