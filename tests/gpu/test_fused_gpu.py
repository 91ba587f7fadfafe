"""CHELA as one node of autograd, and a language model's fused blocks, on a CUDA device at real sizes."""

import copy

import pytest
import torch

from chela_plugin.layers import Chela

pytestmark = pytest.mark.gpu
# fp32: long sums in other orders. bf16: about six roundings of 2^-9 in a row on the way to each gradient. Where terms
# cancel, as in the skip's gradient, both forms are further off: there the composed one's error is the measure.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def outcome(mixer, x, dy):
    x = x.detach().to(mixer.proj.weight.dtype).requires_grad_()
    names = ["x", *(name for name, _ in mixer.named_parameters())]
    y = mixer(x)
    gradients = torch.autograd.grad(y, [x, *mixer.parameters()], dy.to(y.dtype))
    return {"y": y.detach()} | dict(zip(names, gradients, strict=True))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_node_is_no_further_from_fp64_than_its_dtype_allows(causal, dtype, monkeypatch):
    torch.manual_seed(0)
    mixer = Chela(512, causal=causal, num_heads=4, device="cuda", dtype=dtype, long="modal" if causal else "none")
    x, dy = torch.randn(2, 1500, 512, device="cuda", dtype=dtype), torch.randn(2, 1500, 512, device="cuda", dtype=dtype)
    assert mixer.fuses(x, x)
    found = outcome(mixer, x, dy)
    composed = copy.deepcopy(mixer)
    composed.fuses = lambda x, z: False
    beside = outcome(composed, x, dy)
    monkeypatch.setenv("CHELA_BACKEND", "reference")
    for name, wanted in outcome(copy.deepcopy(mixer).double(), x, dy).items():
        error, other = (float((t[name].double() - wanted).norm() / wanted.norm()) for t in (found, beside))
        assert error < max(TOLERANCE[dtype], 1.5 * other), (name, error, other)


def test_a_layer_can_be_captured_in_a_cuda_graph_and_replays_the_same_bits():
    torch.manual_seed(0)
    mixer = Chela(256, causal=True, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(2, 700, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn_like(x)

    def step():
        return torch.autograd.grad(mixer(x), [x, *mixer.parameters()], dy)

    eager = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))


def test_a_language_model_s_fused_blocks_train_as_the_composed_ones(monkeypatch):
    pytest.importorskip("fla")
    from chela_plugin.lm import ChelaConfig, ChelaForCausalLM, model

    torch.manual_seed(0)
    config = ChelaConfig(vocab_size=64, hidden_size=256, num_hidden_layers=2, mixer="chela + attention")
    lm = ChelaForCausalLM(config).cuda()
    tokens = torch.randint(64, (2, 300), device="cuda")

    def gradients():
        loss = lm(tokens, labels=tokens).loss
        return [loss.detach(), *torch.autograd.grad(loss, list(lm.parameters()))]

    assert model.kernels_for(lm.model.embed_tokens(tokens), ()) is not None
    fused = gradients()
    monkeypatch.setattr(model, "kernels_for", lambda *_: None)
    for found, wanted in zip(fused, gradients(), strict=True):
        # fp32 with products in tf32 or not, as torch has it: the same products on both sides, sums in other orders
        assert float((found - wanted).norm() / wanted.norm().clamp_min(1e-6)) < 1e-3
