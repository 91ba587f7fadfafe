"""Short-long convolution: branches and fold agree, the three forms agree, the future stays out, 1-D and 2-D."""

import copy

import pytest
import torch
from torch.nn import functional as F

from chela_plugin.layers import ShortLongConv, short_long_conv
from chela_plugin.layers.long_kernel import LONG_KERNELS
from chela_plugin.layers.short_long_conv import two_sided

GENERATORS = [*LONG_KERNELS, "none"]
# (dtype, tolerance): only the order of the sums differs, at the rounding of each dtype.
PRECISIONS = [(torch.float32, 1e-5), (torch.float64, 1e-10)]


def build(dtype=torch.float64, dim=8, **options):
    torch.manual_seed(0)
    conv = ShortLongConv(dim, dtype=dtype, **{"group_size": 4, "max_len": 30, **options})
    if conv.norm == "batch":  # statistics as after some training
        for norm in conv.norms:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return conv.eval()


def sum_of_branches(conv, x, grid=None):
    """The definition: every branch alone, through its own norm."""
    total = 0
    for i in range(len(conv.short) + (conv.long != "none")):
        y = conv.branch(i, x, grid)
        total = total + (conv.norms[i](y) if conv.norm == "batch" else y * conv.scales[i])
    return total if conv.norm == "batch" else total + conv.bias


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("norm", ["scale", "batch"])
@pytest.mark.parametrize("long", GENERATORS)
@pytest.mark.parametrize(("causal", "dims", "grid"), [(True, 1, None), (False, 1, None), (False, 2, (5, 9))])
def test_merged_equals_unmerged(dtype, tolerance, norm, long, causal, dims, grid):
    conv = build(dtype, causal=causal, dims=dims, long=long, norm=norm)
    x = torch.randn(2, 45, 8, dtype=dtype)
    expected = sum_of_branches(conv, x, grid)
    torch.testing.assert_close(conv(x, grid=grid), expected, rtol=0, atol=tolerance)
    merged = copy.deepcopy(conv).reparameterize()
    torch.testing.assert_close(merged(x, grid=grid), expected, rtol=0, atol=tolerance)
    assert sum(p.numel() for p in merged.parameters()) <= sum(p.numel() for p in conv.parameters())
    assert not list(merged.short_kernels)


def test_scale_branches_are_merged_while_training_too():
    conv = build(causal=True, norm="scale").train()
    x = torch.randn(2, 33, 8, dtype=torch.float64)
    torch.testing.assert_close(conv(x), sum_of_branches(conv, x), rtol=0, atol=1e-10)


def test_batch_branches_take_their_statistics_over_tokens_that_are_there():
    conv = build(causal=True, norm="batch").train()
    rows = torch.randn(2, 20, 8, dtype=torch.float64)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, 13:] = False
    y = conv(rows * mask[..., None], mask=mask)
    other = conv.branch(0, rows * mask[..., None], None)[mask]
    torch.testing.assert_close(y[mask].mean(0), sum(n.bias for n in conv.norms), rtol=0, atol=1e-10)
    assert other.shape == (33, 8)


@pytest.mark.parametrize("norm", ["scale", "batch"])
@pytest.mark.parametrize("long", GENERATORS)
@pytest.mark.parametrize("folded", [False, True])
def test_chunks_and_steps_equal_the_whole(long, norm, folded):
    conv = build(causal=True, long=long, norm=norm)
    if folded:
        conv.reparameterize()
    x = torch.randn(2, 41, 8, dtype=torch.float64)  # beyond the explicit kernel's 30 taps
    cache = conv.init_cache(2, dtype=torch.float64)
    parts = [conv(part, cache=cache) for part in x.split([7, 1, 1, 20, 2, 1, 9], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), conv(x), rtol=0, atol=1e-10)


def test_the_modal_cache_does_not_grow():
    conv = build(causal=True, long="modal")
    cache = conv.init_cache(1, dtype=torch.float64)
    for _ in range(12):
        conv(torch.randn(1, 3, 8, dtype=torch.float64), cache=cache)
    assert cache["conv_inputs"].shape[1] == 6 and cache["conv_modes"].shape == (1, 8, 8)


@pytest.mark.parametrize("long", GENERATORS)
@pytest.mark.parametrize("tokens", [31, 61])
def test_future_tokens_do_not_change_the_past(long, tokens):
    conv = build(torch.float32, causal=True, long=long)
    x = torch.randn(1, tokens, 8)
    later = x.clone()
    later[:, 23:] = torch.randn_like(later[:, 23:]) * 100
    assert torch.equal(conv(x)[:, :23], conv(later)[:, :23])


