"""What holds for every op at any shape, memory order, cut and split, and what torch asks of operators.

tests/kernels pins each op's definition at chosen sizes; here hypothesis chooses. fp64 and small shapes throughout: a
property that holds to 1e-9 there can't hide behind rounding.
"""

import functools
import importlib
import os
import pkgutil
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chela_plugin import create_mixer, kernels
from chela_plugin.kernels.gated_delta_rule import gated_delta_rule, gated_delta_rule_step
from chela_plugin.kernels.gated_delta_rule import reference as delta_reference
from chela_plugin.kernels.gated_linear_attention import gated_linear_attention, gated_linear_attention_step
from chela_plugin.kernels.gated_linear_attention import reference as gated_reference
from chela_plugin.kernels.linear_attention import linear_attention, linear_attention_step
from chela_plugin.kernels.long_conv import long_conv
from chela_plugin.kernels.selective_scan import selective_scan, selective_scan_step

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="these are about plain PyTorch")

EXACT = {"rtol": 1e-9, "atol": 1e-9}  # fp64 sums of some hundred terms of order 1 in another order
CI = settings(max_examples=100, deadline=None)  # 2,000 in the nightly mode


def draw(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def decay(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """From none to nearly all: the product of a hundred of them underflows for some, stays near 1 for others."""
    return -(10.0 ** (4 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 3))


def linear_attention_case(g, B, T, H, K, V):
    return (draw(g, B, T, H, K), draw(g, B, T, H, K), draw(g, B, T, H, V), decay(g, B, T, H))


def delta_case(g, B, T, H, K, V):
    k = torch.nn.functional.normalize(draw(g, B, T, H, K), dim=-1)
    return (draw(g, B, T, H, K), k, draw(g, B, T, H, V), draw(g, B, T, H).sigmoid(), decay(g, B, T, H))


def gated_case(g, B, T, H, K, V):
    return (draw(g, B, T, H, K), draw(g, B, T, H, K), draw(g, B, T, H, V), decay(g, B, T, H, K))


def scan_case(g, B, T, H, K, V):
    return (draw(g, B, T, H), draw(g, B, T, H).exp(), decay(g, H, K), draw(g, B, T, K), draw(g, B, T, K))


def state_of(g, name, B, H, K, V):
    return draw(g, B, H, K) if name == "selective_scan" else draw(g, B, H, K, V)


# name: the op, its step with the arguments in the op's own order, its inputs, and which of them have a time axis
OPS = {
    "linear_attention": (
        linear_attention,
        lambda q, k, v, d, state: linear_attention_step(q, k, v, state, d),
        linear_attention_case,
        (0, 1, 2, 3),
    ),
    "gated_linear_attention": (
        gated_linear_attention,
        lambda q, k, v, d, state: gated_linear_attention_step(q, k, v, state, d),
        gated_case,
        (0, 1, 2, 3),
    ),
    "gated_delta_rule": (
        gated_delta_rule,
        lambda q, k, v, b, d, state: gated_delta_rule_step(q, k, v, state, b, d),
        delta_case,
        (0, 1, 2, 3, 4),
    ),
    "selective_scan": (selective_scan, selective_scan_step, scan_case, (0, 1, 3, 4)),
}

SIZES = {
    "seed": st.integers(0, 2**16),
    "B": st.integers(1, 3),
    "T": st.integers(1, 140) | st.sampled_from([31, 32, 33, 63, 64, 65, 127, 128, 129]),
    "H": st.integers(1, 3),
    "K": st.integers(1, 9),
    "V": st.integers(1, 9),
}
NAMES = pytest.mark.parametrize("name", OPS)


def case(name, seed, B, T, H, K, V):
    g = torch.Generator().manual_seed(seed)
    op, step, inputs, timed = OPS[name]
    return op, step, inputs(g, B, T, H, K, V), timed, state_of(g, name, B, H, K, V)


@NAMES
@given(cut=st.floats(0, 1), **SIZES)
@CI
def test_a_sequence_in_two_calls_is_the_sequence_in_one(name, cut, **sizes):
    """Cache splits: the state that the first call returns is all that the second one needs."""
    op, _, inputs, timed, state = case(name, **sizes)
    whole, final = op(*inputs, initial_state=state, output_final_state=True)
    at = round(cut * (sizes["T"] - 1)) or 1
    outputs, now = [], state
    for part in (slice(0, at), slice(at, None)):
        pieces = [x[:, part] if i in timed else x for i, x in enumerate(inputs)]
        if pieces[0].shape[1]:
            o, now = op(*pieces, initial_state=now, output_final_state=True)
            outputs.append(o)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, **EXACT)
    torch.testing.assert_close(now, final, **EXACT)


@NAMES
@given(**(SIZES | {"T": st.integers(1, 12)}))
@CI
def test_token_by_token_is_the_whole_sequence(name, **sizes):
    op, step, inputs, timed, state = case(name, **sizes)
    whole, final = op(*inputs, initial_state=state, output_final_state=True)
    now = state
    for t in range(sizes["T"]):
        o, now = step(*(x[:, t] if i in timed else x for i, x in enumerate(inputs)), now)
        torch.testing.assert_close(o, whole[:, t], **EXACT)
    torch.testing.assert_close(now, final, **EXACT)


def in_another_order(x: torch.Tensor, how: str) -> torch.Tensor:
    """The same values with other strides."""
    if how == "reversed":  # the last axis in memory is the first
        return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
    if how == "strided":  # every other element of something larger, behind an offset
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"))
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if how == "time first":
        return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 2 else x
    return x.clone()


@NAMES
@given(
    orders=st.lists(st.sampled_from(["reversed", "strided", "time first", "plain"]), min_size=6, max_size=6), **SIZES
)
@CI
def test_strides_do_not_change_outputs_or_gradients(name, orders, **sizes):
    op, _, inputs, _, state = case(name, **sizes)

    def run(tensors):
        leaves = [x.detach().requires_grad_() for x in tensors]
        assert [x.stride() for x in leaves] == [x.stride() for x in tensors]
        o, final = op(*leaves[:-1], initial_state=leaves[-1], output_final_state=True)
        return o, final, *torch.autograd.grad((o.square().sum() + final.square().sum()), leaves)

    plain = run([*inputs, state])
    other = run([in_another_order(x, how) for x, how in zip([*inputs, state], orders, strict=False)])
    for wanted, got in zip(plain, other, strict=True):
        # relative to the gradient's own size: deltas of exp(randn) make some gradients large
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9 * (1 + wanted.detach().abs().max().item()))


