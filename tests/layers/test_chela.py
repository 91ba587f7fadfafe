"""The CHELA mixer: three exact forms, causality, masks, packing, folding, parameters, options."""

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F

from chela_plugin.layers import Chela
from chela_plugin.layers.long_kernel import LONG_KERNELS

GENERATORS = [*LONG_KERNELS, "none"]
PHI = {
    "silu": lambda x: x * torch.sigmoid(x),
    "identity": lambda x: x,
    "elu1": lambda x: torch.where(x > 0, x + 1, x.exp()),
    "relu": lambda x: x.clamp(min=0),
    "l2": lambda x: x / x.norm(dim=-1, keepdim=True),
}
VARIANTS = [
    {},
    {"decay": "none", "phi": "elu1"},
    {"decay": "fixed", "phi": "relu", "norm": "batch"},
    {"decay": "learned", "phi": "l2", "gate": False, "skip": False},
    {"update_gate": True, "qk_from": "x", "phi": "identity", "num_heads": 3},
]


def build(dtype=torch.float64, dim=24, causal=True, **options):
    torch.manual_seed(0)
    return Chela(dim, causal=causal, max_len=30, dtype=dtype, **options).eval()


def by_the_formula(mixer, x):
    """The mixer as its docstring states it, in quadratic form."""
    z = F.silu(mixer.conv(x))
    seen = z if mixer.qk_from == "z" else x
    heads = (mixer.num_heads, -1)
    q, k = (PHI[mixer.phi](layer(seen).unflatten(-1, heads)) for layer in (mixer.q, mixer.k))
    v = F.silu(mixer.v(x)).unflatten(-1, heads)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * mixer.key_dim**-0.5
    tokens = x.shape[1]
    if mixer.causal:
        log_decay = mixer.log_decay(x)
        log_decay = torch.zeros(mixer.num_heads, dtype=x.dtype) if log_decay is None else log_decay.to(x.dtype)
        g = log_decay.expand(x.shape[0], tokens, mixer.num_heads).cumsum(1).transpose(1, 2)  # [B, H, T]
        seen_before = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        scores = scores * (g[..., :, None] - g[..., None, :]).masked_fill(~seen_before, -torch.inf).exp()
    o = torch.einsum("bhts,bshv->bthv", scores, v)
    if mixer.skip is not None:
        o = o + mixer.skip[:, None] * v
    y = (F.rms_norm(o, o.shape[-1:], eps=1e-5) * mixer.head_norm).flatten(-2)
    y = mixer.proj(y if mixer.g is None else y * F.silu(mixer.g(z)))
    if mixer.u is None:
        return y
    u = torch.sigmoid(mixer.u(z))
    return u * y + (1 - u) * x


@pytest.mark.parametrize("options", [*VARIANTS, {"causal": False}, {"causal": False, "norm": "scale", "phi": "relu"}])
def test_the_parallel_form_is_the_formula_with_all_gradients(options):
    mixer = build(**options)
    x = torch.randn(2, 37, 24, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 37, 24, dtype=torch.float64)
    inputs = [x, *(p for p in mixer.parameters())]
    found = torch.autograd.grad((mixer(x) * weight).sum(), inputs, allow_unused=True)
    expected = torch.autograd.grad((by_the_formula(mixer, x) * weight).sum(), inputs, allow_unused=True)
    torch.testing.assert_close(mixer(x), by_the_formula(mixer, x), rtol=1e-10, atol=1e-10)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


