"""A block's MLP as one node: results and gradients are the module's, and it stands aside where it can't be.

The kernel runs on a GPU, or under the interpreter: without a GPU this file runs itself once more in a process of its
own with TRITON_INTERPRET=1.
"""

import os

import pytest
import torch
from timm.layers import Mlp
from torch import nn

from chela_plugin.kernels.gelu import reference
from chela_plugin.layers.gelu_mlp import mlp_of, stands_for

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON = torch.cuda.is_available() or INTERPRETED
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not TRITON, reason="Triton runs on a GPU, or interpreted")


@pytest.mark.skipif(TRITON, reason="this process runs the kernel itself")
def test_the_kernel_passes_under_the_interpreter(this_file_under_the_interpreter):
    this_file_under_the_interpreter()


def mlp(**options):
    torch.manual_seed(0)
    return Mlp(12, 20, **options).to(DEVICE)


def inputs(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(DEVICE).requires_grad_()


@needs_triton
@pytest.mark.parametrize("rows", [1, 21])
def test_the_kernel_is_the_definition(rows, monkeypatch):
    from chela_plugin.kernels.gelu import launch

    monkeypatch.setattr(launch, "COLUMNS", 16)  # two blocks of columns, the second one part empty
    monkeypatch.setattr(launch, "PROGRAMS", 4)  # and programs of several blocks of rows
    h, da = inputs(rows, 20).detach() * 3, inputs(rows, 20).detach().flip(1).contiguous()
    expected = reference.gradient(h.double(), da.double())
    for found, wanted in zip(launch.gradient(h, da), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@needs_triton
def test_the_node_is_the_module_with_all_gradients():
    module, x, dy = mlp(), inputs(2, 7, 12), inputs(2, 7, 12).detach()
    assert stands_for(module, x)
    leaves = [x, *module.parameters()]
    y, expected = mlp_of(module, x), module(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(expected, leaves, dy)
    for found, gradient in zip(torch.autograd.grad(y, leaves, dy), wanted, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-5)


@needs_triton
def test_the_hidden_layer_is_kept_once():
    """Of the hidden layer's width there is GELU's input alone; the module keeps its output too."""
    module, x = mlp(), inputs(2, 7, 12)
    for run, wanted in ((lambda: mlp_of(module, x), 1), (lambda: module(x), 2)):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            run()
        assert len({t.data_ptr() for t in kept if t.numel() == 2 * 7 * 20}) == wanted


@needs_triton
@pytest.mark.parametrize("what", ["dropout", "activation", "norm", "bias", "hook", "frozen dtype", "no gradient"])
def test_other_modules_are_called(what):
    module, x, called = mlp(), inputs(2, 3, 12), []
    if what == "dropout":
        module = mlp(drop=0.1)
    elif what == "activation":
        module.act = nn.GELU(approximate="tanh")
    elif what == "norm":
        module.norm = nn.LayerNorm(20, device=DEVICE)
    elif what == "bias":
        module = mlp(bias=False)
    elif what == "hook":
        module.act.register_forward_hook(lambda *_: None)
    elif what == "frozen dtype":
        module.fc2.double()
        assert not stands_for(module, x)
        return
    module.register_forward_hook(lambda *_: called.append(True)) if what == "no gradient" else None
    with torch.set_grad_enabled(what != "no gradient"):
        mlp_of(module, x)
    assert called if what == "no gradient" else not stands_for(module, x)
