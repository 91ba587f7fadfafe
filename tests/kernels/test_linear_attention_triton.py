"""Linear attention: the Triton source under the interpreter against the fp64 definition, every variant, all gradients.

Triton decides at its first import whether kernels are interpreted, so this file runs itself once more in a process of
its own with TRITON_INTERPRET=1.
"""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chela_plugin.kernels.linear_attention import backend, linear_attention, linear_attention_step, reference

# Bidirectional attention has no decay.
VARIANTS = [(None, True), ("static", True), ("token", True), (None, False)]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
only_interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that this file starts")
# The kernels compute infinite and undefined numbers where they mask them out afterwards; numpy remarks on it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# fp32 sums of some hundred terms; one rounding of an operand or result to 11 and 8 significant bits.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# A decay's gradient is a long sum whose terms nearly cancel: it keeps fewer of the same digits.
DECAY_TOLERANCE = {torch.float32: 3e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}


@pytest.mark.skipif(INTERPRETED, reason="this is the process it starts")
def test_the_kernels_pass_under_the_interpreter(this_file_under_the_interpreter):
    this_file_under_the_interpreter()


@pytest.fixture
def segments(monkeypatch):
    """Sets how many tokens a segment has, for both directions."""
    from chela_plugin.kernels.linear_attention import launch

    def cut(size):
        for name in ("segment_size", "bidirectional_segment_size"):
            monkeypatch.setattr(launch, name, lambda *_: size)
        launch.forget_blocks()

    yield cut
    launch.forget_blocks()


def case(batch, time, heads, K, V, decay, rows, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=g)

    inputs = {name: random(batch, time, heads, width).to(dtype) for name, width in (("q", K), ("k", K), ("v", V))}
    if decay:
        shape = (heads,) if decay == "static" else (batch, time, heads)
        inputs["log_decay"] = -0.2 * torch.rand(shape, generator=g)
    inputs["initial_state"] = random(rows, heads, K, V)
    return inputs, random(batch, time, heads, V), random(rows, heads, K, V)


