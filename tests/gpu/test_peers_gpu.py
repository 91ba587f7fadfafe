"""Mixers that run their authors' kernels on a CUDA device, against our definitions in fp64 with the same weights."""

import importlib.util

import pytest
import torch
from torch.nn import functional as F

from chela_plugin import create_mixer
from chela_plugin.kernels import peers
from chela_plugin.kernels.gated_delta_rule import backend as delta_backend
from chela_plugin.kernels.gated_delta_rule import gated_delta_rule
from chela_plugin.kernels.gated_linear_attention import gated_linear_attention

pytestmark = pytest.mark.gpu
# Peers are extras; make test-gpu prints what was skipped for want of one.
needs_fla = pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="needs flash-linear-attention")
needs_mamba = pytest.mark.skipif(importlib.util.find_spec("mamba_ssm") is None, reason="needs mamba-ssm")


def relative(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


def run(op, inputs, do, dstate):
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    o, state = op(**leaves, output_final_state=True)
    gradients = torch.autograd.grad((o, state), list(leaves.values()), (do.to(o.dtype), dstate.to(state.dtype)))
    return {"o": o.detach(), "state": state.detach()} | dict(zip(leaves, gradients, strict=True))


@needs_fla
@pytest.mark.parametrize("op", [gated_linear_attention, gated_delta_rule])
@pytest.mark.parametrize(("time", "heads", "K", "V"), [(257, 3, 64, 128), (1000, 2, 128, 128), (5, 2, 64, 64)])
def test_peers_ops_equal_fp64_with_all_gradients(op, time, heads, K, V):
    g = torch.Generator("cuda").manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=g, device="cuda")

    wide = op is gated_linear_attention
    inputs = {
        "q": F.normalize(random(2, time, heads, K), dim=-1).bfloat16(),
        "k": F.normalize(random(2, time, heads, K), dim=-1).bfloat16(),
        "v": random(2, time, heads, V).bfloat16(),
        "log_decay": F.logsigmoid(random(2, time, heads, *([K] if wide else []))) / 16,
        "initial_state": random(2, heads, K, V),
    }
    if not wide:
        inputs["beta"] = torch.rand(2, time, heads, generator=g, device="cuda")
    do, dstate = random(2, time, heads, V).bfloat16(), random(2, heads, K, V)
    found = run(op, inputs, do, dstate)
    wanted = run(op, {name: x.double() for name, x in inputs.items()}, do, dstate)
    for name, x in found.items():
        # bf16 operands of every product, one after the other: 2^-9 each; the decay's terms nearly cancel.
        tolerance = 5e-2 if name == "log_decay" else 1e-2
        assert relative(x, wanted[name]) < tolerance, f"{name}: {relative(x, wanted[name]):.1e}"


CASES = [
    pytest.param("gla", "", "fla", marks=needs_fla),
    pytest.param("gla", "reference", "reference"),
    pytest.param("gated_deltanet", "", "fla chunk_", marks=needs_fla),
    pytest.param("mamba2", "", "triton"),
    pytest.param("mamba2(d_state=64, num_groups=2)", "peer", "mamba_ssm", marks=[needs_mamba, needs_fla]),
    pytest.param("mamba2", "reference", "reference"),
    pytest.param("mamba", "", "reference"),
]


@pytest.mark.parametrize(("spec", "asked", "path"), CASES)
def test_a_mixer_says_what_runs_and_equals_fp64_with_all_gradients(spec, asked, path, monkeypatch):
    torch.manual_seed(0)
    module = create_mixer(spec, 256, causal=True, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(2, 300, 256, device="cuda", dtype=torch.bfloat16)
    do = torch.randn_like(x)
    exact = create_mixer(spec, 256, causal=True, device="cuda", dtype=torch.float64)
    exact.load_state_dict(module.state_dict())
    leaves = [p for _, p in exact.named_parameters()]
    x64 = x.double().requires_grad_()
    y64 = exact(x64)
    wanted = (y64, *torch.autograd.grad(y64, [x64, *leaves], do.double()))
    monkeypatch.setenv("CHELA_BACKEND", asked)
    assert module.path("cuda").startswith(path)
    x.requires_grad_()
    y = module(x)
    found = (y, *torch.autograd.grad(y, [x, *module.parameters()], do))
    names = ["y", "x", *(name for name, _ in exact.named_parameters())]
    errors = {n: relative(a.detach(), b.detach()) for n, a, b in zip(names, found, wanted, strict=True)}
    # A whole layer in bf16: some ten roundings of 2^-9 in a row; a rate's or step's gradient is a cancelling sum.
    loose = ("rate", "step", "alpha", "narrow", "beta")
    wrong = {n: e for n, e in errors.items() if e > (0.15 if any(part in n for part in loose) else 3e-2)}
    assert not wrong, errors


@needs_fla
@pytest.mark.parametrize("spec", ["gla", "gated_deltanet", "mamba2", "mamba"])
def test_prefill_and_steps_equal_the_whole(spec):
    torch.manual_seed(0)
    module = create_mixer(spec, 256, causal=True, device="cuda", dtype=torch.bfloat16).eval()
    x = torch.randn(2, 80, 256, device="cuda", dtype=torch.bfloat16)
    mask = torch.ones(2, 80, dtype=torch.bool, device="cuda")
    mask[1, :13] = False
    with torch.no_grad():
        wanted = module(x, attention_mask=mask)
        cache = module.init_cache(2)
        parts = [module(x[:, :70], attention_mask=mask[:, :70], cache=cache)]
        parts += [module.step(x[:, t], cache)[:, None] for t in range(70, 80)]
    found = torch.cat(parts, 1)
    assert relative(found[mask], wanted[mask].double()) < 2e-2  # bf16, products in another order


@needs_fla
@pytest.mark.parametrize("spec", ["gla", "gated_deltanet", "mamba2"])
def test_autocast_runs_what_the_path_says(spec, monkeypatch):
    module = create_mixer(spec, 256, causal=True, device="cuda")
    x = torch.randn(1, 100, 256, device="cuda")
    called = []
    find = peers.find

    def watched(name):
        function, reason = find(name)
        return None if function is None else lambda *args, **kw: called.append(name) or function(*args, **kw), reason

    monkeypatch.setattr(peers, "find", watched)
    with torch.autocast("cuda", torch.bfloat16):
        path = module.path("cuda")
        module(x)
    assert called and all(name in path or (name == "chunk_gla" and path == "fla") for name in called)
    called.clear()
    module(x)
    assert module.path("cuda") in ("reference", "triton") and not called  # fp32


@needs_fla
def test_where_fla_refuses_a_gradient_another_of_its_kernels_runs():
    refused = peers.gated_backward_refused()
    wanted = "fla chunk_kda" if refused else "fla chunk_gated_delta_rule"
    assert delta_backend("cuda", torch.bfloat16, 64) == wanted
    assert delta_backend("cuda", torch.bfloat16, 512) == delta_backend("cuda", torch.float32, 64) == "reference"
