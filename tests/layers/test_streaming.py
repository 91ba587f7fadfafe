"""Streaming of a short-long convolution: chunks and steps equal one long call, at every cut, with a bounded cost."""

import copy

import pytest
import torch

from chela_plugin.layers import ShortLongConv, streaming
from chela_plugin.layers.long_kernel import LONG_KERNELS

TAPS = ["multiscale", "explicit", "implicit"]
# fp64: only the order of the sums differs, through FFTs of 1,000 points.
CLOSE = {"rtol": 0, "atol": 1e-10}
BLOCK = streaming.BLOCK


def build(long, dtype=torch.float64, dim=8, **options):
    torch.manual_seed(0)
    conv = ShortLongConv(dim, causal=True, long=long, dtype=dtype, **{"group_size": 4, "max_len": 300, **options})
    with torch.no_grad():
        for p in conv.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return conv.eval()


def through(conv, x, cuts, **options):
    """x in chunks that end at the cuts, then token by token."""
    cache = conv.init_cache(len(x), dtype=x.dtype, **options)
    parts, start = [], 0
    for cut in cuts:
        parts.append(conv(x[:, start:cut], cache=cache))
        start = cut
    parts += [conv(token, cache=cache) for token in x[:, start:].split(1, dim=1)]
    return torch.cat(parts, dim=1), cache


@torch.no_grad()
@pytest.mark.parametrize("max_tokens", [None, 450], ids=["growing", "static"])
@pytest.mark.parametrize("cuts", [(), (1,), (37, 101), (128,), (63, 64, 65)])
@pytest.mark.parametrize("long", [*LONG_KERNELS, "none"])
def test_chunks_and_then_steps_equal_one_call(long, cuts, max_tokens):
    conv, x = build(long), torch.randn(2, 450, 8, dtype=torch.float64)
    y, _ = through(conv, x, cuts, max_tokens=max_tokens)
    torch.testing.assert_close(y, conv(x), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("long", [*LONG_KERNELS, "none"])
@pytest.mark.parametrize("options", [{}, {"norm": "batch"}, {"short": (), "long_gain": 1.0}, {"short": (70,)}])
def test_steps_and_chunks_may_take_turns(long, options):
    if long == "none" and options.get("short") == ():
        return
    raw, x = build(long, **options), torch.randn(2, 300, 8, dtype=torch.float64)
    for conv in (raw, copy.deepcopy(raw).reparameterize()):
        cache, parts = conv.init_cache(2, dtype=torch.float64), []
        for part in x.split([1, 1, 5, *[1] * 70, 100, *[1] * 121, 2], dim=1):
            parts.append(conv(part, cache=cache, silu=True))
        torch.testing.assert_close(torch.cat(parts, 1), conv(x, silu=True), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("long", [*LONG_KERNELS, "none"])
def test_padding_after_a_history_leaves_no_gap(long):
    conv, x = build(long), torch.randn(2, 100, 8, dtype=torch.float64)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[1, :20] = False
    cache = conv.init_cache(2, dtype=torch.float64)
    conv(x[:, :40], cache=cache)
    conv(x[:, 40:70] * mask[..., None], mask=mask, cache=cache)
    y = torch.cat([conv(x[:, t : t + 1], cache=cache) for t in range(70, 100)], 1)
    gapless = torch.cat([x[1:, :40], x[1:, 60:]], 1)
    torch.testing.assert_close(y[:1], conv(x[:1])[:, 70:], **CLOSE)
    torch.testing.assert_close(y[1:], conv(gapless)[:, 50:], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("long", TAPS)
def test_a_static_cache_stays_where_it_is(long):
    conv, x = build(long), torch.randn(1, 200, 8, dtype=torch.float64)
    _, cache = through(conv, x[:, :100], (90,), max_tokens=200)
    places = {name: (t.data_ptr(), t.shape) for name, t in cache.items() if t.numel()}
    for t in range(100, 200):
        conv(x[:, t : t + 1], cache=cache)
    assert places == {name: (t.data_ptr(), t.shape) for name, t in cache.items() if t.numel()}


@torch.no_grad()
def test_a_step_costs_log_squared_amortised(monkeypatch):
    """Places that the look-ahead's convolutions run over: N log N of them for N steps, not N^2."""
    conv, spent = build("multiscale"), []
    whole = streaming.long_conv
    monkeypatch.setattr(streaming, "long_conv", lambda x, taps: spent.append(x.shape[1]) or whole(x, taps))
    n = 64 * BLOCK
    cache = conv.init_cache(1, dtype=torch.float64, max_tokens=n)
    for token in torch.randn(1, n, 8, dtype=torch.float64).split(1, dim=1):
        conv(token, cache=cache)
    # Level i: n / 2^(i+1) blocks of 2^i, each convolved into as many again.
    assert sum(spent) <= n * 6


@torch.no_grad()
def test_changed_weights_are_noticed_between_steps():
    conv, x = build("multiscale"), torch.randn(1, 3, 8, dtype=torch.float64)
    through(conv, x, ())
    conv.scales.mul_(2.0)
    y, _ = through(conv, x, ())
    torch.testing.assert_close(y, conv(x), **CLOSE)


@pytest.mark.parametrize("long", [*LONG_KERNELS, "none"])
def test_gradients_flow_through_a_cache(long):
    conv, x = build(long), torch.randn(1, 12, 8, dtype=torch.float64, requires_grad=True)
    y, _ = through(conv, x, (5,))
    (found,) = torch.autograd.grad(y.square().sum(), x)
    (wanted,) = torch.autograd.grad(conv(x).square().sum(), x)
    torch.testing.assert_close(found, wanted, **CLOSE)