def run(inputs, do, dstate, **options):
    """Outputs and the gradients of every input."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    o, state = linear_attention(**leaves, output_final_state=True, **options)
    loss = (o.double() * do).sum() + (state.double() * dstate).sum()
    return {"o": o, "state": state} | dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def in_fp64(inputs, do, dstate, **options):
    return run({name: x.double() for name, x in inputs.items()}, do, dstate, **options)


def assert_close(found, wanted, dtype, least=0.0):
    """least: elements below it count as that large: of a few, all may be sums that cancel."""
    for name, x in found.items():
        y = wanted[name]
        assert x.shape == y.shape
        size = max(float(y.detach().norm()), least * y.numel() ** 0.5)
        error = float((x.detach().double() - y.detach()).norm()) / size
        bound = DECAY_TOLERANCE if name == "log_decay" else TOLERANCE
        assert error < bound[dtype], f"{name}: {error:.1e}"


@only_interpreted
@pytest.mark.parametrize("size", [1000, 64])
@pytest.mark.parametrize("cuts", [None, [0, 3, 3, 90, 133]])
@pytest.mark.parametrize("decay", [None, "static", "token"])
def test_causal_kernels_equal_the_definition_with_all_gradients(decay, cuts, size, segments):
    segments(size)
    batch, rows = (2, 2) if cuts is None else (1, 4)
    problem = case(batch, 133, 2, 16, 32, decay, rows, torch.float32)
    options = {"cu_seqlens": None if cuts is None else torch.tensor(cuts)}
    assert_close(run(*problem, **options), in_fp64(*problem, **options), torch.float32)


@only_interpreted
@pytest.mark.parametrize("size", [1000, 64])
@pytest.mark.parametrize(("cuts", "masked"), [(None, False), (None, True), ([0, 3, 3, 90, 133], False)])
@pytest.mark.parametrize("K", [32, 80])  # 80 is too wide in fp32 for one program
def test_bidirectional_kernels_equal_the_definition_with_all_gradients(K, masked, cuts, size, segments):
    segments(size)
    batch, rows = (2, 2) if cuts is None else (1, 4)
    problem = case(batch, 133, 2, K, 16, None, rows, torch.float32)
    options = {"causal": False, "cu_seqlens": None if cuts is None else torch.tensor(cuts)}
    if masked:
        options["mask"] = torch.rand(2, 133, generator=torch.Generator().manual_seed(1)) > 0.3
    assert_close(run(*problem, **options), in_fp64(*problem, **options), torch.float32)


@only_interpreted
@pytest.mark.parametrize("causal", [True, False])
def test_training_without_a_final_state_at_widths_that_are_padded(causal):
    q, k, v = (torch.randn(1, 9, 2, width, requires_grad=True) for width in (10, 10, 6))
    o, state = linear_attention(q, k, v, causal=causal)
    assert state is None and o.shape == v.shape
    o.sum().backward()
    assert q.grad is not None and q.grad.shape == q.shape


@only_interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("decay", [None, "static", "token"])
def test_half_precision(dtype, decay):
    problem = case(1, 150, 2, 16, 16, decay, 1, dtype)
    assert_close(run(*problem), in_fp64(*problem), dtype)


@pytest.fixture
def bf16_arithmetic(monkeypatch):
    """bf16 products and roundings under the interpreter, which has neither: it multiplies bit patterns and rounds a
    mantissa of ones without a carry. Without this fixture bf16 is computed in fp32 there."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from chela_plugin.kernels.linear_attention import ops

    monkeypatch.setattr(ops, "multiplied_as", lambda x: x.dtype)
    cast = InterpreterBuilder.cast_impl

    def wide(x):
        is_bf16 = x.dtype.scalar == tl.bfloat16
        return (x.data.astype(np.uint32) << 16).view(np.float32) if is_bf16 else x.data.astype(np.float32)

    def cast_impl(self, x, to):
        kinds = x.dtype.scalar, to.scalar
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle(wide(x), to.scalar)
        if kinds == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(x.data).view(np.uint32).astype(np.uint64)
            return TensorHandle(((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16), to.scalar)
        return cast(self, x, to)

    def create_dot(self, a, b, acc, *_):
        return TensorHandle(np.matmul(wide(a), wide(b)) + acc.data, acc.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


# Where a pair crosses the bound of a chunk its place counts against the bound's 64, each with a rounding of its own, to
# 8 or 11 significant bits: beside all pairs of 64 tokens up to 5 roundings. In fp32 it is the sums inside a chunk that
# cancel, which count for more where a fast decay makes the gradient small.
STATIC_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def static_decay_error(problem, **options):
    found, wanted = run(*problem, **options)["log_decay"], in_fp64(*problem, **options)["log_decay"]
    return float((found.double() - wanted).norm() / wanted.norm())


@only_interpreted
@pytest.mark.parametrize(("size", "states"), [(1000, False), (200, True)])
@pytest.mark.parametrize("log_decay", [-3.0, -0.7, -0.12, -1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_static_decays_gradient_is_as_exact_as_its_operands(
    dtype, log_decay, size, states, segments, bf16_arithmetic
):
    segments(size)
    inputs, do, dstate = case(1, 450, 8, 16, 16, "static", 1, dtype)
    inputs["log_decay"] = torch.full((8,), log_decay)
    if not states:
        del inputs["initial_state"]
        dstate.zero_()
    bound = STATIC_TOLERANCE[dtype] * (20 if dtype == torch.float32 and log_decay < -1 else 1)
    error = static_decay_error((inputs, do.to(dtype).double(), dstate))
    assert error < bound, f"{error:.1e}"


@only_interpreted
@pytest.mark.parametrize("log_decay", [-2.0, -0.1])
def test_a_static_decays_gradient_over_short_packed_sequences(log_decay, segments, bf16_arithmetic):
    """Segments of one token and of one chunk and a token: what crosses their bounds is most of the gradient, and of so
    few bounds the roundings average out less."""
    segments(65)
    cuts = [0, 1, 1, 66, 130, 131, 200]
    inputs, do, dstate = case(1, 200, 8, 16, 16, "static", len(cuts) - 1, torch.bfloat16)
    inputs["log_decay"] = torch.full((8,), log_decay)
    options = {"cu_seqlens": torch.tensor(cuts)}
    error = static_decay_error((inputs, do.bfloat16().double(), dstate), **options)
    assert error < 2 * STATIC_TOLERANCE[torch.bfloat16], f"{error:.1e}"


@only_interpreted
@settings(max_examples=8, deadline=None)
@given(
    batch=st.integers(1, 2),
    time=st.integers(1, 100),
    heads=st.integers(1, 2),
    K=st.integers(1, 40),
    V=st.integers(1, 40),
    decay=st.sampled_from([None, "static", "token"]),
    seed=st.integers(0, 99),
)
def test_any_shape(batch, time, heads, K, V, decay, seed):
    problem = case(batch, time, heads, K, V, decay, batch, torch.float32, seed)
    found, wanted = run(*problem), in_fp64(*problem)
    if decay == "static":  # a sum over tokens that may cancel to nothing, so its error is measured by its terms
        inputs, *gradients = problem
        each = {"log_decay": inputs["log_decay"].expand(batch, time, heads)}
        terms = in_fp64(inputs | each, *gradients)["log_decay"].abs().sum((0, 1))
        error = (found.pop("log_decay").double() - wanted["log_decay"]).abs()
        assert (error <= DECAY_TOLERANCE[torch.float32] * terms).all(), error / terms
    elif decay and time < 4:
        found.pop("log_decay")
    assert_close(found, wanted, torch.float32, least=1.0)


@only_interpreted
def test_widths_up_to_256_and_one_token():
    for K, V, time in ((256, 16, 17), (16, 256, 17), (16, 16, 1)):
        problem = case(1, time, 1, K, V, None, 1, torch.float32)
        assert_close(run(*problem), in_fp64(*problem), torch.float32)


@only_interpreted
def test_inputs_may_lie_in_memory_as_they_like():
    problem = case(2, 70, 2, 16, 16, "token", 2, torch.float32)
    wanted = in_fp64(*problem)
    inputs, do, dstate = problem
    strided = {
        "q": inputs["q"].transpose(1, 2).contiguous().transpose(1, 2),  # heads before time
        "k": torch.stack([inputs["k"], inputs["v"]], 3)[:, :, :, 0],  # one of two interleaved
        "v": inputs["v"].transpose(2, 3).contiguous().transpose(2, 3),  # last dim not dense
        "log_decay": inputs["log_decay"].transpose(0, 2).contiguous().transpose(0, 2),
        "initial_state": inputs["initial_state"].transpose(2, 3).contiguous().transpose(2, 3),
    }
    assert_close(run(strided, do, dstate), wanted, torch.float32)


@only_interpreted
@pytest.mark.parametrize("decay", [None, "token"])
def test_future_tokens_do_not_change_the_last_bit_of_the_past(decay, segments):
    segments(64)
    inputs, _, _ = case(1, 150, 1, 16, 16, decay, 1, torch.float32)
    before = linear_attention(**inputs)[0]
    for t in (20, 64, 140):
        changed = {name: x.clone() for name, x in inputs.items()}
        for name in "qkv":
            changed[name][:, t:] += 100
        assert torch.equal(linear_attention(**changed)[0][:, :t], before[:, :t])


@only_interpreted
@pytest.mark.parametrize("value", [float("-inf"), -1e30])
def test_a_decay_that_forgets_everything_starts_anew(value):
    inputs, do, dstate = case(1, 90, 1, 16, 16, "token", 1, torch.float32)
    inputs["log_decay"][:, 40] = value
    found, wanted = run(inputs, do, dstate), in_fp64(inputs, do, dstate)
    assert_close(found, wanted, torch.float32)
    assert float(found["log_decay"][0, 40, 0]) == 0


@only_interpreted
@pytest.mark.parametrize("decay", [None, "static", "token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_equal_the_whole(decay, dtype):
    inputs, _, _ = case(2, 5, 3, 20, 40, decay, 2, dtype)
    wanted, final = linear_attention(**{name: x.double() for name, x in inputs.items()}, output_final_state=True)
    state = inputs["initial_state"]
    for t in range(5):
        d = inputs["log_decay"][:, t] if decay == "token" else inputs.get("log_decay")
        o, state = linear_attention_step(inputs["q"][:, t], inputs["k"][:, t], inputs["v"][:, t], state, d)
        torch.testing.assert_close(o.double(), wanted[:, t], rtol=8e-3, atol=8e-3 if dtype != torch.float32 else 1e-5)
    torch.testing.assert_close(state.double(), final, rtol=1e-5, atol=1e-5)


@only_interpreted
@pytest.mark.parametrize(("decay", "causal"), VARIANTS)
def test_operators_keep_torchs_contract(decay, causal, segments):
    from chela_plugin.kernels.linear_attention import ops

    segments(32)
    inputs, _, _ = case(1, 40, 1, 16, 16, decay, 1, torch.float32)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    state = leaves["initial_state"]
    arguments = (*(leaves[n] for n in "qkv"), leaves.get("log_decay"), state, None, None, 0.25, causal, True, True)
    torch.library.opcheck(ops.forward_op, arguments)
    given = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    o, *kept = ops.forward_op(*given)
    kept = [x if x.numel() else None for x in kept]
    torch.library.opcheck(ops.backward_op, (*given[:7], *kept, torch.ones_like(o), None, 0.25, causal))
    x = torch.randn(1, 2, 16)
    torch.library.opcheck(ops.step_op, (x, x, x, torch.randn(1, 2, 16, 16), None, 0.25))


class Block(torch.nn.Module):
    def __init__(self, causal):
        super().__init__()
        self.projection = torch.nn.Linear(32, 3 * 32 + 2)
        self.causal = causal

    def forward(self, x):
        *qkv, decay = self.projection(x).split([32, 32, 32, 2], -1)
        q, k, v = (y.unflatten(-1, (2, 16)) for y in qkv)
        log_decay = torch.nn.functional.logsigmoid(decay) if self.causal else None
        return linear_attention(q, k, v, log_decay, causal=self.causal)[0].flatten(2)


@only_interpreted
@pytest.mark.parametrize("causal", [True, False])
def test_compiles_without_a_graph_break_and_exports(causal):
    torch.manual_seed(0)
    block = Block(causal)
    x, longer = torch.randn(2, 37, 32), torch.randn(3, 50, 32)
    wanted = block(x)
    gradient = torch.autograd.grad(wanted.sum(), block.projection.weight)[0]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    found = compiled(x)
    assert torch.equal(found, wanted)
    assert torch.equal(torch.autograd.grad(found.sum(), block.projection.weight)[0], gradient)
    assert torch.equal(torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)(longer), block(longer))
    with torch.no_grad():
        exported = torch.export.export(block, (x,))
        names = {str(node.target) for node in exported.graph.nodes}
        assert "chela.linear_attention.default" in names
        assert torch.equal(exported.module()(x), wanted)


@only_interpreted
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("decay", [None, "static", "token"])
def test_a_kind_of_call_that_passed_the_checks_is_remembered_with_all_that_they_look_at(decay, learns, monkeypatch):
    from chela_plugin.kernels import linear_attention as package

    # As on a CUDA device, where the sign is read at the first call of a kind.
    monkeypatch.setattr(package, "_sign_is_read", lambda log_decay: False)
    monkeypatch.setattr(package, "_right_kinds", set())
    monkeypatch.setattr(package, "check_inputs", checked := Counting(package.check_inputs))
    package.passed.clear()
    inputs, _, _ = case(2, 37, 2, 16, 32, decay, 2, torch.float32)
    del inputs["initial_state"]
    if decay:
        linear_attention(**inputs)
        assert not package.passed  # its sign was not read yet
        package._right_kinds.add(package._kind(inputs["log_decay"]))
    inputs = {name: x.requires_grad_(learns) for name, x in inputs.items()}
    first, calls = linear_attention(**inputs)[0], checked.calls + 1
    for state in (False, True, True):
        again, final = linear_attention(**inputs, output_final_state=state)
        assert torch.equal(again, first) and again.requires_grad == learns and (final is not None) == state
    assert checked.calls == calls  # once for each kind, with and without the state
    elsewhere = {name: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for name, x in inputs.items()}
    assert torch.equal(linear_attention(**elsewhere)[0], first)  # an address that no descriptor takes
    with torch.no_grad():
        assert torch.equal(linear_attention(**inputs)[0], first)
    q = inputs["q"]
    wrongs = [{"q": q[0]}, {"k": q.double()}, {"v": q[:, :5]}, {"scale": 0.0}, {"scale": float("nan")}, {"q": q[:, :0]}]
    if decay:
        wrongs += [{"log_decay": inputs["log_decay"].double()}, {"log_decay": inputs["log_decay"][..., :1]}]
    for wrong in wrongs:
        for _ in range(2):
            with pytest.raises(ValueError, match=r"must|no tokens"):
                linear_attention(**inputs | wrong)
    monkeypatch.setenv("CHELA_BACKEND", "none of these")
    with pytest.raises(ValueError, match="CHELA_BACKEND"):
        linear_attention(**inputs)


class Counting:
    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *arguments):
        self.calls += 1
        return self.function(*arguments)


def test_fp64_and_an_explicit_wish_run_the_reference(monkeypatch):
    assert backend("cpu", torch.float64) == "reference"
    assert backend("cpu") == ("triton" if INTERPRETED else "reference")
    monkeypatch.setenv("CHELA_BACKEND", "reference")
    assert backend("cuda") == "reference"
    x = torch.randn(1, 5, 1, 4)
    assert torch.equal(linear_attention(x, x, x)[0], reference.chunked(x, x, x, None, 0.5, None)[0])


@only_interpreted
@pytest.mark.parametrize("cuts", [[0, 300, 0, 300, 0, 300], [-50, 9999, 20], [500, 100, 90], [0, 2**40, 300]])
def test_a_wrong_cu_seqlens_never_leaves_the_tokens_or_the_table(cuts):
    """On CUDA its values aren't read before the launch: nothing may be written or read out of bounds."""
    from chela_plugin.kernels.linear_attention import launch

    q = torch.zeros(1, 300, 1, 16)
    plan = launch.cut(q, torch.tensor(cuts), 64)
    start, length = plan.cuts.unbind(1)
    assert (start >= 0).all() and (length >= 0).all() and (start + length <= 300).all() and (length <= 64).all()
    assert plan.first.diff().ge(0).all() and plan.first[0] >= 0 and plan.first[-1] <= plan.segments
    assert ((plan.owner >= 0) & (plan.owner < plan.rows)).all()
