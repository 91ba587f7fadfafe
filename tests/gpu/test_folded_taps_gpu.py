"""Folded taps on a CUDA device at real sizes: against the definition in fp64, and the same twenty times."""

import pytest
import torch

from chela_plugin.kernels.folded_taps import folded_taps

pytestmark = pytest.mark.gpu

SIZES = [(1024, 16, 4096), (48, 3, 1001), (32, 32, 65536), (8, 1, 7)]


def case(causal, channels, shared, widths=(3, 7), scales=8, sub_taps=16):
    torch.manual_seed(0)
    filters = channels // shared * (1 if causal else 2)
    shapes = [(filters, scales, sub_taps), (filters,), (len(widths) + 1, channels), *((channels, k) for k in widths)]
    return [torch.randn(*shape, device="cuda").requires_grad_() for shape in shapes]


def run(leaves, length, causal, dy):
    taps = folded_taps(*leaves[:2], length=length, scales=leaves[2], kernels=leaves[3:], causal=causal)
    return taps.detach(), *torch.autograd.grad(taps, leaves, dy.to(taps.dtype))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("channels", "shared", "length"), SIZES)
def test_kernels_equal_fp64_with_all_gradients(channels, shared, length, causal):
    leaves = case(causal, channels, shared)
    dy = torch.randn(channels, length if causal else 2 * length - 1, device="cuda", dtype=torch.float64)
    wanted = run([t.detach().double().requires_grad_() for t in leaves], length, causal, dy)
    for found, value in zip(run(leaves, length, causal, dy), wanted, strict=True):
        # fp32 sums of up to a million terms; sub-kernels that no lag reaches have no gradient
        assert float((found.double() - value).norm()) <= 1e-5 * float(value.norm())


def test_twenty_runs_agree_bit_for_bit():
    leaves, dy = case(True, 256, 16), torch.randn(256, 8192, device="cuda")
    first = run(leaves, 8192, True, dy)
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(run(leaves, 8192, True, dy), first, strict=True))
