"""One decoding step of a short-long convolution: the Triton kernels under the interpreter against the definitions.

Triton decides at its first import whether kernels are interpreted, so this file runs itself once more in a process of
its own with TRITON_INTERPRET=1.
"""

import os

import pytest
import torch

from chela_plugin.kernels.conv_step import conv_step, reference
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


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("dim", "groups", "taps", "length"), [(48, 3, 7, 200), (70, 10, 4, 40), (8, 1, 1, 64), (6, 6, 70, 90)]
)
def test_a_step_over_taps_equals_its_definition_at_every_place_of_a_block(dim, groups, taps, length, dtype):
    torch.manual_seed(0)
    short, long, scale, bias = (torch.randn(*s) for s in ((dim, taps), (groups, length), (dim,), (dim,)))
    x, inputs = torch.randn(2, dim, dtype=dtype), torch.randn(2, 150, dim, dtype=dtype)
    ahead = torch.randn(2, 150, dim)
    for place in (0, 5, 63, 64, 149):
        position = torch.full((2,), place)
        found, wanted = inputs.clone(), inputs.clone()
        y = conv_step(x, found, ahead, position, short, long, scale, bias, block=64)
        expected = reference.step(x, wanted, ahead, position, short, long, scale, bias, 64)
        # Sums of up to 140 terms of size 1 in fp32, or their rounding to 8 bits.
        torch.testing.assert_close(
            y, expected, **({"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 8e-3})
        )
        assert torch.equal(found, wanted)
