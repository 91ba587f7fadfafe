"""Long convolution: both forms of the reference against the sum written out, gradients included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chela_plugin.kernels.long_conv import long_conv
from chela_plugin.kernels.long_conv.reference import direct, fast_length, fft, lag_window


def by_the_sum(x, taps, causal):
    """The formula, token by token and tap by tap."""
    tokens = x.shape[1]
    centre = 0 if causal else (taps.shape[1] - 1) // 2
    rows = []
    for t in range(tokens):
        row = torch.zeros_like(x[:, 0])
        for column in range(taps.shape[1]):
            s = t - (column - centre)
            if 0 <= s < tokens:
                row = row + taps[:, column] * x[:, s]
        rows.append(row)
    return torch.stack(rows, dim=1)


def random_case(batch, tokens, channels, taps, causal, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    count = taps if causal else 2 * taps - 1
    x = torch.randn(batch, tokens, channels, generator=g, dtype=dtype)
    return x, torch.randn(channels, count, generator=g, dtype=dtype)


@pytest.mark.parametrize("form", [direct, fft])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("tokens", "taps"), [(1, 1), (1, 5), (2, 2), (7, 3), (13, 13), (13, 29), (37, 5)])
def test_both_forms_equal_the_sum_with_all_gradients(form, causal, tokens, taps):
    x, k = random_case(2, tokens, 3, taps, causal)
    x.requires_grad_()
    k.requires_grad_()
    y, expected = form(x, k, causal=causal), by_the_sum(x, k, causal)
    weight = torch.randn_like(expected)
    found = torch.autograd.grad((y * weight).sum(), (x, k))
    wanted = torch.autograd.grad((expected * weight).sum(), (x, k))
    # fp64 sums of at most 29 products of order 1.
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 4), st.integers(1, 50), st.booleans(), st.integers(0, 999))
def test_fft_equals_direct_for_any_shape(batch, tokens, channels, taps, causal, seed):
    x, k = random_case(batch, tokens, channels, taps, causal, seed=seed)
    torch.testing.assert_close(fft(x, k, causal=causal), direct(x, k, causal=causal), rtol=0, atol=1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("tokens", [301, 512])
def test_the_fft_does_not_let_the_future_wrap_around(dtype, tolerance, tokens):
    x, k = random_case(1, tokens, 4, tokens, True, dtype)
    later = x.clone()
    later[:, tokens // 2 :] += 1
    change = fft(later, k, causal=True) - fft(x, k, causal=True)
    before, after = change[:, : tokens // 2], change[:, tokens // 2 :]
    # Rounding of a transform, relative to what the change did to the rest.
    assert before.abs().max() <= tolerance * after.abs().max()
    assert fast_length(2 * tokens - 1) >= 2 * tokens - 1


def test_the_direct_form_is_causal_bit_for_bit():
    x, k = random_case(2, 101, 5, 101, True, torch.float32)
    later = x.clone()
    later[:, 60:] = 1e6 * torch.randn_like(later[:, 60:])
    assert torch.equal(direct(later, k, causal=True)[:, :60], direct(x, k, causal=True)[:, :60])


def test_fast_lengths_are_long_enough_and_not_much_longer():
    for points in range(1, 3000):
        n = fast_length(points)
        assert points <= n < max(1.34 * points, points + 2)


def test_packed_sequences_are_convolved_alone():
    x, k = random_case(1, 20, 3, 30, True)
    cuts = torch.tensor([0, 1, 8, 8, 20])
    y = long_conv(x, k, cu_seqlens=cuts)
    for a, b in ((0, 1), (1, 8), (8, 20)):
        torch.testing.assert_close(y[:, a:b], by_the_sum(x[:, a:b], k, True), rtol=0, atol=1e-12)


def test_low_precision_activations_are_summed_in_fp32():
    x, k = random_case(1, 300, 2, 300, True, torch.float32)
    y = long_conv(x.bfloat16(), k)
    assert y.dtype == torch.bfloat16
    exact = direct(x.bfloat16().double(), k.double(), causal=True)
    # Only the output is rounded: half a unit in bf16's 8th bit.
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-4)


def test_window_is_zero_where_there_are_no_taps():
    assert lag_window(torch.tensor([[1.0, 2.0]]), 3, causal=True).tolist() == [[0, 0, 1, 2, 0]]
    assert lag_window(torch.tensor([[1.0, 2.0, 3.0]]), 3, causal=False).tolist() == [[0, 1, 2, 3, 0]]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"taps": torch.zeros(3, 4)}, "D = 2"),
        ({"taps": torch.zeros(2, 4), "causal": False}, "even 4"),
        ({"taps": torch.zeros(2, 4), "bias": torch.zeros(3)}, "bias"),
        ({"taps": torch.zeros(2, 4), "cu_seqlens": torch.tensor([0, 4, 3, 5])}, "cu_seqlens must not decrease"),
        (
            {"taps": torch.zeros(2, 4), "cu_seqlens": torch.tensor([0, 4])},
            "cu_seqlens must run from 0 to T = 5, got 0 to 4",
        ),
        ({"taps": torch.zeros(2, 4), "cu_seqlens": torch.tensor([0.0, 5.0])}, "int32 or int64"),
        ({"x": torch.zeros(2, 5, 2), "taps": torch.zeros(2, 4), "cu_seqlens": torch.tensor([0, 5])}, "batch of 1"),
    ],
)
def test_bad_input_is_one_clear_error(kwargs, message):
    with pytest.raises(ValueError, match=message):
        long_conv(**{"x": torch.zeros(1, 5, 2), **kwargs})
