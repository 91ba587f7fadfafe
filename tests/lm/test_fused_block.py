"""A block's fused MLP against its composed one, with stand-ins for fla's kernels, which need a GPU."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("transformers")
from chela_plugin.lm import fused_block, model


def swiglu(gate, up, output_contiguous):
    return F.silu(gate) * up


def swiglu_both(gate, up, d, use_weight, output_contiguous):
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    with torch.enable_grad():
        hidden = F.silu(gate) * up
    return *torch.autograd.grad(hidden, [gate, up], d), hidden.detach()


KERNELS = fused_block.Kernels(swiglu, swiglu_both)


def test_the_fused_block_has_the_composed_one_s_outputs_and_gradients(monkeypatch, small_lm):
    lm = small_lm("chela + attention").double().train()
    for parameter in lm.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=1, std=0.1)
    tokens = torch.randint(61, (2, 9))

    def outcome():
        loss = lm(tokens, labels=tokens).loss
        return [loss.detach(), *torch.autograd.grad(loss, list(lm.parameters()))]

    composed = outcome()
    calls = []
    monkeypatch.setattr(model, "kernels_for", lambda *_: calls.append(1) or KERNELS)
    for found, wanted in zip(outcome(), composed, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)  # fp64 sums in two orders
    assert len(calls) == 2


@pytest.mark.parametrize("change", ["hook", "adapter", "dtype"])
def test_linears_with_hooks_adapters_or_another_dtype_are_called_as_modules(change):
    linear, other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    assert fused_block.plain((other, linear), torch.float32)
    if change == "hook":
        linear.register_forward_hook(lambda *_: None)
    elif change == "adapter":
        linear = type("Adapted", (nn.Linear,), {})(4, 4)
    else:
        other.bfloat16()
    assert not fused_block.plain((other, linear), torch.float32)
