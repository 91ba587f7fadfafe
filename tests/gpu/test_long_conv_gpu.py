"""Long convolution on a CUDA device at real sizes, against a real FFT in fp64."""

import itertools

import pytest
import torch

from chela_plugin.kernels.long_conv import long_conv

pytestmark = pytest.mark.gpu

# Output rounding of bf16 and of bf16 taps, of fp16, and of fp32 sums of up to 6,000 terms in a row; relative to the
# whole result.
TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 5e-4, torch.float32: 4e-6}


def in_double(x, h, dy, causal):
    """Output and gradients of x and taps, channel by channel through a padded real FFT in fp64."""
    tokens = x.shape[1]
    behind = 0 if causal else (h.shape[1] - 1) // 2
    points = 2 * tokens + 2 * h.shape[1]
    parts = []
    for d in range(0, x.shape[2], 32):
        leaves = [t.detach().double().requires_grad_() for t in (x[..., d : d + 32], h[d : d + 32])]
        spectrum = torch.fft.rfft(leaves[0].transpose(1, 2), n=points) * torch.fft.rfft(leaves[1], n=points)
        y = torch.fft.irfft(spectrum, n=points)[..., behind : behind + tokens].transpose(1, 2)
        parts.append((y.detach(), *torch.autograd.grad(y, leaves, dy[..., d : d + 32].double())))
    y, dx, dh = zip(*parts, strict=True)
    return torch.cat(y, 2), torch.cat(dx, 2), torch.cat(dh, 0)


def case(batch, tokens, channels, taps, causal, dtype):
    torch.manual_seed(0)
    x, dy = (torch.randn(batch, tokens, channels, device="cuda", dtype=dtype) for _ in range(2))
    h = torch.randn(channels, taps if causal else 2 * taps - 1, device="cuda") * taps**-0.5
    return x, h, dy


