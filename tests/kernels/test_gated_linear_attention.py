"""gated_linear_attention: the chunked form against its definition and against fla's naive loop."""

import pytest
import torch

from chela_plugin.kernels.gated_linear_attention import gated_linear_attention, gated_linear_attention_step, reference

# Odd lengths and widths, one token, whole and cut chunks of 64.
SHAPES = [(2, 1, 1, 3, 5), (1, 2, 2, 4, 4), (2, 37, 3, 5, 7), (1, 64, 1, 8, 3), (1, 131, 2, 6, 9)]


def inputs(batch, time, heads, keys, values, dtype=torch.float64, strongest=1.0):
    torch.manual_seed(time)
    q, k = torch.randn(2, batch, time, heads, keys, dtype=dtype)
    v = torch.randn(batch, time, heads, values, dtype=dtype)
    log_decay = -strongest * torch.rand(batch, time, heads, keys, dtype=dtype)
    state = torch.randn(batch, heads, keys, values, dtype=dtype)
    return [x.requires_grad_() for x in (q, k, v, log_decay, state)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("strongest", [0.01, 1.0, 300.0])
def test_chunked_form_equals_the_definition_with_every_gradient(shape, strongest, outputs_and_gradients):
    tensors = inputs(*shape, strongest=strongest)
    got = outputs_and_gradients(
        lambda q, k, v, g, s: gated_linear_attention(q, k, v, g, scale=0.3, initial_state=s, output_final_state=True),
        tensors,
    )
    wanted = outputs_and_gradients(
        lambda q, k, v, g, s: reference.recurrent(q, k, v, g, scale=0.3, initial_state=s), tensors
    )
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)  # fp64; sums of some hundred terms


def test_it_equals_the_naive_loop_of_fla():
    naive = pytest.importorskip("fla.ops.gla.naive").naive_recurrent_gla
    q, k, v, g, state = (x.detach().float() for x in inputs(2, 70, 3, 8, 5))
    o, final = gated_linear_attention(q, k, v, g, initial_state=state, output_final_state=True)
    wanted, wanted_final = naive(q, k, v, g, initial_state=state, output_final_state=True)
    torch.testing.assert_close(o, wanted, rtol=1e-4, atol=1e-5)  # both in fp32
    torch.testing.assert_close(final, wanted_final, rtol=1e-4, atol=1e-5)


def test_a_weak_decay_after_a_strong_one_keeps_its_digits():
    """exp(G_t - G_s) with G in the thousands would be off by 1e-4 in fp32."""
    q, k, v, g, _ = (x.detach() for x in inputs(1, 64, 1, 4, 4))
    g[:, :20] = -500.0
    g[:, 20:] *= 1e-3
    exact, _ = reference.recurrent(q, k, v, g, scale=1.0)
    single, _ = gated_linear_attention(q.float(), k.float(), v.float(), g.float(), scale=1.0)
    torch.testing.assert_close(single.double(), exact, rtol=2e-6, atol=1e-5)  # a few fp32 roundings


def test_steps_equal_the_sequence():
    q, k, v, g, state = (x.detach() for x in inputs(2, 9, 3, 5, 7))
    wanted, final = gated_linear_attention(q, k, v, g, initial_state=state, output_final_state=True)
    for t in range(9):
        o, state = gated_linear_attention_step(q[:, t], k[:, t], v[:, t], state, g[:, t])
        torch.testing.assert_close(o, wanted[:, t], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


def test_future_tokens_do_not_change_the_past():
    q, k, v, g, _ = (x.detach().float() for x in inputs(1, 131, 2, 6, 9))
    before, _ = gated_linear_attention(q, k, v, g)
    for t in (1, 63, 64, 100, 130):
        changed = [x.clone() for x in (q, k, v, g)]
        for x in changed:
            x[:, t:] *= 3
        after, _ = gated_linear_attention(*changed)
        assert torch.equal(before[:, :t], after[:, :t]), t


def test_bad_shapes_are_refused():
    q, k, v, g, state = (x.detach() for x in inputs(2, 5, 3, 4, 6))
    with pytest.raises(ValueError, match=r"q, k and log_decay must have one shape"):
        gated_linear_attention(q, k[..., :3], v, g)
    with pytest.raises(ValueError, match=r"T >= 1"):
        gated_linear_attention(q[:, :0], k[:, :0], v[:, :0], g[:, :0])
    with pytest.raises(ValueError, match=r"v must be \[B, T, H, V\]"):
        gated_linear_attention(q, k, v[:, :4], g)
    with pytest.raises(ValueError, match=r"the state must be"):
        gated_linear_attention(q, k, v, g, initial_state=state[:1])
    with pytest.raises(ValueError, match=r"a step takes"):
        gated_linear_attention_step(q, k, v, state, g)
