"""One decoding step of a modal convolution: the Triton kernel under the interpreter against the layer's own form.

Triton decides at its first import whether kernels are interpreted, so this file runs itself once more in a process of
its own with TRITON_INTERPRET=1.
"""

import os

import pytest
import torch

from chela_plugin.kernels.modal_step import runs_here
from chela_plugin.layers import ShortLongConv

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(INTERPRETED, reason="this is the process it starts")
def test_the_kernel_passes_under_the_interpreter(this_file_under_the_interpreter):
    this_file_under_the_interpreter()


@pytest.mark.parametrize(("dim", "group", "short"), [(48, 16, (3, 7)), (70, 7, (4,)), (8, 8, ())])
@pytest.mark.parametrize("folded", [False, True])
def test_steps_equal_the_full_convolution_from_the_first_token_on(dim, group, short, folded):
    torch.manual_seed(0)
    conv = ShortLongConv(dim, causal=True, short=short, long="modal", group_size=group).eval()
    with torch.no_grad():
        for p in conv.parameters():
            p.add_(0.1 * torch.randn_like(p))
        if folded:
            conv.reparameterize()
        x = torch.randn(2, 12, dim)
        cache = conv.init_cache(2, dtype=torch.float32)
        assert runs_here(x[:, :1]) == INTERPRETED
        ys = [conv(x[:, t : t + 1], cache=cache) for t in range(12)]
        # Two orders of summation in fp32.
        torch.testing.assert_close(torch.cat(ys, 1), conv(x), rtol=1e-4, atol=1e-5)


def test_a_step_that_needs_a_gradient_takes_the_layers_own_form():
    assert not runs_here(torch.ones(1, 1))
    conv = ShortLongConv(8, causal=True, long="modal")
    conv(torch.randn(1, 1, 8), cache=conv.init_cache(1)).sum().backward()
    assert conv.scales.grad is not None
