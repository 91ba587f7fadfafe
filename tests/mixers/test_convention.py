"""What every built-in mixer but chela promises: causality, decoding, padding, packing, precision, resetting."""

import copy

import pytest
import torch

from chela_plugin import create_mixer

CAUSAL = [
    "attention",
    "attention(rope=False, num_heads=3)",
    "linear_attention",
    "linear_attention(norm=rms, phi=silu)",
    "retnet",
    "gla",
    "gla(num_heads=3, expand_k=1.0)",
    "gla(decay=head)",
    "gated_deltanet",
    "gated_deltanet(num_heads=3, taps=3)",
    "mamba",
    "mamba(d_state=5, expand=1.5)",
    "mamba2",
    "mamba2(d_state=20, head_dim=8, num_groups=2, expand=1.0)",
    "conv",
    "conv(long=modal, norm=batch, short=(4,))",
    "conv(long=explicit, max_len=20)",
    "identity",
]
BOTH_WAYS = [
    "attention",
    "attention(rope=True)",
    "linear_attention",
    "linear_attention(norm=rms, phi=silu)",
    "conv(norm=scale)",
    "identity",
]
EITHER = [(spec, True) for spec in CAUSAL] + [(spec, False) for spec in BOTH_WAYS]
TRAINED = [spec for spec in CAUSAL if spec != "identity"]
DIM = 48
TIME = 71  # odd, and past every chunk length in use (32, 64)


def mixer(spec, *, causal=True, dtype=torch.float64):
    torch.manual_seed(0)
    # eval: a batch norm in training mode sees all tokens at once.
    return create_mixer(spec, DIM, causal=causal, depth=2, dtype=dtype).eval()