@NAMES
@given(**(SIZES | {"T": st.integers(1, 70)}))
@CI
def test_expanded_rows_equal_copied_ones(name, **sizes):
    """One sequence seen as a batch through a stride of 0."""
    op, _, inputs, timed, _ = case(name, **(sizes | {"B": 1}))
    expanded = [x.expand(3, *x.shape[1:]) if i in timed else x for i, x in enumerate(inputs)]
    one, _ = op(*inputs)
    torch.testing.assert_close(op(*expanded)[0], one.expand(3, *one.shape[1:]), **EXACT)


@NAMES
@given(**(SIZES | {"T": st.integers(1, 70)}))
@CI
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_stays_within_its_rounding_of_fp64(name, dtype, **sizes):
    op, _, inputs, _, _ = case(name, **sizes)
    rounded = [x.to(dtype) for x in inputs]
    o, state = op(*rounded, output_final_state=True)
    exact, exact_state = op(*(x.double() for x in rounded), output_final_state=True)
    assert o.dtype == dtype and state.dtype == torch.float32
    # Computed in fp32 and rounded once: one unit of the output's own precision; and fp32's over 70 terms of order 1,
    # which may cancel to less, under decays whose exponents are sums of up to 700, good to eps times that.
    own, fp32 = torch.finfo(dtype), torch.finfo(torch.float32)
    size, state_size = exact.abs().max(), exact_state.abs().max()
    assert (o.double() - exact).abs().max() <= own.eps * size + 200 * fp32.eps * size.clamp(min=1) + own.tiny
    assert (state.double() - exact_state).abs().max() <= 700 * fp32.eps * state_size.clamp(min=1)


CUTS = st.lists(st.integers(0, 90), max_size=5).map(lambda inner: [0, *sorted(inner), 90])


@given(cuts=CUTS, causal=st.booleans(), with_decay=st.booleans(), seed=st.integers(0, 2**16))
@CI
def test_any_cuts_make_sequences_that_do_not_see_each_other(cuts, causal, with_decay, seed):
    g = torch.Generator().manual_seed(seed)
    q, k, v, d = linear_attention_case(g, 1, 90, 2, 4, 3)
    d = d if causal and with_decay else None
    o, _ = linear_attention(q, k, v, d, causal=causal, cu_seqlens=torch.tensor(cuts))
    taps = draw(g, 3, 11 if causal else 21)
    y = long_conv(v[:, :, 0], taps, causal=causal, cu_seqlens=torch.tensor(cuts))
    for a, b in pairwise(cuts):
        if a < b:
            alone, _ = linear_attention(
                *(x[:, a:b] for x in (q, k, v)), None if d is None else d[:, a:b], causal=causal
            )
            torch.testing.assert_close(o[:, a:b], alone, **EXACT)
            torch.testing.assert_close(y[:, a:b], long_conv(v[:, a:b, 0], taps, causal=causal), **EXACT)


