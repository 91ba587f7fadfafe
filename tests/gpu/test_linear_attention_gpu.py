"""Linear attention on a CUDA device at real sizes, against the chunked definition in fp64 on the same device."""

import pytest
import torch

from chela_plugin.kernels.linear_attention import linear_attention, linear_attention_step

# Bidirectional attention has no decay.
VARIANTS = [(None, True), ("static", True), ("token", True), (None, False)]
pytestmark = pytest.mark.gpu

# Rounding of the operands of each product and of the result to 8 and 11 significant bits, and of long fp32 sums;
# relative to the whole tensor.
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 3e-6}
# The gradient of a decay per token is a sum over the sequence whose terms nearly cancel. That of a static one sums lags
# within and between chunks of 64 tokens: some roundings of the pairs, in one number a head. Around exp(-0.1), where a
# pair's weight dies within about one chunk, what is left of random signs is small: up to 3.1e-2 with bf16's roundings
# under the interpreter, at the shapes below.
DECAY_TOLERANCE = {torch.bfloat16: 1e-1, torch.float16: 2e-2, torch.float32: 1e-4}
STATIC_DECAY_TOLERANCE = {torch.bfloat16: 6e-2, torch.float16: 6e-3, torch.float32: 3e-5}


def case(batch, time, heads, K, V, decay=None, dtype=torch.bfloat16, rows=None, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=g, device="cuda")

    inputs = {name: random(batch, time, heads, width).to(dtype) for name, width in (("q", K), ("k", K), ("v", V))}
    if decay:
        shape = (heads,) if decay == "static" else (batch, time, heads)
        inputs["log_decay"] = -0.1 * torch.rand(shape, generator=g, device="cuda")
    rows = rows or batch
    inputs["initial_state"] = random(rows, heads, K, V)
    return inputs, random(batch, time, heads, V).to(dtype), random(rows, heads, K, V)


def run(inputs, do, dstate, **options):
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    o, state = linear_attention(**leaves, output_final_state=True, **options)
    gradients = torch.autograd.grad((o, state), list(leaves.values()), (do.to(o.dtype), dstate.to(state.dtype)))
    return {"o": o.detach(), "state": state.detach()} | dict(zip(leaves, gradients, strict=True))


def in_fp64(inputs, do, dstate, **options):
    return run({name: x.double() for name, x in inputs.items()}, do, dstate, **options)


def assert_close(found, wanted, dtype):
    for name, x in found.items():
        error = float((x.double() - wanted[name]).norm() / wanted[name].norm())
        bound = TOLERANCE
        if name == "log_decay":
            bound = STATIC_DECAY_TOLERANCE if x.dim() == 1 else DECAY_TOLERANCE
        assert error < bound[dtype], f"{name}: {error:.1e}"


@pytest.mark.parametrize("decay", [None, "static", "token"])
@pytest.mark.parametrize(
    ("batch", "time", "heads", "K", "V", "dtype"),
    [
        (8, 2048, 16, 128, 128, torch.bfloat16),
        (8, 2041, 16, 64, 64, torch.bfloat16),
        (1, 8197, 4, 64, 128, torch.bfloat16),  # few heads: two levels
        (1, 8197, 4, 64, 64, torch.float16),
        (2, 1000, 4, 64, 64, torch.float32),
        (2, 1000, 4, 40, 24, torch.bfloat16),
        (2, 500, 4, 256, 256, torch.bfloat16),
    ],
)
def test_causal_kernels_equal_fp64_with_all_gradients(decay, batch, time, heads, K, V, dtype):
    problem = case(batch, time, heads, K, V, decay, dtype)
    assert_close(run(*problem), in_fp64(*problem), dtype)


@pytest.mark.parametrize("rate", [-4.0, -0.7, -0.1, -1e-2, -1e-5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("batch", "time", "heads", "K", "V"), [(4, 2000, 8, 64, 64), (1, 8197, 8, 128, 128), (1, 5000, 8, 64, 128)]
)
def test_a_static_decays_gradient_at_every_rate(batch, time, heads, K, V, dtype, rate):
    inputs, do, dstate = case(batch, time, heads, K, V, "static", dtype)
    inputs["log_decay"] = torch.full((heads,), rate, device="cuda")
    assert_close(run(inputs, do, dstate), in_fp64(inputs, do, dstate), dtype)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("batch", "time", "heads", "K", "V", "dtype"),
    [
        (64, 196, 6, 64, 64, torch.bfloat16),
        (1, 20000, 4, 128, 128, torch.bfloat16),
        (4, 1024, 8, 256, 64, torch.bfloat16),
        (4, 1000, 8, 128, 128, torch.float16),
        (2, 777, 4, 64, 64, torch.float32),
    ],
)
def test_bidirectional_kernels_equal_fp64_with_all_gradients(masked, batch, time, heads, K, V, dtype):
    problem = case(batch, time, heads, K, V, None, dtype)
    options = {"causal": False}
    if masked:
        options["mask"] = torch.rand(batch, time, device="cuda") > 0.2
    assert_close(run(*problem, **options), in_fp64(*problem, **options), dtype)


