"""The convolution on a grid: both forms against a direct sum, gradients, batch norms over branches, errors.

The Triton kernels run on a GPU, or under the interpreter: without a GPU this file runs itself once more in a process of
its own with TRITON_INTERPRET=1.
"""

import os

import pytest
import torch
from torch.nn import functional as F

from chela_plugin.kernels.grid_conv import grid_conv, grid_conv_norm, reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON = torch.cuda.is_available() or INTERPRETED
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Some hundred products of order 1 are summed in fp32, in another order; gradients of taps sum over all places.
FP32 = {"rtol": 1e-4, "atol": 1e-4}
EXACT = {"rtol": 1e-10, "atol": 1e-10}
GRIDS = [(1, 1), (2, 3), (2, 5)]  # one place; smaller than the kernel; several tiles


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="this process runs the kernels itself")
def test_the_kernels_pass_under_the_interpreter(this_file_under_the_interpreter):
    this_file_under_the_interpreter()


@pytest.fixture(autouse=True)
def narrow_tiles(monkeypatch):
    """Small ones: the interpreter takes a step for every vector, and a small grid has several tiles so."""
    if TRITON and DEVICE == "cpu":
        from chela_plugin.kernels.grid_conv import launch

        monkeypatch.setattr(launch, "COLUMNS", (2,))
        monkeypatch.setattr(launch, "GRADIENT_COLUMNS", (2,))


def arguments(h, w, dim=6, k=3, groups=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(h * 100 + w)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype).requires_grad_()

    x = draw(2, h, w, dim)
    return [x, draw(dim, k, k), draw(4, groups, max(h, w) + 1), draw(dim), draw(dim)]