@given(
    T=st.integers(1, 60),
    L=st.integers(1, 80),
    D=st.integers(1, 4),
    causal=st.booleans(),
    seed=st.integers(0, 2**16),
    how=st.sampled_from(["reversed", "strided", "time first", "expanded"]),
)
@CI
def test_the_long_convolution_is_the_sum_over_lags_in_any_memory_order(T, L, D, causal, seed, how):
    g = torch.Generator().manual_seed(seed)
    x, taps = draw(g, 2, T, D), draw(g, D, L if causal else 2 * L - 1)
    if how == "expanded":
        x = x[:1].expand(2, T, D)
    seen = in_another_order(x, how).requires_grad_() if how != "expanded" else x
    lags = range(L) if causal else range(-(L - 1), L)
    wanted = torch.zeros(2, T, D, dtype=torch.float64)
    for i, lag in enumerate(lags):
        for t in range(max(0, lag), min(T, T + lag)):
            wanted[:, t] += taps[:, i] * x[:, t - lag]
    torch.testing.assert_close(long_conv(seen, taps, causal=causal), wanted, **EXACT)


@functools.lru_cache
def built(spec: str):
    torch.manual_seed(0)
    return create_mixer(spec, 16, causal=True, depth=2, dtype=torch.float64).eval()


SPECS = ["chela", "chela(long=modal)", "attention", "gla", "gated_deltanet", "mamba", "mamba2", "retnet", "conv"]


@pytest.mark.parametrize("spec", SPECS)
@given(splits=st.lists(st.integers(1, 40), max_size=4), T=st.integers(1, 70), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)  # nine mixers; 2,000 each in the nightly mode
def test_any_split_of_a_prompt_over_a_cache_is_the_prompt_in_one_piece(spec, splits, T, seed):
    module = built(spec)
    x = torch.randn(2, T, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cuts = [0, *sorted({s for s in splits if s < T}), T]
    with torch.no_grad():
        cache = module.init_cache(2, dtype=torch.float64)
        parts = [module(x[:, a:b], cache=cache) for a, b in pairwise(cuts)]
        torch.testing.assert_close(torch.cat(parts, 1), module(x), rtol=1e-8, atol=1e-8)


@NAMES
def test_the_gradient_of_every_input_and_of_the_state_passes_gradcheck(name, monkeypatch):
    for reference in (gated_reference, delta_reference):
        if hasattr(reference, "CHUNK"):
            monkeypatch.setattr(reference, "CHUNK", 4)  # so that a short sequence crosses chunks
    g = torch.Generator().manual_seed(0)
    op, _, inputs, _ = OPS[name]
    tensors = [x.requires_grad_() for x in inputs(g, 1, 6, 2, 3, 2)]
    state = state_of(g, name, 1, 2, 3, 2).requires_grad_()

    def run(*leaves):
        return op(*leaves[:-1], initial_state=leaves[-1], output_final_state=True)

    assert torch.autograd.gradcheck(run, (*tensors, state), atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_the_gradient_of_the_long_convolution_passes_gradcheck(causal):
    g = torch.Generator().manual_seed(0)
    x, taps, bias = (draw(g, *shape).requires_grad_() for shape in ((2, 6, 2), (2, 5), (2,)))
    assert torch.autograd.gradcheck(lambda *leaves: long_conv(*leaves, causal=causal), (x, taps, bias))


def operators() -> dict[str, set[tuple[str, str]]]:
    """Every `chela::` operator that torch knows once all of kernels/ is imported: (its folder, its name there) each."""
    schemas = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("chela::")}
    places: dict[str, set[tuple[str, str]]] = {name: set() for name in schemas}
    for found in pkgutil.walk_packages(kernels.__path__, "chela_plugin.kernels."):
        folder, stem = found.name.split(".")[-2:]
        if stem.startswith("ops"):
            for attribute, value in vars(importlib.import_module(found.name)).items():
                overload = getattr(value, "_opoverload", value)  # of what `custom_op` returns
                if isinstance(overload, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
                    name = "::".join(str(overload).split(".")[:2])
                    places.setdefault(name, set()).add((folder, f"{stem}.{attribute}"))
    return places


def test_every_operator_is_checked_with_opcheck_somewhere():
    """`torch.library.opcheck` needs inputs of each operator's own; this names the operators that no test gives any."""
    checked = set()
    for file in Path(__file__).parents[1].rglob("test_*.py"):
        text = file.read_text(encoding="utf-8")
        folders = re.findall(r"chela_plugin\.kernels\.(\w+)", text)
        for name in re.findall(r"opcheck\(\s*([\w.]+?)(?:\.default)?,", text):
            checked |= {(folder, name) for folder in folders}
    found = operators()
    unchecked = [name for name, places in found.items() if not checked & places]
    assert len(found) >= 10 and not unchecked, unchecked
