"""Modal filters on a CUDA device at real sizes: against the definition in fp64, and against the exact path."""

import itertools

import pytest
import torch

from chela_plugin.kernels.long_conv import long_conv, modal_conv
from chela_plugin.kernels.long_conv.reference import modal_conv_reference, modal_taps

pytestmark = pytest.mark.gpu

# Rounding of the output, of chunk matrices and of the states that meet them to 8 and 11 bits; fp32 sums.
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5}


def case(batch, tokens, channels, group, dtype, modes=8, short=7):
    """x, log_time, frequency, residue, short, scale, bias as `ModalKernel` starts them, and the output's gradient."""
    torch.manual_seed(0)
    x, dy = (torch.randn(batch, tokens, channels, device="cuda", dtype=dtype) for _ in range(2))
    time = torch.logspace(0.3, 3, modes, device="cuda").log().expand(channels // group, modes).clone()
    frequency = torch.rand_like(time) * 6.28 * torch.exp(-time)
    rest = [
        torch.randn(*shape, device="cuda") for shape in ((*time.shape, 2), (channels, short), (channels,), (channels,))
    ]
    return [t.requires_grad_() for t in (x, time, frequency, *rest)], dy


def run(leaves, dy, **options):
    y = modal_conv(*leaves[:4], short=leaves[4], scale=leaves[5], bias=leaves[6], silu=True, **options)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def in_double(leaves, dy, cuts):
    wide = [t.detach().double().requires_grad_() for t in leaves]
    parts = [modal_conv_reference(wide[0][:, a:b], *wide[1:], True) for a, b in itertools.pairwise(cuts) if b > a]
    y = torch.cat(parts, 1)
    return y.detach(), *torch.autograd.grad(y, wide, dy.double())


def error(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("batch", "tokens", "channels", "group"), [(32, 1024, 64, 16), (3, 1001, 48, 24), (1, 9000, 32, 16), (70, 5, 12, 3)]
)
def test_kernels_equal_fp64_with_all_gradients(batch, tokens, channels, group, dtype):
    leaves, dy = case(batch, tokens, channels, group, dtype)
    for found, wanted in zip(run(leaves, dy), in_double(leaves, dy, [0, tokens]), strict=True):
        assert error(found, wanted) < TOLERANCE[dtype]


def test_two_sided_kernels_equal_fp64_with_all_gradients():
    leaves, dy = case(2, 3001, 48, 12, torch.bfloat16)  # 4 rows of modes: two groups of 24 channels
    wide = [t.detach().double().requires_grad_() for t in leaves]
    found = run(leaves, dy, causal=False)
    for got, wanted in zip(found, run(wide, dy.double(), causal=False), strict=True):  # fp64 runs by the definition
        assert error(got, wanted) < TOLERANCE[torch.bfloat16]


def test_packed_sequences_are_convolved_alone():
    cuts = [0, 1, 1, 1000, 1064, 4096, 5000]
    leaves, dy = case(1, 5000, 64, 16, torch.bfloat16)
    found = run(leaves, dy, cu_seqlens=torch.tensor(cuts, device="cuda"))
    for got, wanted in zip(found, in_double(leaves, dy, cuts), strict=True):
        assert error(got, wanted) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("tokens", [1000, 16384])
def test_structured_equals_exact(tokens):
    leaves, _ = case(2, tokens, 64, 16, torch.float32)
    with torch.no_grad():
        taps = modal_taps(*leaves[1:4], tokens).repeat_interleave(16, 0)
        exact = long_conv(leaves[0], taps)
        assert error(modal_conv(*leaves[:4]), exact.double()) < 1e-5  # fp32 sums, and powers by an approximate exp


def test_twenty_runs_agree_bit_for_bit():
    leaves, dy = case(2, 5000, 64, 16, torch.bfloat16)
    first = run(leaves, dy)
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(run(leaves, dy), first, strict=True))


def test_the_future_does_not_change_the_past_bit_for_bit():
    leaves, _ = case(1, 5000, 64, 16, torch.bfloat16)
    x = leaves[0].detach()
    later = x.clone()
    later[:, 1717:] = 1e4 * torch.randn_like(later[:, 1717:])
    with torch.no_grad():
        before, after = (modal_conv(t, *leaves[1:4], short=leaves[4])[:, :1717] for t in (x, later))
    assert torch.equal(before, after)


def test_a_cuda_graph_captures_it():
    leaves, _ = case(1, 9000, 64, 16, torch.bfloat16)
    x, *rest = (t.detach() for t in leaves[:4])
    wanted = modal_conv(x, *rest)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = modal_conv(x, *rest)
    y.zero_()
    graph.replay()
    assert torch.equal(y, wanted)
