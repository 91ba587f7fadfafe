"""Decoding on a CUDA device: steps as CUDA graphs, long histories, whole models under torch.compile."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from chela_plugin.layers import ShortLongConv
from chela_plugin.layers.long_kernel import LONG_KERNELS
from chela_plugin.lm import ChelaCache
from chela_plugin.lm.decoding import CapturedDecoding

pytestmark = pytest.mark.gpu

MORE_MIXERS = ["chela(long=multiscale)", "chela(long=none)", "conv(long=explicit) + attention"]


@pytest.fixture
def build(small_lm):
    def on_gpu(mixer, dtype=torch.float32, **sizes):
        sizes = {"hidden_size": 128, "intermediate_size": 128, **sizes}
        with torch.device("cuda"):
            return small_lm(mixer, pad_token_id=0, apart=True, **sizes).to(dtype)

    return on_gpu


def tokens(*shape):
    return torch.randint(1, 61, shape, generator=torch.Generator().manual_seed(1)).cuda()


# Whatever computes the mixer: our kernels, fla's (gla, gated_deltanet, the short convolution of mamba2), SDPA.
@pytest.mark.parametrize("mixer", ["chela", "gla", "gated_deltanet", "attention", "chela(long=multiscale)", "mamba2"])
@pytest.mark.parametrize("mode", ["training", "prefill"])
def test_a_model_compiles_whole_over_twenty_lengths(mixer, mode, build):
    torch._dynamo.reset()
    model, counter = build(mixer, torch.bfloat16, num_hidden_layers=1), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.train(mode == "training"), fullgraph=True, backend=counter)
    for length in range(70, 90):
        if mode == "training":
            compiled(tokens(2, length), labels=tokens(2, length)).loss.backward()
        else:
            with torch.no_grad():
                compiled(tokens(2, length), use_cache=True)
    # The first length's graph, one for all others, and up to two where a kernel's launch changes its form.
    assert counter.frame_count <= 4


@torch.no_grad()
def test_a_captured_step_equals_one_forward_pass(lm_mixer, build):
    model, ids = build(lm_mixer), tokens(2, 200)
    whole = model(ids, use_cache=False).logits
    cache = ChelaCache(model.config, max_cache_len=200)
    found = [model(ids[:, :50], past_key_values=cache).logits]
    step = CapturedDecoding(model, cache)
    found += [step(ids[:, t : t + 1]).clone() for t in range(50, 200)]
    assert step.graph is not None and cache.get_seq_length() == 200
    # Logits of size 20 in fp32; a state of 200 tokens summed step by step or in chunks.
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-3, atol=1e-2)
    with pytest.raises(ValueError, match="room for 200 tokens"):
        step(ids[:, :1])


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}], ids=["greedy", "beam"])
@pytest.mark.parametrize("mixer", ["chela", "chela(long=multiscale) + attention"])
def test_generate_with_a_static_cache_gives_the_same_tokens_padded_or_not(mixer, mode, build):
    model, ids = build(mixer), tokens(2, 70)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    kwargs = {"max_new_tokens": 80, "do_sample": False, "attention_mask": mask, **mode}
    wanted = model.generate(ids * mask, **kwargs)
    assert torch.equal(model.generate(ids * mask, cache_implementation="static", **kwargs), wanted)


@torch.no_grad()
def test_a_cache_that_grows_is_refused_by_name(build):
    model = build("attention")
    cache = model(tokens(1, 5)).past_key_values
    step = CapturedDecoding(model, cache)
    step(tokens(1, 1))
    with pytest.raises(ValueError, match=r"'attention' changes its shape.*max_cache_len"):
        step(tokens(1, 1))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("long", LONG_KERNELS)
def test_long_histories_in_chunks_and_steps_equal_one_call(long, dtype):
    torch.manual_seed(0)
    conv = ShortLongConv(256, causal=True, long=long, max_len=4096, device="cuda").to(dtype).eval()
    x = torch.randn(2, 9000, 256, device="cuda", dtype=dtype)
    cache, found = conv.init_cache(2), []
    for part in x.split([4001, 4600, 1, *[1] * 198, 200], dim=1):
        found.append(conv(part, cache=cache, silu=True))
    # Rounding of outputs of size 3 to 8 bits, of taps too; in fp32 sums over 9,000 tokens through an FFT.
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 5e-2}
    torch.testing.assert_close(torch.cat(found, 1), conv(x, silu=True), **tolerance)
