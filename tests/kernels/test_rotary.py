"""Rotary positions of q and k in one pass against the definition in fp64, with the gradient of qkv.

The Triton kernel runs on a GPU, or under the interpreter: without a GPU this file runs itself once more in a process of
its own with TRITON_INTERPRET=1, and here both sides are the plain form.
"""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chela_plugin.kernels.rotary import reference, rotary_qkv

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Angles in fp32: 2^-24 of a position's radians, then a rotation's products.
CLOSE = {"rtol": 1e-5, "atol": 1e-4}


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="this process runs the kernel itself")
def test_the_kernel_passes_under_the_interpreter(this_file_under_the_interpreter):
    this_file_under_the_interpreter()


def check(batch, time, heads, half, rows, first):
    generator = torch.Generator().manual_seed(time)
    qkv = torch.randn(batch, time, 3, heads, 2 * half, generator=generator).to(DEVICE).requires_grad_()
    position = first + torch.arange(time, device=DEVICE)
    if rows:
        position = position + 3 * torch.arange(batch, device=DEVICE)[:, None]
    wide = qkv.detach().double().requires_grad_()
    found, wanted = rotary_qkv(qkv, position), reference.rotary_qkv(wide, position)
    for got, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.double(), expected, **CLOSE)
    dys = [torch.randn(got.shape, generator=generator).to(DEVICE) for got in found]
    (dqkv,) = torch.autograd.grad(found, qkv, dys)
    (expected,) = torch.autograd.grad(wanted, wide, [d.double() for d in dys])
    torch.testing.assert_close(dqkv.double(), expected, **CLOSE)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 7, 3, 5), (1, 33, 2, 32)])
def test_it_is_the_definition_with_its_gradient(shape, rows):
    check(*shape, rows, 0)


@settings(max_examples=20)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 3), st.integers(1, 9), st.booleans(), st.integers(0, 500))
def test_it_is_the_definition_at_any_shape(batch, time, heads, half, rows, first):
    check(batch, time, heads, half, rows, first)


def test_gradients_of_any_strides_are_taken_as_they_come():
    qkv = torch.randn(2, 5, 3, 2, 8, device=DEVICE, requires_grad=True)
    q, k, v = rotary_qkv(qkv, torch.arange(5, device=DEVICE))
    o = (q.transpose(1, 2) * k.transpose(1, 2)).sum() + v.sum()  # v's gradient is an expanded one
    (found,) = torch.autograd.grad(o, qkv)
    wide = qkv.detach().double().requires_grad_()
    q, k, v = reference.rotary_qkv(wide, torch.arange(5, device=DEVICE))
    (wanted,) = torch.autograd.grad((q * k).sum() + v.sum(), wide)
    torch.testing.assert_close(found.double(), wanted, **CLOSE)


def test_v_is_a_view_and_bf16_stays_bf16():
    qkv = torch.randn(1, 4, 3, 1, 4, device=DEVICE).bfloat16()
    q, k, v = rotary_qkv(qkv, torch.arange(4, device=DEVICE))
    assert (q.dtype, k.dtype) == (torch.bfloat16, torch.bfloat16)
    assert v.data_ptr() == qkv[:, :, 2].data_ptr()


def test_shapes_that_do_not_fit_are_one_clear_error():
    with pytest.raises(ValueError, match="an even d"):
        rotary_qkv(torch.zeros(1, 2, 3, 1, 3), torch.arange(2))
    with pytest.raises(ValueError, match="position must be"):
        rotary_qkv(torch.zeros(1, 2, 3, 1, 4), torch.arange(3))
