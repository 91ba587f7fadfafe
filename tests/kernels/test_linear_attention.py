"""Linear attention in plain PyTorch: its forms against each other, its edges, and the errors for bad input."""

import math
import os
import re
from itertools import pairwise

import pytest
import torch
from compiled import compiled_for_hopper
from hypothesis import given, settings
from hypothesis import strategies as st

from chela_plugin.kernels.linear_attention import configs, linear_attention, linear_attention_step, reference

# Bidirectional attention has no decay.
VARIANTS = [(None, True), ("static", True), ("token", True), (None, False)]
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="these are about plain PyTorch")

EXACT = {"rtol": 1e-10, "atol": 1e-10}  # fp64 sums of some hundred terms of order 1 in another order


def case(batch=2, time=131, heads=3, K=8, V=5, decay=None, dtype=torch.float64, seed=0, strength=0.3):
    """q, k, v, log_decay, initial state."""
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(batch, time, heads, K, generator=g, dtype=torch.float64).to(dtype) for _ in "qk")
    v = torch.randn(batch, time, heads, V, generator=g, dtype=torch.float64).to(dtype)
    shape = {None: None, "static": (heads,), "token": (batch, time, heads)}[decay]
    log_decay = None if shape is None else (-strength * torch.rand(shape, generator=g, dtype=torch.float64)).to(dtype)
    state = torch.randn(batch, heads, K, V, generator=g, dtype=torch.float64)
    return q, k, v, log_decay, state.to(torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("decay", [None, "static", "token"])
@pytest.mark.parametrize("time", [1, 63, 64, 65, 131])
@pytest.mark.parametrize("with_state", [False, True])
def test_recurrent_quadratic_and_chunked_forms_agree(decay, time, with_state):
    q, k, v, log_decay, state = case(time=time, decay=decay)
    first = state if with_state else None
    wanted, wanted_state = reference.recurrent(q, k, v, log_decay, 0.7, first)
    o, final = linear_attention(q, k, v, log_decay, scale=0.7, initial_state=first, output_final_state=True)
    torch.testing.assert_close(o, wanted, **EXACT)
    torch.testing.assert_close(final, wanted_state, **EXACT)
    torch.testing.assert_close(reference.quadratic(q, k, v, log_decay, 0.7, first), wanted, **EXACT)


@pytest.mark.parametrize("decay", [None, "static", "token"])
def test_gradients_of_every_input_through_both_outputs(decay, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 4)
    inputs = [x if x is None else x.requires_grad_() for x in case(batch=1, time=9, heads=2, K=3, V=2, decay=decay)]

    def run(q, k, v, log_decay, state):
        return linear_attention(q, k, v, log_decay, initial_state=state, output_final_state=True)

    assert torch.autograd.gradcheck(run, inputs)


def test_gradients_of_the_bidirectional_form():
    q, k, v, _, state = (x if x is None else x.requires_grad_() for x in case(batch=2, time=5, heads=2, K=3, V=2))
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]])

    def run(q, k, v, state):
        return linear_attention(q, k, v, causal=False, initial_state=state, output_final_state=True, mask=mask)

    assert torch.autograd.gradcheck(run, (q, k, v, state))