@pytest.mark.parametrize("long", GENERATORS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_through_an_fft_the_future_stays_out_up_to_its_rounding(long, dtype, tolerance):
    conv = build(dtype, causal=True, long=long)
    x = torch.randn(1, 401, 8, dtype=dtype)
    later = x.clone()
    later[:, 200:] = torch.randn_like(later[:, 200:])
    y = conv(x)
    # Rounding of a transform, relative to its largest value.
    assert (y - conv(later))[:, :200].abs().max() <= tolerance * y.abs().max()


def test_two_sided_sees_both_ways():
    conv = build(causal=False)
    x = torch.zeros(1, 31, 8, dtype=torch.float64)
    x[:, 15] = 1
    y = conv(x) - conv(torch.zeros_like(x))
    assert (y[:, :15].abs().sum(-1) > 0).all() and (y[:, 16:].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("grid", [(1, 7), (7, 1), (4, 5), (9, 3)])
def test_two_dimensional_is_one_dense_kernel_on_the_grid(grid):
    conv = build(causal=False, dims=2)
    h, w = grid
    x = torch.randn(2, h * w, 8, dtype=torch.float64)
    right, left, down, up = conv.long_taps(max(grid)) * conv.folded_long_scale()[:, None]
    dense = torch.zeros(8, 2 * h + 7, 2 * w + 7, dtype=torch.float64)
    dense[:, h + 3 - (h - 1) : h + 3 + h, w + 3] += two_sided(down[:, :h], up[:, :h])
    dense[:, h + 3, w + 3 - (w - 1) : w + 3 + w] += two_sided(right[:, :w], left[:, :w])
    dense[:, h : h + 7, w : w + 7] += conv.folded_short()
    image = x.transpose(1, 2).unflatten(2, grid)
    expected = F.conv2d(image, dense.flip(1, 2).unsqueeze(1), padding=(h + 3, w + 3), groups=8)
    found = conv(x, grid=grid) - conv.folded_bias()
    torch.testing.assert_close(found, expected.flatten(2).transpose(1, 2), rtol=0, atol=1e-12)


def test_no_parameter_depends_on_the_size_of_the_image():
    conv = build(causal=False, dims=2)
    for grid in ((3, 5), (14, 14), (40, 33)):
        assert conv(torch.randn(1, grid[0] * grid[1], 8, dtype=torch.float64), grid=grid).isfinite().all()


def test_every_parameter_gets_a_gradient():
    for options in ({"causal": True}, {"causal": False, "dims": 2, "norm": "batch"}):
        conv = build(**options).train()
        grid = (5, 60) if options.get("dims") == 2 else None
        conv(torch.randn(2, 300, 8, dtype=torch.float64), grid=grid).square().sum().backward()
        for name, parameter in conv.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"causal": True, "dims": 2}, "no causal form"),
        ({"causal": False, "short": (4,)}, "odd"),
        ({"causal": True, "short": (), "long": "none"}, "at least one branch"),
        ({"causal": True, "long": "fourier"}, "multiscale"),
        ({"causal": True, "norm": "layer"}, "'scale' or 'batch'"),
        ({"causal": True, "group_size": 0}, "at least 1, got 0 and 30"),
        ({"causal": True, "max_len": 0}, "at least 1, got 4 and 0"),
    ],
)
def test_bad_options_are_one_clear_error(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_a_two_dimensional_convolution_asks_for_its_grid():
    with pytest.raises(ValueError, match="grid"):
        build(causal=False, dims=2)(torch.zeros(1, 6, 8, dtype=torch.float64))


def test_folding_batch_norms_in_training_mode_is_refused():
    with pytest.raises(RuntimeError, match="eval"):
        build(causal=True, norm="batch").train().reparameterize()


@pytest.mark.parametrize("long", LONG_KERNELS)
def test_taps_beyond_the_memory_bound_are_one_clear_error(long):
    conv = build(causal=True, long=long)
    with pytest.raises(ValueError, match=r"taps of 8 channels would take .* GiB, more than the bound of 8 GiB"):
        conv.long_taps(10**9)


@pytest.mark.parametrize("norm", ["scale", "batch"])
@pytest.mark.parametrize("tokens", [1, 9, 200])
def test_a_structured_modal_convolution_equals_the_exact_one(norm, tokens):
    for dtype, tolerance in PRECISIONS:
        conv = build(dtype, causal=True, long="modal", norm=norm)
        x = torch.randn(2, tokens, 8, dtype=dtype)
        assert conv.runs_structured(x)
        exact = conv.exact(x, False)
        torch.testing.assert_close(conv(x), exact, rtol=0, atol=tolerance)
        torch.testing.assert_close(conv(x, silu=True), F.silu(exact), rtol=0, atol=tolerance)


@pytest.mark.parametrize("folded", [False, True])
def test_a_long_two_sided_modal_convolution_equals_the_exact_one(folded, monkeypatch):
    monkeypatch.setattr(short_long_conv, "TWO_SIDED_FROM", 150)
    for dtype, tolerance in PRECISIONS:
        conv = build(dtype, causal=False, long="modal")
        x = torch.randn(2, 150, 8, dtype=dtype)
        exact = conv.exact(x, False)
        conv = conv.reparameterize() if folded else conv
        assert conv.runs_structured(x) and not conv.runs_structured(x[:, 1:])
        torch.testing.assert_close(conv(x), exact, rtol=0, atol=tolerance)


def test_what_modal_states_cannot_carry_runs_by_the_exact_path():
    x = torch.randn(1, 20, 8, dtype=torch.float64)
    assert not build(causal=False, long="modal").runs_structured(x)
    assert not build(causal=True, long="modal", short=(3, 9)).runs_structured(x)
    assert not build(causal=True, long="modal", norm="batch").train().runs_structured(x)
    assert not build(causal=True, long="multiscale").runs_structured(x)
