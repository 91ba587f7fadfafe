"""selective_scan: the chunked form, whose backward is written by hand, against its definition."""

import pytest
import torch

from chela_plugin.kernels.selective_scan import reference, selective_scan, selective_scan_step

# (B, T, D, N): one token, up to and past a block of 8 and a chunk of 32, odd widths.
SHAPES = [(2, 1, 3, 2), (1, 2, 1, 1), (2, 8, 3, 4), (1, 9, 5, 3), (2, 33, 5, 3), (1, 131, 4, 2)]


def inputs(batch, time, channels, states, dtype=torch.float64, fastest=1.0):
    torch.manual_seed(time)
    u = torch.randn(batch, time, channels, dtype=dtype)
    delta = torch.rand(batch, time, channels, dtype=dtype)
    a = -fastest * torch.rand(channels, states, dtype=dtype)
    b, c = torch.randn(2, batch, time, states, dtype=dtype)
    state = torch.randn(batch, channels, states, dtype=dtype)
    return [x.requires_grad_() for x in (u, delta, a, b, c, state)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fastest", [0.01, 1.0, 300.0])
def test_chunked_form_equals_the_definition_with_every_gradient(shape, fastest, outputs_and_gradients):
    tensors = inputs(*shape, fastest=fastest)
    got = outputs_and_gradients(
        lambda u, d, a, b, c, s: selective_scan(u, d, a, b, c, initial_state=s, output_final_state=True), tensors
    )
    wanted = outputs_and_gradients(
        lambda u, d, a, b, c, s: reference.recurrent(u, d, a, b, c, initial_state=s), tensors
    )
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)  # fp64; sums of some hundred terms


def test_gradients_pass_gradcheck():
    tensors = inputs(1, 11, 2, 3)
    assert torch.autograd.gradcheck(
        lambda u, d, a, b, c, s: selective_scan(u, d, a, b, c, initial_state=s, output_final_state=True), tensors
    )


def test_it_equals_a_sum_over_all_pairs_of_tokens():
    u, delta, a, b, c, _ = (x.detach() for x in inputs(1, 13, 3, 2))
    since = delta.cumsum(1)
    wanted = torch.zeros_like(u)
    for t in range(13):
        for s in range(t + 1):
            decay = ((since[:, t] - since[:, s])[..., None] * a).exp()
            wanted[:, t] += (decay * (delta[:, s] * u[:, s])[..., None] * (b[:, s] * c[:, t])[:, None]).sum(-1)
    y, state = selective_scan(u, delta, a, b, c)
    assert state is None
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("time", [1, 7, 8, 9, 64, 65, 100])
@pytest.mark.parametrize("reverse", [False, True])
def test_linear_recurrence_runs_either_way(time, reverse):
    a, b = torch.rand(2, time, 3, dtype=torch.float64)
    wanted, h = torch.empty_like(b), torch.zeros(3, dtype=torch.float64)
    for t in reversed(range(time)) if reverse else range(time):
        wanted[t] = h = a[t] * h + b[t]
    got = reference.linear_recurrence(a.clone(), b.clone(), reverse)
    torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-13)


def test_steps_equal_the_sequence():
    u, delta, a, b, c, state = (x.detach() for x in inputs(2, 9, 5, 3))
    wanted, final = selective_scan(u, delta, a, b, c, initial_state=state, output_final_state=True)
    for t in range(9):
        y, state = selective_scan_step(u[:, t], delta[:, t], a, b[:, t], c[:, t], state)
        torch.testing.assert_close(y, wanted[:, t], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


def test_future_tokens_do_not_change_the_past():
    u, delta, a, b, c, _ = (x.detach().float() for x in inputs(1, 131, 4, 2))
    before, _ = selective_scan(u, delta, a, b, c)
    for t in (1, 31, 32, 100, 130):
        changed = [x.clone() for x in (u, delta, b, c)]
        for x in changed:
            x[:, t:] *= 3
        after, _ = selective_scan(changed[0], changed[1], a, changed[2], changed[3])
        assert torch.equal(before[:, :t], after[:, :t]), t


def test_bad_shapes_are_refused():
    u, delta, a, b, c, state = (x.detach() for x in inputs(2, 5, 3, 4))
    with pytest.raises(ValueError, match=r"u and delta must have one shape"):
        selective_scan(u, delta[:, :4], a, b, c)
    with pytest.raises(ValueError, match=r"a must be \[D, N\]"):
        selective_scan(u, delta, a[:2], b, c)
    with pytest.raises(ValueError, match=r"b and c must be"):
        selective_scan(u, delta, a, b, c[..., :3])
    with pytest.raises(ValueError, match=r"the state must be"):
        selective_scan(u, delta, a, b, c, initial_state=state[:1])
    with pytest.raises(ValueError, match=r"a step takes"):
        selective_scan_step(u, delta, a, b, c, state)
