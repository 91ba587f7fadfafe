"""Taps folded in one launch: the Triton source under the interpreter against the definition in fp64.

Triton decides at its first import whether kernels are interpreted, so this file runs itself once more in a process of
its own with TRITON_INTERPRET=1.
"""

import os

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from chela_plugin.kernels.folded_taps import folded_taps, ops
from chela_plugin.kernels.folded_taps.reference import multiscale_taps

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process with TRITON_INTERPRET=1")
by_definition = pytest.mark.skipif(INTERPRETED, reason="plain PyTorch: runs in the process without TRITON_INTERPRET")


@pytest.mark.skipif(INTERPRETED, reason="this is the process it starts")
def test_the_kernels_pass_under_the_interpreter(this_file_under_the_interpreter):
    this_file_under_the_interpreter()


def case(long, causal, shared, groups, length, widths, rows, scales=3, sub_taps=4):
    """Leaves (source, ratio_logit, scales, kernels); `long`: 'multiscale', 'taps' or None."""
    g = torch.Generator().manual_seed(0)
    channels, filters = shared * groups, groups * (1 if causal else 2)
    source = ratio_logit = None
    if long == "multiscale":
        source = torch.randn(filters, scales, sub_taps, generator=g)
        ratio_logit = torch.randn(filters, generator=g)
    elif long == "taps":
        source = torch.randn(filters, length, generator=g)
    factors = torch.randn(rows, channels, generator=g) if rows else None
    kernels = [torch.randn(channels, k, generator=g) for k in widths]
    return source, ratio_logit, factors, kernels


def with_gradients(leaves, length, causal, dtype):
    """Taps and the gradients of all leaves, in `dtype`."""
    source, ratio_logit, factors, kernels = leaves
    source, ratio_logit, factors = (None if t is None else t.to(dtype) for t in (source, ratio_logit, factors))
    kernels = [kernel.to(dtype) for kernel in kernels]
    given = [t.requires_grad_() for t in (source, ratio_logit, factors, *kernels) if t is not None]
    taps = folded_taps(source, ratio_logit, length=length, scales=factors, kernels=kernels, causal=causal)
    weights = torch.cos(torch.arange(taps.numel(), dtype=torch.float64)).view(taps.shape).to(taps.dtype)
    gradients = torch.autograd.grad(taps, given, weights, allow_unused=True)
    return taps.detach(), [torch.zeros_like(t) if d is None else d for t, d in zip(given, gradients, strict=True)]


CASES = [
    # long, causal, channels a group, groups, length, short kernels, rows of scales
    ("multiscale", True, 3, 2, 77, (3, 7), 3),
    ("multiscale", True, 1, 1, 1, (), 1),
    ("multiscale", True, 2, 2, 1300, (2,), 2),  # more than one block of columns, more scales than sub-kernels
    ("multiscale", True, 3, 2, 40, (7,), 1),  # kernels that are scaled already
    ("multiscale", True, 1, 3, 20, (), 0),  # the filters themselves
    ("multiscale", False, 3, 2, 77, (3, 7), 3),
    ("multiscale", False, 2, 2, 2, (3,), 2),
    ("taps", True, 3, 2, 33, (3, 7), 3),
    ("taps", False, 3, 2, 33, (1, 5), 3),
    ("taps", True, 2, 3, 9, (3,), 0),
    (None, True, 5, 4, 7, (3, 7), 3),  # short kernels alone, under a scale too many
    (None, False, 5, 4, 4, (3, 7), 2),
]


@interpreted
@pytest.mark.parametrize("options", CASES)
def test_kernels_equal_the_definition_in_fp64_with_all_gradients(options):
    long, causal, shared, groups, length, widths, rows = options
    leaves = case(long, causal, shared, groups, length, widths, rows)
    found, gradients = with_gradients(leaves, length, causal, torch.float32)
    wanted, wanted_gradients = with_gradients(leaves, length, causal, torch.float64)  # fp64 takes the definition
    assert found.dtype == torch.float32
    for a, b in zip([found, *gradients], [wanted, *wanted_gradients], strict=True):
        # fp32 sums, and a power through an approximate exp2
        assert float((a - b).norm()) <= 2e-6 * float(b.norm()) + 1e-7