@pytest.mark.parametrize(("decay", "causal"), VARIANTS)
@pytest.mark.parametrize("heads", [2, 32])
def test_packed_sequences(decay, heads, causal):
    problem = case(1, 9000, heads, 64, 64, decay, rows=5)
    options = {"cu_seqlens": torch.tensor([0, 1, 1, 100, 8001, 9000], device="cuda"), "causal": causal}
    assert_close(run(*problem, **options), in_fp64(*problem, **options), torch.bfloat16)


@pytest.mark.parametrize(
    ("decay", "batch", "time", "heads", "width"),
    [
        (None, 1, 16384, 8, 128),
        ("token", 1, 16384, 8, 128),
        ("static", 4, 8192, 32, 64),  # all programs at once
        ("static", 16, 2048, 32, 64),
        ("static", 16, 2048, 16, 128),
    ],
)
def test_twenty_runs_agree_to_the_last_bit(decay, batch, time, heads, width):
    problem = case(batch, time, heads, width, width, decay)
    if decay == "static":  # fast: its gradient takes one product more
        problem[0]["log_decay"] -= 0.3
    first = run(*problem)
    for _ in range(19):
        for name, x in run(*problem).items():
            assert torch.equal(x, first[name]), name


@pytest.mark.parametrize("decay", [None, "static", "token"])
def test_forward_and_backward_replay_from_a_cuda_graph(decay):
    inputs, do, dstate = case(1, 4096, 4, 64, 64, decay)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}

    def once():
        o, state = linear_attention(**leaves, output_final_state=True)
        return o, state, *torch.autograd.grad((o, state), list(leaves.values()), (do, dstate))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        once()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = once()
    with torch.no_grad():
        for name in "qkv":
            leaves[name].copy_(torch.randn_like(leaves[name]))
    graph.replay()
    replayed = [x.clone() for x in captured]
    assert all(torch.equal(x, y) for x, y in zip(replayed, once(), strict=True))


@pytest.mark.parametrize("decay", [None, "static", "token"])
def test_steps_equal_the_whole_and_replay_from_a_cuda_graph(decay):
    inputs, _, _ = case(4, 64, 8, 64, 128, decay)
    wanted, final = linear_attention(**inputs, output_final_state=True)
    log_decay = inputs.get("log_decay")
    now = [inputs[n][:, 0].clone() for n in "qkv"]
    decay_now = log_decay[:, 0].clone() if decay == "token" else log_decay
    state = inputs["initial_state"].clone()
    linear_attention_step(*now, state, decay_now)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, new_state = linear_attention_step(*now, state, decay_now)
        state.copy_(new_state)
    out = []
    for t in range(64):
        for x, name in zip(now, "qkv", strict=True):
            x.copy_(inputs[name][:, t])
        if decay == "token":
            decay_now.copy_(log_decay[:, t])
        graph.replay()
        out.append(o.clone())
    found = {"o": torch.stack(out, 1), "state": state}
    assert_close(found, {"o": wanted.double(), "state": final.double()}, torch.bfloat16)


def test_inputs_may_lie_in_memory_as_they_like():
    inputs, do, dstate = case(2, 1500, 4, 64, 64, "token")
    wanted = in_fp64(inputs, do, dstate)
    strided = inputs | {
        "q": inputs["q"].transpose(1, 2).contiguous().transpose(1, 2),
        "k": torch.stack([inputs["k"], inputs["v"]], 3)[:, :, :, 0],
        "v": inputs["v"].transpose(2, 3).contiguous().transpose(2, 3),
        "log_decay": inputs["log_decay"].transpose(0, 2).contiguous().transpose(0, 2),
    }
    assert_close(run(strided, do.transpose(1, 2).contiguous().transpose(1, 2), dstate), wanted, torch.bfloat16)


