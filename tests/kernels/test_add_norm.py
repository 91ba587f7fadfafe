"""The residual sum and its layer norm against torch's, with all gradients.

The Triton kernels run on a GPU, or under the interpreter: without a GPU this file runs itself once more in a process of
its own with TRITON_INTERPRET=1, and here both sides are the plain form.
"""

import os

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from chela_plugin.kernels.add_norm import add_norm, add_rms_norm
from chela_plugin.layers.residual import stands_for, sum_and_norm

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32 = {"rtol": 1e-5, "atol": 1e-5}  # sums of up to some hundred numbers of order 1


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="this process runs the kernels itself")
def test_the_kernels_pass_under_the_interpreter(this_file_under_the_interpreter):
    this_file_under_the_interpreter()


def draw(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE).requires_grad_()


@pytest.mark.parametrize("dim", [1, 5, 70])
@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("wanted", ["both", "norm", "sum"])
@pytest.mark.parametrize("rms", [False, True])
def test_it_is_torchs_sum_and_norm_with_all_gradients(rms, dim, branch, wanted):
    x, weight = draw(3, 7, dim), draw(dim)
    given = [x, weight, *([] if rms else [draw(dim)]), *([draw(3, 7, dim)] if branch else [])]
    twins = [t.detach().double().requires_grad_() for t in given]
    other = given[-1] if branch else None
    s, y = add_rms_norm(x, other, weight) if rms else add_norm(x, other, weight, given[2])
    total = twins[0] + twins[-1] if branch else twins[0]
    norm = F.rms_norm if rms else F.layer_norm
    expected = norm(total, (dim,), *twins[1 : 2 if rms else 3], eps=1e-5)
    torch.testing.assert_close(s.double(), total, **FP32)
    torch.testing.assert_close(y.double(), expected, **FP32)
    outs = {"both": (0, 1), "norm": (1,), "sum": (0,)}[wanted]
    dys = [torch.randn(3, 7, dim, generator=torch.Generator().manual_seed(i)).to(DEVICE) for i in outs]
    found = torch.autograd.grad([(s, y)[i] for i in outs], given, dys, allow_unused=True)
    wide = torch.autograd.grad(
        [(total, expected)[i] for i in outs], twins, [d.double() for d in dys], allow_unused=True
    )
    # One channel has no variance: what rounding leaves of its gradient, some 1e-7, is multiplied by eps^-0.5 = 316.
    close = FP32 if dim > 1 else FP32 | {"atol": 2e-4}
    for gradient, twin in zip(found, wide, strict=True):
        assert (gradient is None) == (twin is None)
        if gradient is not None:
            torch.testing.assert_close(gradient.double(), twin, **close)


def test_a_bf16_branch_on_an_fp32_stream_keeps_the_stream_in_fp32():
    x, weight, bias = draw(4, 16), draw(16), draw(16)
    branch = draw(4, 16).detach().bfloat16().requires_grad_()
    s, y = add_norm(x, branch, weight, bias, dtype=torch.bfloat16)
    assert (s.dtype, y.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(s, x + branch, rtol=0, atol=0)
    dx, dbranch = torch.autograd.grad(y.float().square().sum() + s.sum(), (x, branch))
    assert (dx.dtype, dbranch.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(dbranch.float(), dx, rtol=2**-7, atol=0)  # the interpreter cuts bf16 off


def test_shapes_that_do_not_fit_are_one_clear_error():
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"\[D\] = \[4\]"):
        add_norm(x, None, torch.zeros(5), torch.zeros(5))
    with pytest.raises(ValueError, match=r"\[D\] = \[4\]"):
        add_rms_norm(x, None, torch.zeros(5))
    with pytest.raises(ValueError, match="of x's shape"):
        add_norm(x, torch.zeros(1, 4), torch.zeros(4), torch.zeros(4))


def test_a_norm_that_is_no_plain_layer_norm_is_called(monkeypatch):
    monkeypatch.setenv("CHELA_BACKEND", "reference")
    norm, x = nn.RMSNorm(8), torch.randn(2, 3, 8)
    s, y = sum_and_norm(x, x, norm)
    torch.testing.assert_close(y, norm(x + x))
    torch.testing.assert_close(s, x + x)


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.RMSNorm(8), nn.RMSNorm(8, eps=1e-3)], ids=str)
def test_what_stands_for_a_norm_computes_it(norm):
    norm, x, branch = norm.to(DEVICE), draw(2, 3, 8), draw(2, 1, 8).expand(2, 3, 8)
    s, y = sum_and_norm(x, branch, norm)
    torch.testing.assert_close(y, norm(x + branch), **FP32)
    torch.testing.assert_close(s, x + branch)


def test_a_hooked_norm_is_called_as_a_module():
    norm = nn.LayerNorm(8)
    norm.register_forward_hook(lambda *_: None)
    assert not stands_for(norm, torch.randn(2, 8))
