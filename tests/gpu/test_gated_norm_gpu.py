"""Norm and gate, and a modal decoding step, on a CUDA device at real sizes."""

import pytest
import torch

from chela_plugin.kernels.gated_norm import gated_norm
from chela_plugin.layers import ShortLongConv

pytestmark = pytest.mark.gpu
# Rounding of inputs' products and of the result to 8 or 11 significant bits, and of long fp32 sums.
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 3e-6}


@pytest.mark.parametrize(
    ("batch", "time", "heads", "width", "dtype"),
    [
        (8, 4096, 8, 128, torch.bfloat16),
        (64, 196, 6, 64, torch.bfloat16),
        (2, 1000, 6, 64, torch.float16),
        (1, 777, 4, 256, torch.float32),
    ],
)
def test_norm_and_gate_equal_fp64_with_all_gradients(batch, time, heads, width, dtype):
    torch.manual_seed(0)
    o, v = (torch.randn(batch, time, heads, width, device="cuda", dtype=dtype) for _ in range(2))
    gate, dy = (torch.randn(batch, time, heads * width, device="cuda", dtype=dtype) for _ in range(2))
    weight, skip = torch.rand(heads, width, device="cuda") + 0.5, torch.randn(heads, device="cuda")

    def outcome(wide):
        leaves = [x.double() if wide else x for x in (o, weight, gate, v, skip)]
        leaves = [x.detach().requires_grad_() for x in leaves]
        y = gated_norm(leaves[0], leaves[1], leaves[2], v=leaves[3], skip=leaves[4])
        return y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))

    for found, wanted in zip(outcome(False), outcome(True), strict=True):
        assert float((found.double() - wanted).norm() / wanted.norm()) < TOLERANCE[dtype]


@pytest.mark.parametrize("folded", [False, True])
def test_a_decoding_step_of_a_modal_convolution_equals_the_full_form(folded):
    torch.manual_seed(0)
    conv = ShortLongConv(1024, causal=True, long="modal", device="cuda").eval()
    with torch.no_grad():
        if folded:
            conv.reparameterize()
        x = torch.randn(4, 300, 1024, device="cuda")
        cache = conv.init_cache(4, device="cuda", dtype=torch.float32)
        ys = [conv(x[:, :280], cache=cache)]
        ys += [conv(x[:, t : t + 1], cache=cache) for t in range(280, 300)]
        # fp32: states of 280 tokens' sum in two orders.
        torch.testing.assert_close(torch.cat(ys, 1), conv(x), rtol=1e-3, atol=1e-4)
