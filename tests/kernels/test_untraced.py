"""Recurrences as operators: what torch.compile sees is what an eager call computes, gradients too."""

import pytest
import torch

from chela_plugin.kernels import gated_delta_rule as delta
from chela_plugin.kernels import gated_linear_attention as gla
from chela_plugin.kernels import selective_scan as scan
from chela_plugin.kernels.gated_delta_rule import ops as delta_ops
from chela_plugin.kernels.gated_linear_attention import ops as gla_ops
from chela_plugin.kernels.selective_scan import ops as scan_ops

B, T, H, K, V = 2, 70, 2, 3, 4


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def decays(*shape):
    return -torch.rand(*shape, dtype=torch.float64)


def cases():
    """(eager function, its operators, tensors, initial state)"""
    torch.manual_seed(0)
    q, k, v = draw(B, T, H, K), draw(B, T, H, K) / 2, draw(B, T, H, V)
    yield gla.gated_linear_attention, gla_ops, (q, k, v, decays(B, T, H, K)), draw(B, H, K, V)
    yield delta.gated_delta_rule, delta_ops, (q, k, v, torch.rand(B, T, H).double(), decays(B, T, H)), draw(B, H, K, V)
    scanned = (draw(B, T, 5), -decays(B, T, 5), decays(5, 3), draw(B, T, 3), draw(B, T, 3))
    yield scan.selective_scan, scan_ops, scanned, draw(B, 5, 3)


CASES = list(cases())
NAMES = [case[0].__name__ for case in CASES]


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(("function", "ops", "tensors", "state"), CASES, ids=NAMES)
def test_compiled_equals_eager_with_every_gradient(function, ops, tensors, state, with_state):
    def outcome(call):
        leaves = [t.clone().requires_grad_() for t in (*tensors, *([state] if with_state else []))]
        rest = {"initial_state": leaves[-1]} if with_state else {}
        o, last = call(*leaves[: len(tensors)], output_final_state=True, **rest)
        loss = o.square().sum() + last.square().sum()
        return o.detach(), last.detach(), *torch.autograd.grad(loss, leaves)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(outcome(compiled), outcome(function), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(("function", "ops", "tensors", "state"), CASES, ids=NAMES)
def test_operators_pass_opcheck(function, ops, tensors, state, with_state):
    given = [t.clone().requires_grad_() for t in (*tensors, state)]
    given = [*given[:-1], given[-1] if with_state else None, 1.0]
    torch.library.opcheck(ops.forward_op, given)
    plain = [t.detach() if isinstance(t, torch.Tensor) else t for t in given]
    do = torch.randn_like(ops.forward_op(*plain)[0])
    # Its results have no gradient: only what tracing asks for.
    torch.library.opcheck(ops.backward_op, (do, state, *plain), test_utils=("test_schema", "test_faketensor"))
