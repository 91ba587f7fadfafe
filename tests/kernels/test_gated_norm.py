"""Norm and gate: the Triton kernels under the interpreter against the definition in fp64, with every gradient.

Triton decides at its first import whether kernels are interpreted, so this file runs itself once more in a process of
its own with TRITON_INTERPRET=1.
"""

import os

import pytest
import torch
from torch.nn import functional as F

from chela_plugin.kernels.gated_norm import gated_norm

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Rounding of fp32 sums; and of inputs' products and the result to 11 or 8 significant bits; relative to the whole.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


@pytest.mark.skipif(INTERPRETED, reason="this is the process it starts")
def test_the_kernels_pass_under_the_interpreter(this_file_under_the_interpreter):
    this_file_under_the_interpreter()


def case(batch, time, heads, width, dtype, skip=True, gate=True):
    g = torch.Generator().manual_seed(0)
    tensors = {
        "o": torch.randn(batch, time, heads, width, generator=g).to(dtype),
        "weight": torch.randn(heads, width, generator=g),
    }
    if gate:
        tensors["gate"] = torch.randn(batch, time, heads * width, generator=g).to(dtype)
    if skip:
        tensors["v"] = torch.randn(batch, time, heads, width, generator=g).to(dtype)
        tensors["skip"] = torch.randn(heads, generator=g)
    return tensors, torch.randn(batch, time, heads * width, generator=g).to(dtype)


def outcome(tensors, dy, function=gated_norm):
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    y = function(**leaves)
    return {"y": y.detach()} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))


def assert_same(found, wanted, dtype):
    for name, x in found.items():
        error = float((x.double() - wanted[name]).norm() / wanted[name].norm())
        assert error < TOLERANCE[dtype], f"{name}: {error:.1e}"


@pytest.mark.parametrize(
    ("batch", "time", "heads", "width", "dtype"),
    [
        (2, 37, 3, 24, torch.float32),
        (1, 1, 1, 3, torch.float32),
        (1, 300, 2, 16, torch.float32),  # a program of the backward pass walks several blocks
        (2, 19, 2, 40, torch.float16),
        (2, 19, 2, 32, torch.bfloat16),
        (2, 9, 2, 5, torch.float64),
    ],
)
@pytest.mark.parametrize(("skip", "gate"), [(True, True), (False, True), (True, False)])
def test_output_and_all_gradients_equal_the_definition_in_fp64(
    batch, time, heads, width, dtype, skip, gate, monkeypatch
):
    if INTERPRETED and dtype != torch.float64:
        from chela_plugin.kernels.gated_norm import ops

        monkeypatch.setattr(ops, "PROGRAMS", 2)
    tensors, dy = case(batch, time, heads, width, dtype, skip, gate)
    if dtype == torch.float64:
        tensors = {name: x.double() for name, x in tensors.items()}
    wanted = outcome({name: x.double() for name, x in tensors.items()}, dy.double())
    assert_same(outcome(tensors, dy), wanted, dtype)


def test_it_is_torchs_own_rms_norm_with_a_gate():
    tensors, dy = case(2, 7, 3, 8, torch.float64)

    def spelled_out(o, weight, gate, v, skip):
        return (F.rms_norm(o + skip[:, None] * v, [8], eps=1e-5) * weight).flatten(-2) * F.silu(gate)

    tensors = {name: x.double() for name, x in tensors.items()}
    assert_same(outcome(tensors, dy), outcome(tensors, dy, spelled_out), torch.float64)


@pytest.mark.parametrize("shape", [(2, 3, 4, 8), (1, 3, 4, 8), (2, 1, 4, 8), (2, 3, 1, 8), (2, 3, 4, 1)])
def test_rows_are_found_wherever_they_lie(shape):
    ops = pytest.importorskip("chela_plugin.kernels.gated_norm.ops", exc_type=ImportError)
    batch, time, heads, width = shape
    wide = torch.randn(batch, time, heads * width + 5)
    dense = torch.randn(shape)
    turned = [torch.randn(shape[::-1]).permute(3, 2, 1, 0), dense.transpose(0, 1).contiguous().transpose(0, 1)]
    spread = [torch.randn(batch, time, heads, width + 3)[..., :width], dense.expand(shape).flip(3)]
    inside = wide[..., 2 : 2 + heads * width]
    for x in (dense, *turned, *spread, inside, inside.unflatten(2, (heads, width)), inside[:1].expand_as(inside)):
        start, stride = ops.rows_of(x, heads * width)
        rows = torch.as_strided(start, (batch * time, heads * width), (stride, 1), start.storage_offset())
        assert torch.equal(rows, x.reshape(-1, heads * width))


def test_rows_may_be_views_into_wider_rows():
    tensors, dy = case(2, 11, 2, 16, torch.float32)
    wide = torch.randn(2, 11, 3, 32)
    wide[:, :, 1] = tensors["gate"]
    tensors["gate"] = wide[:, :, 1]
    assert_same(outcome(tensors, dy), outcome({k: x.double() for k, x in tensors.items()}, dy.double()), torch.float32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weight": torch.ones(3, 3)}, "weight"),
        ({"skip": None}, "both or neither"),
        ({"gate": torch.ones(1, 2, 3)}, "gate is"),
        ({"gate": torch.ones(1, 4, 4).half()}, "dtype"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, said):
    tensors, _ = case(1, 4, 2, 2, torch.float32)
    with pytest.raises(ValueError, match=said):
        gated_norm(**tensors | change)


@pytest.mark.skipif(not INTERPRETED, reason="operators launch kernels; the test above starts this one")
@pytest.mark.parametrize(("skip", "gate"), [(True, True), (False, False)])
def test_operators_pass_opcheck(skip, gate):
    from chela_plugin.kernels.gated_norm import ops

    tensors, dy = case(1, 5, 2, 16, torch.float32, skip=skip, gate=gate)
    given = [tensors.get(name) for name in ("o", "v", "skip", "weight", "gate")]
    leaves = [x if x is None else x.clone().requires_grad_() for x in given]
    torch.library.opcheck(ops.forward_op, (*leaves, 1e-5))
    torch.library.opcheck(ops.backward_op, (dy, *given, 1e-5))