@pytest.mark.parametrize("decay", [None, "token"])
def test_a_million_tokens(decay):
    problem = case(1, 1_048_576, 1, 64, 64, decay)
    assert_close(run(*problem), in_fp64(*problem), torch.bfloat16)


def test_more_elements_than_int32_counts():
    time, heads = 2**20 + 64, 32  # 2^31 and 131,072 elements in each of q, k, v, o and their gradients
    q, k, v, do = (torch.randn(1, time, heads, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o, _ = linear_attention(*leaves)
    gradients = torch.autograd.grad(o, leaves, do)
    alone = [x[:, :, -1:].detach().clone().requires_grad_() for x in (q, k, v)]
    o_alone, _ = linear_attention(*alone)
    wanted = (o_alone, *torch.autograd.grad(o_alone, alone, do[:, :, -1:]))
    for x, y in zip((o, *gradients), wanted, strict=True):
        x, y = x[:, :, -1:].detach().double(), y.detach().double()
        error = float((x - y).norm() / y.norm())
        assert error < 5e-3  # another cut into segments: bf16 rounds other sums


@pytest.mark.parametrize("decay", ["static", "token"])
def test_a_decay_above_zero_is_an_error_at_the_first_call_and_not_passed_over_later(decay, monkeypatch):
    right, _, _ = case(1, 300, 7, 64, 64, decay)  # 7 heads: no other test's decays have this kind
    wrong = right | {"log_decay": right["log_decay"].clone()}
    wrong["log_decay"][(..., 2) if decay == "static" else (0, 100, 2)] = 0.5
    for _ in range(2):
        with pytest.raises(ValueError, match="at most 0"):
            linear_attention(**wrong)
    linear_attention(**right)
    o = linear_attention(**wrong)[0]
    heads = [0, 1, 3, 4, 5, 6]
    assert o[0, 100:, 2].isnan().all() and o[0, :, heads].isfinite().all()
    monkeypatch.setenv("CHELA_CHECK", "1")
    with pytest.raises(ValueError, match="at most 0"):
        linear_attention(**wrong)


def test_wrong_cu_seqlens_are_an_error_and_right_ones_are_read_once():
    inputs, _, _ = case(1, 300, 4, 64, 64, rows=2)
    for wrong in ([1, 100, 300], [0, 100, 299], [0, 301, 300]):
        cuts = torch.tensor(wrong, device="cuda")
        for _ in range(2):
            with pytest.raises(ValueError, match="cu_seqlens must"):
                linear_attention(**inputs, cu_seqlens=cuts)
    cuts = torch.tensor([0, 100, 300], device="cuda")
    linear_attention(**inputs, cu_seqlens=cuts)
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_attention(**inputs, cu_seqlens=cuts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    cuts[0] = 1  # in place: read again
    with pytest.raises(ValueError, match="cu_seqlens must"):
        linear_attention(**inputs, cu_seqlens=cuts)


@pytest.mark.parametrize("decay", [None, "static", "token"])
def test_launches_go_by_what_they_are_compiled_for(decay):
    """Lengths, strides and alignment in turn: each finds its own compiled form, and finds it again."""
    for time, offset in ((300, 0), (256, 0), (300, 1), (257, 8), (256, 8), (300, 0), (256, 0)):
        inputs, _, _ = case(1, time, 4, 64, 64, decay, seed=time + offset)
        for name, x in inputs.items():
            if name != "initial_state":  # the same numbers, `offset` elements further on in memory
                inputs[name] = torch.cat([x.new_zeros(offset), x.flatten()])[offset:].view(x.shape)
        o = linear_attention(**inputs)[0]
        wanted = linear_attention(**{name: x.double() for name, x in inputs.items()})[0]
        assert_close({"o": o}, {"o": wanted}, torch.bfloat16)


def test_compiles_without_a_graph_break():
    inputs, do, _ = case(2, 1000, 4, 64, 64, "token")
    leaves = [x.requires_grad_() for x in inputs.values()]

    def layer(q, k, v, log_decay, state):
        return linear_attention(q * 2, k, v, log_decay, initial_state=state)[0] + 1

    wanted = torch.autograd.grad(layer(*leaves), leaves, do)
    found = torch.autograd.grad(torch.compile(layer, fullgraph=True)(*leaves), leaves, do)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)  # the fused q * 2 may skip a rounding to bf16
