"""Long convolution: the Triton source under the interpreter against the direct sum in fp64.

Triton decides at its first import whether kernels are interpreted, so this file runs itself once more in a process of
its own with TRITON_INTERPRET=1.
"""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chela_plugin.kernels.long_conv import long_conv
from chela_plugin.kernels.long_conv.reference import direct

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Rounding of fp32 sums, or of an output or a factor to 11 and 8 significant bits, relative to the whole result.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}


@pytest.mark.skipif(INTERPRETED, reason="this is the process it starts")
def test_the_kernels_pass_under_the_interpreter(this_file_under_the_interpreter):
    this_file_under_the_interpreter()


def test_backend_variable_decides(monkeypatch):
    x, taps = torch.randn(1, 5, 2), torch.randn(2, 3)
    monkeypatch.setenv("CHELA_BACKEND", "reference")
    assert torch.equal(long_conv(x, taps), direct(x, taps, causal=True))
    monkeypatch.setenv("CHELA_BACKEND", "cuda")
    with pytest.raises(ValueError, match="CHELA_BACKEND"):
        long_conv(x, taps)
    monkeypatch.setenv("CHELA_BACKEND", "triton")
    if not INTERPRETED:
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
            long_conv(x, taps)


def case(batch, tokens, channels, taps, causal, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(batch, tokens, channels, generator=g).to(dtype) for _ in range(2))
    h = torch.randn(channels, taps if causal else 2 * taps - 1, generator=g)
    return x, h, torch.randn(channels, generator=g), dy


def expected(x, h, bias, dy, causal):
    """Output and gradients of x, taps and bias in fp64."""
    leaves = [t.double().requires_grad_() for t in (x, h, bias)]
    y = direct(leaves[0], leaves[1], causal=causal) + leaves[2]
    return y.detach(), *torch.autograd.grad((y * dy.double()).sum(), leaves)


def error(found, wanted):
    return float((found.detach().double() - wanted).norm() / wanted.norm().clamp_min(1e-300))


@pytest.fixture
def launch(monkeypatch):
    """Launches with blocks so small that short sequences fill several of them."""
    from chela_plugin.kernels.long_conv import configs, launch

    monkeypatch.setattr(launch, "blocks_for", lambda *_: configs.Blocks(64, 16, 32, 4, 1))
    monkeypatch.setattr(launch, "lag_blocks_for", lambda dtype: configs.LagBlocks(32, 16, 4, 1, None))
    return launch


interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process with TRITON_INTERPRET=1")

SHAPES = [(1, 1, 1, 1), (1, 1, 2, 5), (2, 37, 3, 37), (3, 50, 2, 100), (1, 170, 2, 9), (5, 33, 2, 30), (1, 64, 2, 64)]