def tokens(batch=2, time=TIME, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(batch, time, DIM, dtype=dtype)


@pytest.mark.parametrize("spec", CAUSAL)
def test_future_tokens_do_not_change_the_past(spec):
    module, x = mixer(spec, dtype=torch.float32), tokens(dtype=torch.float32)
    before = module(x)
    for t in (0, 1, 32, 63, 64, 70):
        changed = x.clone()
        changed[:, t:] *= -2
        after = module(changed)
        if spec.startswith("conv"):  # past 64 tokens through an FFT, whose rounding is relative to its largest value
            torch.testing.assert_close(before[:, :t], after[:, :t], rtol=0, atol=1e-6 * after.abs().max().item())
        else:
            assert torch.equal(before[:, :t], after[:, :t]), f"a change at token {t} reached an earlier output"
        assert not torch.equal(before[:, t], after[:, t])


@pytest.mark.parametrize("spec", TRAINED)
def test_a_causal_mixer_uses_its_past(spec):
    module, x = mixer(spec), tokens()
    changed = x.clone()
    changed[:, 0] *= -2
    assert not torch.allclose(module(x)[:, 5], module(changed)[:, 5])


@pytest.mark.parametrize("spec", CAUSAL)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-10), (torch.float32, 1e-4)],  # the same sums in another order, at the rounding of each dtype
)
def test_decoding_equals_the_full_forward(spec, dtype, tolerance):
    module, x = mixer(spec, dtype=dtype), tokens(dtype=dtype)
    cache = module.init_cache(2)
    parts = [module(x[:, :13], cache=cache), module(x[:, 13:14], cache=cache), module(x[:, 14:16], cache=cache)]
    parts += [module.step(x[:, t], cache)[:, None] for t in range(16, 25)]
    parts += [module(x[:, 25:], cache=cache)]
    torch.testing.assert_close(torch.cat(parts, dim=1), module(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("spec", TRAINED)
def test_caches_hold_the_batch_first(spec):
    module, x = mixer(spec), tokens(batch=3)
    cache = module.init_cache(3)
    module(x[:, :6], cache=cache)
    order = torch.tensor([2, 0, 2])
    for key in list(cache):
        cache[key] = cache[key].index_select(0, order)
    step = module.step(x[order, 6], cache)  # as beam search does
    torch.testing.assert_close(step, module(x[order, :7])[:, -1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("spec", "causal"), EITHER)
def test_padded_rows_equal_the_row_alone(spec, side, causal):
    module, x = mixer(spec, causal=causal), tokens(batch=3)
    lengths = [TIME, 40, 1]
    mask = torch.zeros(3, TIME, dtype=torch.long)
    for row, length in enumerate(lengths):
        real = slice(TIME - length, TIME) if side == "left" else slice(0, length)
        mask[row, real] = 1
    y = module(x, attention_mask=mask)
    assert y.isfinite().all()
    for row in range(3):
        alone = module(x[row, mask[row].bool()][None])[0]
        torch.testing.assert_close(y[row, mask[row].bool()], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("spec", CAUSAL)
def test_what_stands_in_the_padding_does_not_matter(spec):
    module, x = mixer(spec), tokens()
    mask = torch.ones(2, TIME, dtype=torch.bool)
    mask[1, :20] = False
    other = x.clone()
    other[1, :20] = 100.0
    assert torch.equal(module(x, attention_mask=mask)[mask], module(other, attention_mask=mask)[mask])


@pytest.mark.parametrize("spec", CAUSAL)
def test_decoding_after_a_left_padded_prompt_equals_the_prompt_alone(spec):
    module, x = mixer(spec), tokens()
    padding = 17
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, :padding] = False
    cache = module.init_cache(2)
    module(x[:, :40], attention_mask=mask, cache=cache)
    steps = torch.stack([module.step(x[:, t], cache) for t in range(40, 45)], dim=1)
    alone = module.init_cache(1)
    module(x[1:, padding:40], cache=alone)
    wanted = torch.stack([module.step(x[1:, t], alone) for t in range(40, 45)], dim=1)
    torch.testing.assert_close(steps[1:], wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(steps[:1], module(x[:1, :45])[:, 40:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("spec", "causal"), EITHER)
def test_packed_sequences_equal_each_alone(spec, causal):
    module, x = mixer(spec, causal=causal), tokens(batch=1)
    cuts = [0, 1, 1, 40, TIME]
    y = module(x, cu_seqlens=torch.tensor(cuts))
    assert y.shape == x.shape
    for start, end in ((0, 1), (1, 40), (40, TIME)):
        torch.testing.assert_close(y[:, start:end], module(x[:, start:end]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("spec", [spec for spec in BOTH_WAYS if "rope" not in spec and "conv" not in spec])
def test_without_causality_the_order_of_other_tokens_does_not_matter(spec):
    module, x = mixer(spec, causal=False), tokens()
    order = torch.randperm(TIME, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(module(x[:, order]), module(x)[:, order], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("spec", TRAINED)
@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast"])
def test_every_parameter_gets_a_finite_gradient(spec, mode):
    dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
    module, x = mixer(spec, dtype=dtype), tokens(dtype=dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        y = module(x)
    assert y.dtype == (torch.bfloat16 if mode != "float32" else torch.float32)
    y.float().square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("spec", TRAINED)
def test_bf16_stays_near_fp32(spec):
    module = mixer(spec, dtype=torch.bfloat16)
    x = tokens(dtype=torch.bfloat16)
    exact = copy.deepcopy(module).double()(x.double())
    error = (module(x).double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 0.03  # bf16 rounds to 2^-9 = 0.2 %; a handful of projections, a norm and a gate multiply that


@pytest.mark.parametrize("spec", TRAINED)
def test_a_mixer_made_on_meta_is_whole_after_reset(spec):
    module = create_mixer(spec, DIM, causal=True, depth=2, device="meta")
    assert all(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    module.to_empty(device="cpu")
    for tensor in (*module.parameters(), *module.buffers()):
        torch.nn.init.constant_(tensor, float("nan") if tensor.is_floating_point() else -1)
    torch.manual_seed(3)
    module.reset_parameters()
    direct = mixer(spec, dtype=torch.float32)
    torch.manual_seed(3)
    direct.reset_parameters()
    for (name, one), other in zip(module.state_dict().items(), direct.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    x = tokens(dtype=torch.float32)
    assert torch.equal(module.eval()(x), direct(x))


@pytest.mark.parametrize("spec", CAUSAL)
def test_an_update_of_the_cache_leaves_earlier_tensors_alone(spec):
    """So that a shallow copy of a cache is a way back (speculative decoding)."""
    module, x = mixer(spec), tokens()
    cache = module.init_cache(2)
    module(x[:, :5], cache=cache)
    kept = dict(cache)
    first = module.step(x[:, 5], cache)
    assert torch.equal(module.step(x[:, 5], kept), first)


@pytest.mark.parametrize(
    ("spec", "multiple"),
    [
        ("attention", 4),
        ("linear_attention", 4),
        ("retnet", 4),
        ("gla", 4),
        ("gla(decay=head)", 4),
        ("gated_deltanet", 4),
        ("mamba", 6),
        ("mamba2", 6),
        ("conv", 4),
        ("identity", 0),
    ],
)
def test_parameters_are_about_what_the_docstring_says(spec, multiple):
    dim = 1024
    module = create_mixer(spec, dim, causal=True, device="meta")
    count = sum(parameter.numel() for parameter in module.parameters())
    # The low-rank, short-convolution and state projections come on top: 6 % at most at this width.
    assert multiple * dim**2 <= count <= 1.06 * multiple * dim**2


@pytest.mark.parametrize("spec", TRAINED)
def test_path_names_what_runs(spec):
    assert mixer(spec).path("cpu") == ("sdpa" if spec.startswith("attention") else "reference")


def test_a_mask_over_one_new_token_is_still_a_decoding_step(monkeypatch):
    """`generate` hands its mask over with every token; the whole-sequence kernel must not run for it."""
    module, x = mixer("retnet"), tokens()
    cache = module.init_cache(2)
    module(x[:, :5], cache=cache)
    wanted = module.step(x[:, 5], dict(cache))
    monkeypatch.delattr("chela_plugin.kernels.linear_attention.linear_attention")
    y = module(x[:, 5:6], attention_mask=torch.ones(2, 1), cache=cache)
    torch.testing.assert_close(y[:, 0], wanted, rtol=0, atol=0)


@pytest.mark.parametrize("spec", TRAINED)
def test_a_padded_chunk_may_follow_a_cache(spec):
    """Rows that go on by different numbers of tokens: the shorter is padded on the left of its new chunk."""
    module, x = mixer(spec), tokens()
    cache = module.init_cache(2)
    module(x[:, :10], cache=cache)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, :4] = False
    module(x[:, 10:17], attention_mask=mask, cache=cache)
    step = module.step(x[:, 17], cache)
    short = torch.cat((x[1:, :10], x[1:, 14:18]), dim=1)
    torch.testing.assert_close(step[:1], module(x[:1, :18])[:, -1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(step[1:], module(short)[:, -1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "spec", ["attention", "linear_attention", "retnet", "gla", "gated_deltanet", "mamba", "mamba2", "conv"]
)
def test_a_mixer_exports_and_compiles_whole(spec):
    module, x = mixer(spec, dtype=torch.float32), tokens(time=9, dtype=torch.float32)
    wanted = module(x)
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), wanted)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(module, backend="aot_eager", fullgraph=True)(x), wanted)


@pytest.mark.parametrize("spec", TRAINED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_empty_cache_lies_where_the_weights_do_and_is_as_precise(spec, dtype):
    cache = mixer(spec, dtype=dtype).to("meta").init_cache(2)
    for name, tensor in cache.items():
        assert tensor.device.type == "meta", name
        if tensor.is_floating_point() or tensor.is_complex():
            assert tensor.dtype.to_real() == dtype, name


@pytest.mark.gpu
@pytest.mark.parametrize("spec", TRAINED)
def test_a_gpu_computes_what_a_cpu_computes(spec):
    module, x = mixer(spec, dtype=torch.float32), tokens(dtype=torch.float32)
    wanted = module(x)
    module, x = module.cuda(), x.cuda()
    # fp32 without tf32, which torch leaves off; kernels sum in another order.
    torch.testing.assert_close(module(x).cpu(), wanted, rtol=1e-3, atol=1e-3)
    cache = module.init_cache(2)
    parts = [module(x[:, :40], cache=cache)] + [module.step(x[:, t], cache)[:, None] for t in range(40, 44)]
    torch.testing.assert_close(torch.cat(parts, dim=1).cpu(), wanted[:, :44], rtol=1e-3, atol=1e-3)
