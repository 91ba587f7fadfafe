"""gated_delta_rule: the chunked form against its definition and against fla's naive loop."""

import pytest
import torch
from torch.nn import functional as F

from chela_plugin.kernels.gated_delta_rule import gated_delta_rule, gated_delta_rule_step, reference

# Odd lengths and widths, one token, whole and cut chunks of 64.
SHAPES = [(2, 1, 1, 3, 5), (1, 2, 2, 4, 4), (2, 37, 3, 5, 7), (1, 64, 1, 8, 3), (1, 131, 2, 6, 9)]


def inputs(batch, time, heads, keys, values, dtype=torch.float64, strongest=1.0):
    torch.manual_seed(time)
    q, k = F.normalize(torch.randn(2, batch, time, heads, keys, dtype=dtype), dim=-1)
    v = torch.randn(batch, time, heads, values, dtype=dtype)
    beta = torch.rand(batch, time, heads, dtype=dtype)
    log_decay = -strongest * torch.rand(batch, time, heads, dtype=dtype)
    state = torch.randn(batch, heads, keys, values, dtype=dtype)
    return [x.requires_grad_() for x in (q, k, v, beta, log_decay, state)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("strongest", [0.01, 1.0, 300.0])
def test_chunked_form_equals_the_definition_with_every_gradient(shape, strongest, outputs_and_gradients):
    tensors = inputs(*shape, strongest=strongest)
    got = outputs_and_gradients(
        lambda q, k, v, b, g, s: gated_delta_rule(q, k, v, b, g, scale=0.3, initial_state=s, output_final_state=True),
        tensors,
    )
    wanted = outputs_and_gradients(
        lambda q, k, v, b, g, s: reference.recurrent(q, k, v, b, g, scale=0.3, initial_state=s), tensors
    )
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-11)  # fp64; a solve of 64 rows


def test_it_equals_the_naive_loop_of_fla():
    naive = pytest.importorskip("fla.ops.gated_delta_rule.naive").naive_recurrent_gated_delta_rule
    q, k, v, beta, g, state = (x.detach().float() for x in inputs(2, 70, 3, 8, 5))
    o, final = gated_delta_rule(q, k, v, beta, g, initial_state=state, output_final_state=True)
    wanted, wanted_final = naive(q, k, v, beta, g, initial_state=state, output_final_state=True)
    torch.testing.assert_close(o, wanted, rtol=1e-4, atol=1e-5)  # both in fp32
    torch.testing.assert_close(final, wanted_final, rtol=1e-4, atol=1e-5)


def test_the_same_key_written_twice_at_full_strength_returns_the_second_value():
    key = F.normalize(torch.randn(1, 1, 1, 8, dtype=torch.float64), dim=-1).expand(1, 2, 1, 8)
    v = torch.randn(1, 2, 1, 4, dtype=torch.float64)
    ones, zeros = torch.ones(1, 2, 1, dtype=torch.float64), torch.zeros(1, 2, 1, dtype=torch.float64)
    o, _ = gated_delta_rule(key, key, v, ones, zeros, scale=1.0)
    torch.testing.assert_close(o, v, rtol=1e-12, atol=1e-12)


def test_steps_equal_the_sequence():
    q, k, v, beta, g, state = (x.detach() for x in inputs(2, 9, 3, 5, 7))
    wanted, final = gated_delta_rule(q, k, v, beta, g, initial_state=state, output_final_state=True)
    for t in range(9):
        o, state = gated_delta_rule_step(q[:, t], k[:, t], v[:, t], state, beta[:, t], g[:, t])
        torch.testing.assert_close(o, wanted[:, t], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


def test_future_tokens_do_not_change_the_past():
    q, k, v, beta, g, _ = (x.detach().float() for x in inputs(1, 131, 2, 6, 9))
    before, _ = gated_delta_rule(q, k, v, beta, g)
    for t in (1, 63, 64, 100, 130):
        changed = [x.clone() for x in (q, k, v, beta, g)]
        for x in changed:
            x[:, t:] *= 0.5
        after, _ = gated_delta_rule(*changed)
        assert torch.equal(before[:, :t], after[:, :t]), t


def test_bad_shapes_are_refused():
    q, k, v, beta, g, state = (x.detach() for x in inputs(2, 5, 3, 4, 6))
    with pytest.raises(ValueError, match=r"q and k must have one shape"):
        gated_delta_rule(q, k[..., :3], v, beta, g)
    with pytest.raises(ValueError, match=r"v must be \[B, T, H, V\]"):
        gated_delta_rule(q, k, v[:, :4], beta, g)
    with pytest.raises(ValueError, match=r"beta and log_decay must be"):
        gated_delta_rule(q, k, v, beta, g[..., :2])
    with pytest.raises(ValueError, match=r"the state must be"):
        gated_delta_rule(q, k, v, beta, g, initial_state=state[:1])
    with pytest.raises(ValueError, match=r"a step takes"):
        gated_delta_rule_step(q, k, v, state, beta, g)