@pytest.mark.parametrize("decay", [None, "static", "token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_future_tokens_do_not_change_the_last_bit_of_the_past(decay, dtype):
    q, k, v, log_decay, _ = case(decay=decay, dtype=dtype)
    before = linear_attention(q, k, v, log_decay)[0]
    for t in (1, 63, 64, 100, 130):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, t:] += 1000 * torch.randn_like(x[:, t:])
        d = log_decay
        if decay == "token":
            d = log_decay.clone()
            d[:, t:] *= 3
        assert torch.equal(linear_attention(*changed, d)[0][:, :t], before[:, :t])


def test_every_token_sees_every_token_without_causality():
    q, k, v, _, state = case()
    o, final = linear_attention(q, k, v, causal=False, scale=0.5, initial_state=state, output_final_state=True)
    scores = torch.einsum("bthk,bshk->bhts", q, k)
    wanted = torch.einsum("bhts,bshv->bthv", scores, v) + torch.einsum("bthk,bhkv->bthv", q, state)
    torch.testing.assert_close(o, 0.5 * wanted, **EXACT)
    torch.testing.assert_close(final, torch.einsum("bshk,bshv->bhkv", k, v) + state, **EXACT)


@pytest.mark.parametrize(("decay", "causal"), VARIANTS)
def test_masked_tokens_might_as_well_not_be_there(decay, causal):
    q, k, v, log_decay, _ = case(batch=1, decay=decay)
    mask = torch.rand(1, q.shape[1], generator=torch.Generator().manual_seed(1)) > 0.3
    o, state = linear_attention(q, k, v, log_decay, causal=causal, mask=mask, output_final_state=True)
    kept = [x[:, mask[0]] for x in (q, k, v)]
    d = log_decay[:, mask[0]] if decay == "token" else log_decay
    alone, alone_state = linear_attention(*kept, d, causal=causal, output_final_state=True)
    torch.testing.assert_close(o[:, mask[0]], alone, **EXACT)
    torch.testing.assert_close(state, alone_state, **EXACT)


@pytest.mark.parametrize(("decay", "causal"), VARIANTS)
def test_packed_sequences_do_not_see_each_other(decay, causal):
    q, k, v, log_decay, _ = case(batch=1, decay=decay)
    cuts = [0, 1, 1, 70, 131]
    states = torch.randn(4, *case()[4].shape[1:], dtype=torch.float64)
    options = {"causal": causal, "output_final_state": True}
    o, final = linear_attention(q, k, v, log_decay, initial_state=states, cu_seqlens=torch.tensor(cuts), **options)
    for n, (start, end) in enumerate(pairwise(cuts)):
        if start == end:
            assert torch.equal(final[n], states[n])
            continue
        parts = [x[:, start:end] for x in (q, k, v)]
        d = log_decay[:, start:end] if decay == "token" else log_decay
        alone, state = linear_attention(*parts, d, initial_state=states[n : n + 1], **options)
        torch.testing.assert_close(o[:, start:end], alone, **EXACT)
        torch.testing.assert_close(final[n : n + 1], state, **EXACT)


@pytest.mark.parametrize("decay", [None, "static", "token"])
def test_prefill_in_pieces_and_steps_equal_the_whole(decay):
    q, k, v, log_decay, state = case(decay=decay)
    wanted, wanted_state = linear_attention(q, k, v, log_decay, initial_state=state, output_final_state=True)
    out = []
    for start, end in ((0, 100), (100, 128)):
        d = log_decay[:, start:end] if decay == "token" else log_decay
        parts = (x[:, start:end] for x in (q, k, v))
        o, state = linear_attention(*parts, d, initial_state=state, output_final_state=True)
        out.append(o)
    for t in range(128, 131):
        d = log_decay[:, t] if decay == "token" else log_decay
        o, state = linear_attention_step(q[:, t], k[:, t], v[:, t], state, d)
        out.append(o[:, None])
    torch.testing.assert_close(torch.cat(out, 1), wanted, **EXACT)
    torch.testing.assert_close(state, wanted_state, **EXACT)


@pytest.mark.parametrize("value", [-math.inf, -1e30, -300.0])
def test_a_decay_that_forgets_everything_starts_anew(value):
    q, k, v, log_decay, state = case(decay="token", dtype=torch.float32)
    log_decay[:, 40] = value
    inputs = [x.requires_grad_() for x in (q, k, v, log_decay, state)]
    o, _ = linear_attention(*inputs[:4], initial_state=state)
    fresh = linear_attention(q[:, 40:], k[:, 40:], v[:, 40:], log_decay[:, 40:])[0]
    torch.testing.assert_close(o[:, 40:], fresh, rtol=1e-4, atol=1e-4)  # fp32, other chunks
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(o.sum(), inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_summed_in_fp32(dtype):
    q, k, v, log_decay, _ = case(time=300, decay="token", dtype=dtype)
    o, state = linear_attention(q, k, v, log_decay, output_final_state=True)
    assert o.dtype == dtype and state.dtype == torch.float32
    exact = linear_attention(*(x.double() for x in (q, k, v, log_decay)))[0]
    # Half of the last place of the output's dtype, and for fp32 the sum's own rounding.
    tolerance = {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 1e-6}[dtype]
    assert float((o.double() - exact).norm() / exact.norm()) < tolerance


@pytest.mark.parametrize("causal", [True, False])
def test_autocast_does_not_round_the_states(causal):
    q, k, v, log_decay, state = case(time=100, decay="token", dtype=torch.bfloat16)
    decay = log_decay.float() if causal else None
    options = {"causal": causal, "initial_state": state, "output_final_state": True}
    one = [None if decay is None else decay[:, 0]]

    def run():
        step = linear_attention_step(q[:, 0], k[:, 0], v[:, 0], state, *one)
        return *linear_attention(q, k, v, decay, **options), *step

    wanted = run()
    with torch.autocast("cpu", torch.bfloat16):
        found = run()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    time=st.integers(1, 200),
    heads=st.integers(1, 3),
    K=st.integers(1, 20),
    V=st.integers(1, 20),
    decay=st.sampled_from([None, "static", "token"]),
    strength=st.sampled_from([0.01, 1.0, 50.0]),
)
def test_any_shape(batch, time, heads, K, V, decay, strength):
    q, k, v, log_decay, state = case(batch, time, heads, K, V, decay, strength=strength)
    wanted, wanted_state = reference.recurrent(q, k, v, log_decay, K**-0.5, state)
    o, final = linear_attention(q, k, v, log_decay, initial_state=state, output_final_state=True)
    torch.testing.assert_close(o, wanted, **EXACT)
    torch.testing.assert_close(final, wanted_state, **EXACT)


def test_the_table_has_blocks_for_every_call():
    for decay in (0, 1, 2):
        for width in (1, 16, 33, 64, 100, 128, 256):
            for pairs in (1, 127, 128, 10_000):
                for size in (2, 4):
                    for kernel in ("forward", "backward", "gather"):
                        assert configs.blocks_for(kernel, width, 16, size, decay, pairs).chunk >= 16
                    for kernel in ("bidirectional", "read"):
                        assert configs.blocks_for(kernel, 16, width, size, False).chunk >= 16


def test_segments_cover_the_sequence_and_only_long_ones_are_cut():
    for time in (1, 2047, 2048, 5000, 1_048_576):
        for heads in (1, 16, 96):
            for size in (
                configs.segment_size(1, heads, time, 1),
                configs.bidirectional_segment_size(1, heads, time, 64),
            ):
                assert size == time or (time >= 2048 and size >= 1024 and size % 256 == 0)
                assert -(-time // size) * heads <= 2 * configs.TARGET_PROGRAMS


def bad(name, message, **changes):
    return pytest.param(changes, message, id=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        bad("three dims", r"must be \[B, T, H, width\]", q=torch.zeros(2, 6, 4)),
        bad("q and k differ", "q and k must have one shape", k=torch.zeros(2, 6, 3, 5)),
        bad("v is shorter", "v must agree with q", v=torch.zeros(2, 5, 3, 4)),
        bad("no tokens", "no tokens", q=torch.zeros(2, 0, 3, 4), k=torch.zeros(2, 0, 3, 4), v=torch.zeros(2, 0, 3, 4)),
        bad("K above 256", "K must be 1 to 256", q=torch.zeros(2, 6, 3, 257), k=torch.zeros(2, 6, 3, 257)),
        bad("V above 256", "V must be 1 to 256", v=torch.zeros(2, 6, 3, 300)),
        bad("dtypes differ", "one floating-point dtype", v=torch.zeros(2, 6, 3, 4, dtype=torch.bfloat16)),
        bad("integers", "one floating-point dtype", **{n: torch.zeros(2, 6, 3, 4, dtype=torch.int64) for n in "qkv"}),
        bad("decay above 0", "at most 0", log_decay=torch.full((3,), 0.1)),
        bad("decay's shape", "log_decay must be", log_decay=torch.zeros(2, 6)),
        bad("decay's dtype", "log_decay must be", log_decay=torch.zeros(3, dtype=torch.float64)),
        bad("decay both ways", "needs causal=True", log_decay=torch.zeros(3), causal=False),
        bad("state's shape", "state must have shape", initial_state=torch.zeros(2, 3, 5, 4)),
        bad("state's dtype", "state must be torch.float32", initial_state=torch.zeros(2, 3, 4, 4).bfloat16()),
        bad("mask's dtype", "mask must be bool", mask=torch.ones(2, 6)),
        bad("scale 0", "scale must be finite and not 0", scale=0.0),
        bad("cuts with a batch", "batch of 1", cu_seqlens=torch.tensor([0, 6])),
    ],
)
def test_bad_input_is_one_clear_error(changes, message):
    arguments = {n: torch.zeros(2, 6, 3, 4) for n in "qkv"} | changes
    with pytest.raises(ValueError, match=message):
        linear_attention(**arguments)


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        ([1, 6], "from 0 to T"),
        ([0, 5], "from 0 to T"),
        ([0, 4, 3, 6], "must not decrease"),
        ([6], "at least two"),
        (6, "at least two"),
    ],
)
def test_bad_cuts_are_one_clear_error(cuts, message):
    x = torch.zeros(1, 6, 3, 4)
    with pytest.raises(ValueError, match=message):
        linear_attention(x, x, x, cu_seqlens=torch.tensor(cuts))