@interpreted
def test_low_precision_parameters_make_fp32_taps_and_get_their_own_dtype_back():
    source, ratio_logit, factors, kernels = case("multiscale", True, 2, 2, 30, (3,), 2)
    leaves = [t.bfloat16().requires_grad_() for t in (source, ratio_logit, factors, *kernels)]
    taps = folded_taps(leaves[0], leaves[1], length=30, scales=leaves[2], kernels=leaves[3:])
    wide = [t.detach().double() for t in leaves]
    wanted = folded_taps(wide[0], wide[1], length=30, scales=wide[2], kernels=wide[3:])
    torch.testing.assert_close(taps.detach().double(), wanted, rtol=2e-6, atol=1e-6)
    taps.sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.bfloat16 for t in leaves)


@interpreted
@pytest.mark.parametrize("index", [0, 5, 10])
def test_the_operator_passes_opcheck(index):
    long, causal, shared, groups, length, widths, rows = CASES[index]
    source, ratio_logit, factors, kernels = case(long, causal, shared, groups, length, widths, rows)
    leaves = [t if t is None else t.requires_grad_() for t in (source, ratio_logit, factors)]
    arguments = (*leaves, [k.requires_grad_() for k in kernels], length, causal)
    torch.library.opcheck(ops.forward_op, arguments)
    given = [t if t is None else t.detach() for t in (source, ratio_logit, factors)]
    dtaps = torch.randn_like(ops.forward_op(*arguments))
    torch.library.opcheck(ops.backward_op, (dtaps, *given, [k.detach() for k in kernels], length, causal))


@interpreted
def test_a_compiled_call_is_no_graph_a_length():
    """The length is a symbol to the operator, not a number that a graph is made for."""
    counter = CompileCounter()
    source, ratio, kernel = torch.randn(2, 4, 8), torch.randn(2), torch.randn(4, 3)
    compiled = torch.compile(
        lambda x: folded_taps(source, ratio, length=x.shape[0], kernels=[kernel]), fullgraph=True, backend=counter
    )
    for length in range(30, 36):
        assert compiled(torch.empty(length)).shape == (4, length)
    assert counter.frame_count <= 2  # the first length's own, and one for all others


@by_definition
def test_scales_cover_the_lags_that_the_definition_says():
    u = torch.zeros(1, 3, 2, dtype=torch.float64)
    u[0, :, 0], u[0, :, 1] = torch.tensor([1.0, 10.0, 100.0]), torch.tensor([2.0, 20.0, 200.0])
    taps = multiscale_taps(u, torch.tensor([60.0], dtype=torch.float64), 14)  # ratio 1: each scale halves
    # The second and third: 2 and 4 times as long, a node in the middle of each half, edges held.
    expected = [1, 2, *(x / 2 for x in (10, 12.5, 17.5, 20)), *(x / 4 for x in (100, 100, 112.5, 137.5))]
    expected += [x / 4 for x in (162.5, 187.5, 200, 200)]
    torch.testing.assert_close(taps[0], torch.tensor(expected, dtype=torch.float64))


@by_definition
def test_the_definition_passes_gradcheck():
    source, ratio_logit, factors, kernels = case("multiscale", False, 2, 1, 9, (3,), 2)
    leaves = [t.double().requires_grad_() for t in (source, ratio_logit, factors, *kernels)]

    def taps(source, ratio_logit, factors, kernel):
        return folded_taps(source, ratio_logit, length=9, scales=factors, kernels=[kernel], causal=False)

    assert torch.autograd.gradcheck(taps, leaves)


@by_definition
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": None}, "long filter or short kernels"),
        ({"source": torch.zeros(2, 5)}, "5 taps, length asks for 9"),
        ({"source": torch.zeros(3, 9), "causal": False}, "even where taps are two-sided"),
        ({"source": torch.zeros(2, 3, 4), "ratio_logit": torch.zeros(3)}, "ratio_logit must be"),
        ({"source": torch.zeros(2, 9), "kernels": [torch.zeros(3, 3)]}, "a multiple of the long filters'"),
        ({"source": torch.zeros(2, 9), "kernels": [torch.zeros(4, 3)], "scales": torch.zeros(5, 4)}, "row for each"),
        ({"source": None, "kernels": [torch.zeros(4, 11)]}, "at least the short kernels' 11"),
    ],
)
def test_bad_input_gives_one_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        folded_taps(**arguments, length=9)