def wide(tensors):
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def direct(x, short, cross, scale, bias):
    """The definition, place by place."""
    batch, h, w, dim = x.shape
    y = bias.expand(batch, h, w, dim).clone()
    taps = (cross.repeat_interleave(dim // cross.shape[1], 1) * scale[:, None]).detach()
    half = short.shape[1] // 2
    for i in range(h):
        for j in range(w):
            for a in range(h):
                for b in range(w):
                    p, q = i - a, j - b
                    weight = torch.zeros(dim, dtype=x.dtype, device=x.device)
                    if max(abs(p), abs(q)) <= half:
                        weight = weight + short[:, p + half, q + half]
                    if p == 0:
                        weight = weight + taps[0 if q >= 0 else 1, :, abs(q)]
                    if q == 0:
                        weight = weight + taps[2 if p >= 0 else 3, :, abs(p)]
                    y[:, i, j] += weight * x[:, a, b]
    return y


def test_the_plain_form_is_the_direct_sum():
    with torch.no_grad():
        tensors = [t.double() for t in arguments(3, 4)]
        torch.testing.assert_close(
            grid_conv(*tensors[:3], scale=tensors[3], bias=tensors[4]), direct(*tensors), **EXACT
        )


@pytest.mark.parametrize(
    ("grid", "parts"), [*((grid, "both, SiLU") for grid in GRIDS), ((2, 3), "short"), ((2, 3), "cross")]
)
def test_the_kernels_equal_the_plain_form_with_all_gradients(grid, parts):
    if not TRITON:
        pytest.skip("Triton runs on a GPU, or interpreted")
    x, short, cross, scale, bias = arguments(*grid)
    short, cross, scale = None if parts == "cross" else short, *((None, None) if parts == "short" else (cross, scale))
    given = [x, short, cross, scale, bias]
    y = grid_conv(x, short, cross, scale=scale, bias=bias, silu="SiLU" in parts)
    twins = wide(given)
    expected = reference.grid_conv(*twins, "SiLU" in parts)
    torch.testing.assert_close(y.double(), expected, **FP32)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found = torch.autograd.grad(y, [t for t in given if t is not None], dy)
    wanted = torch.autograd.grad(expected, [t for t in twins if t is not None], dy.double())
    for gradient, twin in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient.double(), twin, **FP32)


def normed(dtype=torch.float32, grid=(2, 3)):
    x, short, cross, _, _ = arguments(*grid, dtype=dtype)
    small = arguments(*grid, k=1, dtype=dtype)[1]
    weights = [torch.full((6,), 0.5 + i, dtype=dtype, device=DEVICE).requires_grad_() for i in range(3)]
    biases = [torch.full((6,), 0.1 * i, dtype=dtype, device=DEVICE).requires_grad_() for i in range(3)]
    return x, [small, short], cross, weights, biases


def test_branches_under_batch_norms_are_torchs_batch_norms_summed():
    """In the kernels' node and in the plain form alike: result, gradients, running statistics."""
    x, shorts, cross, weights, biases = normed()
    running = [(torch.zeros(6, device=DEVICE), torch.ones(6, device=DEVICE)) for _ in range(3)]
    y = grid_conv_norm(x, shorts, cross, weights, biases, running=running, momentum=0.1, eps=1e-5, silu=True)
    twins = wide([x, *shorts, cross, *weights, *biases])
    expected = [(torch.zeros(6, device=DEVICE).double(), torch.ones(6, device=DEVICE).double()) for _ in range(3)]
    total = 0
    for i in range(3):
        taps = (twins[1 + i], None) if i < 2 else (None, twins[3])
        branch = reference.grid_conv(twins[0], *taps, None, None, False).permute(0, 3, 1, 2)
        total = total + F.batch_norm(branch, *expected[i], twins[4 + i], twins[7 + i], True, 0.1, 1e-5)
    total = F.silu(total).permute(0, 2, 3, 1)
    torch.testing.assert_close(y.double(), total, **FP32)
    for ours, torchs in zip(running, expected, strict=True):
        for mine, its in zip(ours, torchs, strict=True):
            torch.testing.assert_close(mine.double(), its, **FP32)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found = torch.autograd.grad(y, [x, *shorts, cross, *weights, *biases], dy)
    for gradient, twin in zip(found, torch.autograd.grad(total, twins, dy.double()), strict=True):
        torch.testing.assert_close(gradient.double(), twin, **FP32)


def test_running_statistics_do_not_cancel_where_the_mean_is_large():
    """A mean of 300 deviations: E[y^2] - E[y]^2 in fp32 would lose the variance's third digit."""
    x = 300 + torch.randn(2, 4, 5, 4, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    one = torch.ones(4, 1, 1, device=DEVICE)
    mean, var = torch.zeros(4, device=DEVICE), torch.zeros(4, device=DEVICE)
    weight, bias = torch.ones(4, device=DEVICE), torch.zeros(4, device=DEVICE)
    grid_conv_norm(x, [one], None, [weight], [bias], running=[(mean, var)], momentum=1.0)
    expected = x.double().flatten(0, 2).var(0)
    torch.testing.assert_close(var.double(), expected, rtol=1e-4, atol=0)  # x - mean keeps five digits in fp32


@pytest.mark.skipif(not TRITON, reason="Triton runs on a GPU, or interpreted")
@pytest.mark.parametrize("groups", [1, 2, 6])  # six channels a group, three, and each its own
def test_gradients_of_shared_taps_and_their_scale(groups):
    x, _, cross, scale, _ = arguments(2, 3, groups=groups)
    y = grid_conv(x, None, cross, scale=scale)
    twins = wide([x, cross, scale])
    expected = reference.grid_conv(twins[0], None, twins[1], twins[2], None, False)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found = torch.autograd.grad(y, [x, cross, scale], dy)
    for gradient, twin in zip(found, torch.autograd.grad(expected, twins, dy.double()), strict=True):
        torch.testing.assert_close(gradient.double(), twin, **FP32)


@pytest.mark.skipif(not TRITON, reason="Triton runs on a GPU, or interpreted")
def test_slices_of_partial_sums_do_not_change_the_gradients(monkeypatch):
    """One slice, and as many as there are lines, of which a program reads two at once."""
    from chela_plugin.kernels.grid_conv import launch

    x, shorts, cross, weights, biases = normed()
    leaves = [x, *shorts, cross, *weights, *biases]
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found = []
    for programs, at_once in ((2, 32), (1000, 2)):
        monkeypatch.setattr(launch, "PROGRAMS", programs)
        monkeypatch.setattr(launch, "SLICES", at_once)
        found.append(torch.autograd.grad(grid_conv_norm(x, shorts, cross, weights, biases), leaves, dy))
    for few, many in zip(*found, strict=True):
        torch.testing.assert_close(few, many, **FP32)


@pytest.mark.skipif(not TRITON, reason="Triton runs on a GPU, or interpreted")
def test_opcheck():
    from chela_plugin.kernels.grid_conv import ops

    x, short, cross, scale, bias = arguments(1, 2, dim=2, groups=1)
    torch.library.opcheck(ops.forward_op, (x, short, cross, scale, bias, True, True))
    torch.library.opcheck(ops.forward_op, (x, short, None, None, None, False, True))
    tensors = [t.detach() for t in (torch.ones_like(x), x, torch.zeros_like(x), short, cross, scale, bias)]
    torch.library.opcheck(ops.backward_op, (*tensors, True, True, True), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 4, 6)}, r"\[B, h, w, D\]"),
        ({"short": (6, 4, 4)}, "k odd"),
        ({"short": (5, 3, 3)}, "D = 6"),
        ({"cross": (4, 4, 9)}, "divisor of D = 6"),
        ({"cross": (4, 3, 4)}, "a grid of 3 x 5 needs 5"),
        ({"bias": (5,)}, r"bias is \[D\]"),
        ({"short": None, "cross": None}, "needs taps"),
    ],
)
def test_shapes_that_do_not_fit_are_one_clear_error(change, message):
    shapes = {"x": (2, 3, 5, 6), "short": (6, 3, 3), "cross": (4, 3, 5), "bias": (6,)} | change
    given = {name: None if shape is None else torch.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        grid_conv(given["x"], given["short"], given["cross"], bias=given["bias"])


@pytest.mark.skipif(not TRITON, reason="Triton runs on a GPU, or interpreted")
@pytest.mark.parametrize(
    "grid", [(5, 3), pytest.param((64, 50), marks=pytest.mark.skipif(DEVICE == "cpu", reason="slow"))]
)
def test_products_of_matrices_on_large_grids_equal_the_plain_form(grid, monkeypatch):
    """In the result, all gradients, and the statistics of a branch; fp16's 11 bits, at most three roundings."""
    from chela_plugin.kernels.grid_conv import launch

    monkeypatch.setattr(launch, "PLANES_FROM", 1)
    x, short, cross, scale, bias = arguments(*grid)
    x = x.detach().half().requires_grad_()
    y = grid_conv(x, short, cross, scale=scale, bias=bias, silu=True)
    twins = wide([x, short, cross, scale, bias])
    expected = reference.grid_conv(*twins, True)
    fp16 = {"rtol": 2e-3, "atol": 2e-3 * expected.abs().max().item()}
    torch.testing.assert_close(y.double(), expected, **fp16)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE).half()
    found = torch.autograd.grad(y, [x, short, cross, scale, bias], dy)
    for gradient, wanted in zip(found, torch.autograd.grad(expected, twins, dy.double()), strict=True):
        fp16["atol"] = 2e-3 * wanted.abs().max().item()
        torch.testing.assert_close(gradient.double(), wanted, **fp16)
    mean, var = torch.zeros(6, device=DEVICE), torch.zeros(6, device=DEVICE)
    one = torch.ones(6, device=DEVICE)
    grid_conv_norm(x, [], cross, [one], [0 * one], running=[(mean, var)], momentum=1.0)
    branch = reference.grid_conv(twins[0], None, twins[2], None, None, False).detach().flatten(0, 2)
    torch.testing.assert_close(mean.double(), branch.mean(0), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(var.double(), branch.var(0), rtol=2e-3, atol=2e-3)