def test_step_refuses_what_is_not_one_token():
    x = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match="one token"):
        linear_attention_step(x[:, None], x[:, None], x[:, None], torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="needs a state"):
        linear_attention_step(x, x, x, None)


@pytest.mark.parametrize("heads", [1, None])
def test_the_decay_gradients_kernel_compiles_for_any_number_of_heads(heads):
    """One head is a constant of the compiled form, a plain int to the kernel's code; the interpreter has none such."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("nothing is compiled in this process")
    from chela_plugin.kernels.linear_attention import triton as kernels

    constants = {"K_COLUMNS": 2, "PARTS": 1, "BLOCK": 128, "VARLEN": False, "TABLE": False}
    constants |= {} if heads is None else {"H": heads}
    types = dict.fromkeys(("dots", "inner", "log_decay", "out"), "*fp32") | {"cuts": "*i64"}
    assert compiled_for_hopper(kernels.decay_gradient, constants, types).asm["ptx"]


def products_in_branches(ttgir: str) -> list[tuple[str, int]]:
    """Tiles that products inside a branch of a loop read from shared memory, and how many buffers each has; 0 where the
    branch itself loads it."""
    buffers: dict[str, tuple[str, int]] = {}  # by name: the allocation and its buffers
    regions: list[str] = []
    found = []
    for line in ttgir.splitlines():
        text = line.strip()
        if text.startswith("}"):
            regions.pop()
        branch = "scf.for" in regions and "scf.if" in regions[regions.index("scf.for") :]
        if allocated := re.match(r"%(\w+) = ttg.local_alloc : \(\) -> !ttg.memdesc<(\d+)x(\d+)x(\d+)?", text):
            name, count = allocated.group(1), int(allocated.group(2)) if allocated.group(4) else 1
            buffers[name] = (name, 0 if branch else count)
        elif view := re.match(r"%(\w+) = ttg.memdesc_(?:index|trans) %(\w+)", text):
            buffers[view.group(1)] = buffers.get(view.group(2), ("", 0))
        elif (product := re.match(r"%\w+ = ttng.warp_group_dot %(\w+), %(\w+),", text)) and branch:
            found += [buffers[name] for name in product.groups() if name in buffers]
        if text.endswith("{"):
            regions.append("scf.if" if "scf.if" in text or "else" in text else "scf.for" if "scf.for" in text else "")
    return found


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("decay", [0, 1, 2])
def test_no_load_overwrites_a_tile_that_a_branch_still_reads(decay, stages):
    """The next chunks' loads come before a branch: a tile whose product stands in one needs a buffer more (or its own
    load) than Triton 3.6 and 3.8 give a tile that is read as registers, too. Found on an H100 as gradients of a fast
    static decay that differed from run to run."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("nothing is compiled in this process")
    from chela_plugin.kernels.linear_attention import triton as kernels

    constants = dict.fromkeys(("K", "V", "BK", "BV", "XK", "XV", "BT"), 64)
    constants |= dict.fromkeys(("AFTER", "END", "VARLEN", "TABLE"), False) | {"BEFORE": decay == 0}
    constants |= {"DECAY": decay, "AFTER_SCALED": True, "PRECISION": "tf32", "STAGES": stages}
    types = dict.fromkeys(("q", "k", "v", "do", "dq", "dk", "dv", "cuts"), "*bf16") | {"scale": "fp32"}
    types |= dict.fromkeys(("dots", "log_decay", "g", "before", "after", "dinitial"), "*fp32")
    aligned = [f"{x}_{dim}" for x in ("q", "k", "v", "do") for dim in "bth"]
    compiled = compiled_for_hopper(kernels.backward, constants, types, aligned=aligned)
    found = products_in_branches(compiled.asm["ttgir"])
    assert bool(found) == (decay == 1)
    assert all(count == 0 or count >= stages for _, count in found), found