@interpreted
@pytest.mark.parametrize("how", ["toeplitz", "fft"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("batch", "tokens", "channels", "taps"), SHAPES)
def test_kernels_equal_the_sum_with_all_gradients(launch, how, causal, batch, tokens, channels, taps):
    x, h, bias, dy = case(batch, tokens, channels, taps, causal)
    y = launch.forward(x, h, bias, None, causal, how)
    gradients = launch.backward(dy, x, h, None, causal, True, True, how, want_bias=True)
    wanted = expected(x, h, bias, dy, causal)
    for found, value in zip((y, *gradients), wanted, strict=True):
        # Relative to the largest entry as well: with one token a sum may cancel to almost nothing.
        assert error(found, value) < TOLERANCE[torch.float32] * (1 + float(bias.abs().max() / value.norm()))


@interpreted
@pytest.mark.parametrize("how", ["toeplitz", "fft"])
@pytest.mark.parametrize("layout", ["[B, T, D]", "time first", "packed"])
def test_silu_rides_along_with_all_gradients(launch, how, layout, monkeypatch):
    monkeypatch.setattr(launch, "algorithm", lambda *_, **__: how)
    x, h, bias, dy = case(1 if layout == "packed" else 3, 72, 5, 60, True)
    if layout == "time first":
        x = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    cuts = torch.tensor([0, 10, 72]) if layout == "packed" else None
    leaves = [t.requires_grad_() for t in (x, h, bias)]
    y = long_conv(*leaves, silu=True, cu_seqlens=cuts)
    found = (y, *torch.autograd.grad(y, leaves, dy))
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    wide = torch.nn.functional.silu(long_conv(*doubles, cu_seqlens=cuts))  # fp64 runs by the definition
    for got, value in zip(found, (wide.detach(), *torch.autograd.grad(wide, doubles, dy.double())), strict=True):
        assert error(got, value) < TOLERANCE[torch.float32]
    with torch.no_grad():
        assert torch.equal(long_conv(*leaves, silu=True, cu_seqlens=cuts), y)


@interpreted
@pytest.mark.parametrize("how", ["toeplitz", "fft"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_activations_meet_fp32_sums(launch, how, dtype, monkeypatch):
    monkeypatch.setattr(launch, "algorithm", lambda *_, **__: how)
    x, h, bias, dy = case(3, 50, 2, 60, True, dtype)
    leaves = [t.requires_grad_() for t in (x.clone(), h.clone(), bias.clone())]
    y = long_conv(*leaves)
    found = (y, *torch.autograd.grad(y, leaves, dy))
    for got, value in zip(found, expected(x, h.to(dtype), bias, dy, True), strict=True):
        assert error(got, value) < TOLERANCE[dtype]
    assert [t.dtype for t in found] == [dtype, dtype, torch.float32, torch.float32]


@interpreted
@pytest.mark.parametrize("how", ["toeplitz", "fft"])
@pytest.mark.parametrize(("batch", "tokens"), [(2, 48), (2, 50), (1, 128)])
def test_any_memory_order_goes_in_and_time_first_comes_out_as_it_went_in(launch, how, batch, tokens):
    x, h, bias, dy = case(batch, tokens, 4, tokens, True)
    plain = launch.forward(x, h, bias, None, True, how)
    time_first = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    every_other = torch.stack([x, x], dim=2)[:, :, 1]
    assert torch.equal(launch.forward(every_other, h, bias, None, True, how), plain)
    y = launch.forward(time_first, h, bias, None, True, how)
    assert torch.equal(y, plain)
    assert y.stride(1) == 1
    gradients = launch.backward(dy, time_first, h, None, True, True, True, how)
    assert gradients[0].stride() == y.stride()
    for found, wanted in zip(gradients, launch.backward(dy, x, h, None, True, True, True, how), strict=True):
        assert torch.equal(found, wanted)


@interpreted
def test_the_future_does_not_change_the_past_bit_for_bit(launch):
    x, h, bias, _ = case(2, 101, 3, 101, True)
    later = x.clone()
    later[:, 60:] = 1e6 * torch.randn_like(later[:, 60:])
    before = launch.forward(x, h, bias, None, True, "toeplitz")[:, :60]
    assert torch.equal(launch.forward(later, h, bias, None, True, "toeplitz")[:, :60], before)


@interpreted
def test_the_fft_lets_nothing_wrap_around(launch):
    x, h, bias, _ = case(2, 101, 3, 101, True)
    later = x.clone()
    later[:, 60:] += 1
    change = launch.forward(later, h, bias, None, True, "fft") - launch.forward(x, h, bias, None, True, "fft")
    # Rounding of a transform in fp32, relative to what the change did to the rest.
    assert change[:, :60].abs().max() < 2e-6 * change[:, 60:].abs().max()


@interpreted
@pytest.mark.parametrize("how", ["toeplitz", "fft"])
@pytest.mark.parametrize("causal", [True, False])
def test_slabs_of_channels_are_the_same(launch, how, causal, monkeypatch):
    x, h, bias, dy = case(2, 30, 20, 30, causal)
    found = []
    for size in (1 << 26, 1):
        monkeypatch.setattr(launch, "slab_bytes", lambda points, size=size: size)
        monkeypatch.setattr(launch, "CHUNK_BYTES", size)
        u = launch.empty_like(x)
        y = launch.forward(x, h, bias, None, causal, how, silu=True, u=u)
        found.append((y, *launch.backward(dy, x, h, None, causal, True, True, how, want_bias=True, u=u)))
    assert len(launch._slabs(x, 8 * 30, 1)) == 3
    for one, many in zip(*found, strict=True):
        # Transforms of other batch sizes may round otherwise.
        torch.testing.assert_close(many, one, rtol=1e-5, atol=1e-5)


@interpreted
def test_gradients_that_nobody_wants_are_not_computed(launch):
    x, h, _, dy = case(1, 20, 2, 20, True)
    for how in ("toeplitz", "fft"):
        dx, dh, dbias = launch.backward(dy, x, h, None, True, True, False, how)
        assert dh.numel() == dbias.numel() == 0
        torch.testing.assert_close(dx, launch.backward(dy, x, h, None, True, True, True, how)[0])
        assert launch.backward(dy, x, h, None, True, False, True, how)[0].numel() == 0


@interpreted
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "cuts", [[0, 150], [0, 1, 1, 70, 134, 150], [0, 0, 64, 128, 192, 192], [0, 10, 20, 30, 40, 41, 42, 43, 44]]
)
def test_packed_sequences_are_convolved_alone_with_all_gradients(launch, causal, cuts):
    x, h, bias, dy = case(1, cuts[-1], 3, 90, causal)
    leaves = [t.requires_grad_() for t in (x, h, bias)]
    cu_seqlens = torch.tensor(cuts, dtype=torch.int32)
    y = long_conv(*leaves, causal=causal, cu_seqlens=cu_seqlens)
    found = (y, *torch.autograd.grad(y, leaves, dy))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHELA_BACKEND", "reference")
        doubles = [t.detach().double().requires_grad_() for t in leaves]
        y = long_conv(*doubles, causal=causal, cu_seqlens=cu_seqlens)
    wanted = (y.detach(), *torch.autograd.grad(y, doubles, dy.double()))
    for got, value in zip(found, wanted, strict=True):
        assert error(got, value) < TOLERANCE[torch.float32]


@interpreted
def test_packed_sequences_do_not_see_each_other_bit_for_bit(launch):
    x, h, bias, _ = case(1, 150, 3, 150, False)
    cuts = torch.tensor([0, 70, 100, 150])
    other = x.clone()
    other[:, 70:100] = 1e6 * torch.randn_like(other[:, 70:100])
    y, changed = (long_conv(t, h, bias, causal=False, cu_seqlens=cuts) for t in (x, other))
    assert torch.equal(y[:, :70], changed[:, :70])
    assert torch.equal(y[:, 100:], changed[:, 100:])


@interpreted
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_shape_equals_the_sum(data):
    from chela_plugin.kernels.long_conv import launch

    draw = data.draw
    causal, how = draw(st.booleans()), draw(st.sampled_from(["toeplitz", "fft"]))
    sizes = [draw(st.integers(1, high)) for high in (4, 150, 3, 200)]
    x, h, bias, dy = case(*sizes, causal, seed=draw(st.integers(0, 99)))
    wanted = expected(x, h, bias, dy, causal)
    gradients = launch.backward(dy, x, h, None, causal, True, True, how, want_bias=True)
    found = (launch.forward(x, h, bias, None, causal, how), *gradients)
    scale = max(float(x.norm()) * float(h.norm()), 1.0)
    for got, value in zip(found, wanted, strict=True):
        assert float((got.double() - value).norm()) < TOLERANCE[torch.float32] * max(scale, float(value.norm()))


@interpreted
@pytest.mark.parametrize(("causal", "time_first"), [(True, False), (False, True)])
def test_operators_pass_opcheck(causal, time_first):
    from chela_plugin.kernels.long_conv import ops

    x, h, bias, dy = case(2, 10, 4, 7, causal)
    if time_first:
        x = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    leaves = [t.requires_grad_() for t in (x, h, bias)]
    torch.library.opcheck(ops.forward_op, (*leaves, None, causal, False, True))
    if not time_first:
        packed = (leaves[0][:1], *leaves[1:], torch.tensor([0, 4, 10]), causal, False, True)
        torch.library.opcheck(ops.forward_op, packed)
    torch.library.opcheck(ops.forward_op, (*leaves[:2], None, None, causal, True, True))
    x, h, bias = (t.detach() for t in leaves)
    torch.library.opcheck(ops.backward_op, (dy, x, x, h, bias, None, causal, True, True, True))
    torch.library.opcheck(ops.backward_op, (dy, x, x.new_empty(0), h, None, None, causal, False, False, True))


@interpreted
def test_compiled_and_exported_modules_keep_the_operator_whole():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.taps = torch.nn.Parameter(torch.randn(4, 6))

        def forward(self, x):
            return torch.nn.functional.silu(long_conv(2 * x, self.taps, causal=True))

    layer, x = Layer(), torch.randn(2, 9, 4, requires_grad=True)
    wanted = torch.autograd.grad(layer(x).sum(), (x, layer.taps))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(x).sum(), (x, layer.taps))
    torch.testing.assert_close(found, wanted)
    exported = torch.export.export(layer, (x.detach(),))
    assert "chela.long_conv" in str(exported.graph)
    torch.testing.assert_close(exported.module()(x.detach()), layer(x).detach())


@interpreted
def test_blocks_and_algorithm_come_from_the_table():
    from chela_plugin.kernels.long_conv import configs

    assert configs.blocks_for(32, 1024, torch.bfloat16) == (128, 128, 64, 4, 3)
    assert configs.blocks_for(1, 4096, torch.bfloat16) == (64, 32, 64, 4, 3)
    assert configs.blocks_for(64, 64, torch.bfloat16) == (64, 32, 64, 4, 3)
    assert configs.average_lags(4, 0, 3) == 2.5
    assert configs.average_lags(4, -3, 3) == 4.0
    assert configs.average_lags(1000, 0, 0) == 1.0
    for dtype in (torch.float32, torch.bfloat16):
        for backward in (False, True):
            assert configs.algorithm(64, 0, 6, dtype, backward=backward) == "toeplitz"
            assert configs.algorithm(32768, 0, 32767, dtype, backward=backward) == "fft"