# The same sums over up to 41 tokens in another order, at the rounding of each dtype.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize("options", [{"long": name} for name in GENERATORS] + VARIANTS[1:])
def test_chunks_and_steps_equal_the_parallel_form(dtype, tolerance, options):
    mixer = build(dtype, **options)
    x = torch.randn(2, 41, 24, dtype=dtype)
    whole = mixer(x)
    cache = mixer.init_cache(2, dtype=dtype)
    parts = [mixer(part, cache=cache) for part in x.split([9, 1, 17, 2, 12], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=tolerance)
    cache = mixer.init_cache(2, dtype=dtype)
    steps = torch.stack([mixer.step(x[:, t], cache) for t in range(41)], 1)
    torch.testing.assert_close(steps, whole, rtol=0, atol=tolerance)
    assert all(len(entry) == 2 for entry in cache.values()), "beam search reorders every entry along dim 0"


@pytest.mark.parametrize("long", GENERATORS)
@pytest.mark.parametrize("tokens", [33, 61])
def test_future_tokens_do_not_change_the_past(long, tokens):
    mixer = build(torch.float32, long=long)
    x = torch.randn(1, tokens, 24)
    later = x.clone()
    later[:, 19:] = 100 * torch.randn_like(later[:, 19:])
    assert torch.equal(mixer(x)[:, :19], mixer(later)[:, :19])


def test_through_an_fft_the_future_stays_out_up_to_its_rounding():
    mixer = build(torch.float64, long="implicit")
    x = torch.randn(1, 401, 24, dtype=torch.float64)
    later = x.clone()
    later[:, 200:] = torch.randn_like(later[:, 200:])
    torch.testing.assert_close(mixer(x)[:, :200], mixer(later)[:, :200], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("options", [{}, {"long": "modal", "decay": "learned"}, {"causal": False, "norm": "scale"}])
def test_a_padded_row_equals_the_row_alone(left, options):
    mixer = build(**options)
    row = torch.randn(1, 13, 24, dtype=torch.float64)
    noise = torch.randn(1, 8, 24, dtype=torch.float64)
    mask = torch.ones(1, 13)
    padded, padded_mask = ([noise, row], [0 * mask[:, :8], mask]) if left else ([row, noise], [mask, 0 * mask[:, :8]])
    y = mixer(torch.cat(padded, 1), attention_mask=torch.cat(padded_mask, 1))
    torch.testing.assert_close(y[:, 8:] if left else y[:, :13], mixer(row), rtol=0, atol=1e-10)


def test_a_left_padded_prompt_leaves_the_same_cache_for_decoding():
    mixer = build()
    row, after = torch.randn(1, 13, 24, dtype=torch.float64), torch.randn(1, 24, dtype=torch.float64)
    padded = torch.cat([torch.randn(1, 5, 24, dtype=torch.float64), row], 1)
    mask = torch.tensor([[0] * 5 + [1] * 13])
    alone, beside = mixer.init_cache(1, dtype=torch.float64), mixer.init_cache(1, dtype=torch.float64)
    mixer(row, cache=alone)
    mixer(padded, attention_mask=mask, cache=beside)
    torch.testing.assert_close(mixer.step(after, beside), mixer.step(after, alone), rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [{"long": name} for name in GENERATORS] + VARIANTS[1:])
def test_rows_of_a_batch_may_go_on_by_different_numbers_of_tokens(options):
    mixer = build(**options)
    rows, cache = torch.randn(2, 20, 24, dtype=torch.float64), mixer.init_cache(2, dtype=torch.float64)
    mixer(rows[:, :9], cache=cache)
    new = rows[:, 9:15].clone()
    new[1] = torch.cat([torch.randn(4, 24, dtype=torch.float64), rows[1, 9:11]])  # the second goes on by two
    mask = torch.tensor([[1] * 6, [0] * 4 + [1] * 2])
    y = mixer(new, attention_mask=mask, cache=cache)
    torch.testing.assert_close(y[:1], mixer(rows[:1, :15])[:, 9:], rtol=0, atol=1e-10)
    torch.testing.assert_close(y[1:, 4:], mixer(rows[1:, :11])[:, 9:], rtol=0, atol=1e-10)
    step = mixer.step(torch.stack([rows[0, 15], rows[1, 11]]), cache)
    torch.testing.assert_close(step[:1], mixer(rows[:1, :16])[:, -1], rtol=0, atol=1e-10)
    torch.testing.assert_close(step[1:], mixer(rows[1:, :12])[:, -1], rtol=0, atol=1e-10)


def test_packed_sequences_equal_each_alone():
    mixer = build()
    x = torch.randn(1, 30, 24, dtype=torch.float64)
    y = mixer(x, cu_seqlens=torch.tensor([0, 1, 12, 30]))
    for a, b in ((0, 1), (1, 12), (12, 30)):
        torch.testing.assert_close(y[:, a:b], mixer(x[:, a:b]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"norm": "batch"}, {"causal": False}, {"causal": False, "dims": 2}])
def test_reparameterize_changes_nothing_but_the_parameters(options):
    mixer = build(torch.float32, **options)
    x = torch.randn(2, 36, 24)
    grid = (4, 9) if options.get("dims") == 2 else None
    merged = copy.deepcopy(mixer).reparameterize()
    # fp32: branches summed before the convolution instead of after it.
    torch.testing.assert_close(merged(x, grid=grid), mixer(x, grid=grid), rtol=0, atol=1e-5)


@pytest.mark.parametrize("phi", PHI)
def test_a_whole_mixer_can_be_pickled(phi):
    mixer, x = build(phi=phi), torch.randn(1, 9, 24, dtype=torch.float64)
    assert torch.equal(pickle.loads(pickle.dumps(mixer))(x), mixer(x))


@pytest.mark.parametrize("dim", [192, 384, 768, 1024])
@pytest.mark.parametrize("options", [{"causal": True}, {"causal": False}, {"causal": False, "dims": 2}])
def test_parameters_stay_within_2_percent_of_attention(dim, options):
    mixer = Chela(dim, **options, device="meta")
    assert abs(sum(p.numel() for p in mixer.parameters()) / (4 * dim * dim) - 1) <= 0.02
    if dim >= 512:
        assert mixer.key_dim >= 64 or options.get("dims") == 2


@pytest.mark.parametrize("options", [{"long": name} for name in LONG_KERNELS] + [{"update_gate": True}])
def test_every_option_keeps_the_parameters(options):
    mixer = Chela(768, causal=True, **options, device="meta")
    assert abs(sum(p.numel() for p in mixer.parameters()) / (4 * 768 * 768) - 1) <= 0.02


def test_bf16_runs_forward_and_backward():
    mixer = build(torch.bfloat16).train()
    x = torch.randn(2, 33, 24, dtype=torch.bfloat16, requires_grad=True)
    y = mixer(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "24 is not divisible by num_heads 5"),
        ({"head_dim": 7}, "24 is not divisible by head_dim 7"),
        ({"num_heads": 0}, "num_heads must be at least 1"),
        ({"num_heads": -1}, "num_heads must be at least 1"),
        ({"head_dim": 0}, "head_dim must be at least 1"),
        ({"key_dim": -2}, "key_dim must be at least 1"),
        ({"key_dim": 300}, "at most 256 wide, here key_dim is 300"),
        ({"dim": 512, "num_heads": 1}, "at most 256 wide, .* head_dim 512"),
        ({"group_size": 0}, "group_size and max_len are at least 1, got 0"),
        ({"causal": False, "decay": "data"}, "decay=none"),
        ({"phi": "cosine"}, "silu, identity"),
        ({"dims": 2}, "no causal form"),
    ],
)
def test_bad_options_are_one_clear_error(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"x": torch.zeros(1, 4, 23)}, r"\[B, T, 24\]"),
        ({"grid": (2, 2)}, "without grid"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, r"\[B, T\]"),
        ({"attention_mask": torch.ones(1, 4), "cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens goes without"),
        ({"x": torch.zeros(2, 4, 24), "cu_seqlens": torch.tensor([0, 4])}, "batch of 1"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "from 0 to T = 4"),
    ],
)
def test_bad_calls_are_one_clear_error(call, message):
    mixer = build(torch.float32)
    with pytest.raises(ValueError, match=message):
        mixer(call.pop("x", torch.zeros(1, 4, 24)), **call)


def test_a_two_sided_mixer_has_no_cache():
    with pytest.raises(ValueError, match="causal=False"):
        build(torch.float32, causal=False)(torch.zeros(1, 4, 24), cache={})