def error(found, wanted):
    return float((found.detach().double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("how", ["toeplitz", "fft"])
@pytest.mark.parametrize("time_first", [False, True])
def test_silu_rides_along_with_all_gradients(how, time_first, monkeypatch):
    from chela_plugin.kernels.long_conv import launch

    monkeypatch.setattr(launch, "algorithm", lambda *_, **__: how)
    monkeypatch.setattr(launch, "CHUNK_BYTES", 1 << 18)  # several slabs of channels
    x, h, dy = case(4, 2000, 48, 2000, True, torch.bfloat16)
    if time_first:
        x = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    leaves = [t.requires_grad_() for t in (x, h, torch.randn(48, device="cuda"))]
    y = long_conv(*leaves, silu=True)
    found = (y.detach(), *torch.autograd.grad(y, leaves, dy))
    wide = [t.detach().double().requires_grad_() for t in leaves]
    y = long_conv(*wide, silu=True)  # fp64 runs by the definition
    for got, wanted in zip(found, (y.detach(), *torch.autograd.grad(y, wide, dy.double())), strict=True):
        assert error(got, wanted) < 2 * TOLERANCE[torch.bfloat16]  # u and its gradient are rounded once more


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("how", ["toeplitz", "fft"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("batch", "tokens", "channels", "taps"),
    [(32, 1024, 32, 1024), (3, 1000, 40, 77), (1, 3001, 33, 5000), (70, 50, 64, 50)],
)
def test_kernels_equal_fp64_with_all_gradients(how, causal, dtype, batch, tokens, channels, taps, monkeypatch):
    from chela_plugin.kernels.long_conv import launch

    monkeypatch.setattr(launch, "algorithm", lambda *_, **__: how)
    x, h, dy = case(batch, tokens, channels, taps, causal, dtype)
    leaves = x.requires_grad_(), h.requires_grad_(), torch.randn(channels, device="cuda", requires_grad=True)
    y = long_conv(*leaves, causal=causal)
    dx, dh, db = torch.autograd.grad(y, leaves, dy)
    wanted_y, wanted_dx, wanted_dh = in_double(x, h, dy, causal)
    assert error(y, wanted_y + leaves[2].detach().double()) < TOLERANCE[dtype]
    assert error(dx, wanted_dx) < TOLERANCE[dtype]
    assert error(dh, wanted_dh) < 4e-6  # products of low precision are exact in fp32, sums are fp32
    assert error(db, dy.double().sum((0, 1))) < 1e-6


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("cuts", [[0, 5000], [0, 1, 1, 1000, 1064, 4096, 5000]])
def test_packed_sequences_are_convolved_alone(cuts, causal):
    x, h, dy = case(1, 5000, 64, 3000, causal, torch.bfloat16)
    leaves = x.requires_grad_(), h.requires_grad_()
    y = long_conv(*leaves, causal=causal, cu_seqlens=torch.tensor(cuts, device="cuda"))
    found = (y, *torch.autograd.grad(y, leaves, dy))
    parts = [in_double(x[:, a:b], h, dy[:, a:b], causal) for a, b in itertools.pairwise(cuts) if b > a]
    wanted = (torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 1), sum(p[2] for p in parts))
    for got, value in zip(found, wanted, strict=True):
        assert error(got, value) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("tokens", [16384, 32768])
def test_the_longest_sequences_of_both_algorithms(tokens, monkeypatch):
    from chela_plugin.kernels.long_conv import launch

    x, h, dy = case(1, tokens, 64, tokens, True, torch.bfloat16)
    wanted = in_double(x, h, dy, True)
    for how in ("toeplitz", "fft"):
        monkeypatch.setattr(launch, "algorithm", lambda *_, how=how, **__: how)
        leaves = x.clone().requires_grad_(), h.clone().requires_grad_()
        y = long_conv(*leaves)
        for found, value in zip((y, *torch.autograd.grad(y, leaves, dy)), wanted, strict=True):
            assert error(found, value) < TOLERANCE[torch.bfloat16]


def test_tf32_only_where_torch_allows_it():
    x, h, dy = case(2, 512, 32, 512, True, torch.float32)
    wanted = in_double(x, h, dy, True)[0]
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert 1e-5 < error(long_conv(x, h), wanted) < 1e-3  # 11 bits of each factor
    finally:
        torch.set_float32_matmul_precision(before)
    assert error(long_conv(x, h), wanted) < 4e-6


@pytest.mark.parametrize("tokens", [1000, 16384])
def test_twenty_runs_agree_bit_for_bit(tokens):
    x, h, dy = case(4, tokens, 64, tokens, True, torch.bfloat16)
    leaves = x.requires_grad_(), h.requires_grad_()

    def run():
        y = long_conv(*leaves)
        return y, *torch.autograd.grad(y, leaves, dy)

    first = run()
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


def test_the_future_does_not_change_the_past_bit_for_bit():
    x, h, _ = case(2, 3000, 64, 3000, True, torch.bfloat16)
    later = x.clone()
    later[:, 1717:] = 1e4 * torch.randn_like(later[:, 1717:])
    assert torch.equal(long_conv(later, h)[:, :1717], long_conv(x, h)[:, :1717])


@pytest.mark.parametrize("tokens", [777, 16384])
def test_a_cuda_graph_captures_it(tokens):
    x, h, _ = case(2, tokens, 64, tokens, True, torch.bfloat16)
    wanted = long_conv(x, h)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = long_conv(x, h)
    y.zero_()
    graph.replay()
    assert torch.equal(y, wanted)


@pytest.mark.parametrize("tokens", [1024, 1000])
def test_strides_do_not_matter(tokens):
    x, h, _ = case(4, tokens, 64, tokens, True, torch.bfloat16)
    plain = long_conv(x, h)
    time_first = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    y = long_conv(time_first, h)
    assert y.stride(1) == 1
    assert torch.equal(y, plain)
    assert torch.equal(long_conv(torch.stack([x, x], 2)[:, :, 1], h), plain)
    assert torch.equal(long_conv(x, h.t().contiguous().t()), plain)


def test_more_than_two_to_the_31_elements():
    x = torch.zeros(1, (1 << 21) + 64, 1024, device="cuda", dtype=torch.bfloat16)
    x[0, -1] = 1
    x[0, -3] = 2
    h = torch.tensor([[1.0, 10.0, 100.0]], device="cuda").expand(1024, 3)
    y = long_conv(x, h)
    assert torch.equal(y[0, -4:, -1].float().cpu(), torch.tensor([0.0, 2.0, 20.0, 201.0]).bfloat16().float())
    assert torch.equal(y[0, -4:, 0], y[0, -4:, -1])
