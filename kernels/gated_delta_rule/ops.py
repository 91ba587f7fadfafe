"""What torch.compile sees of `gated_delta_rule`: one operator (`kernels/untraced.py`)."""

from __future__ import annotations

from torch import Tensor

from chela_plugin.kernels.untraced import operator

from . import gated_delta_rule


def _run(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    o, last = gated_delta_rule(q, k, v, beta, log_decay, scale=scale, initial_state=state, output_final_state=True)
    assert last is not None
    return o, last


forward_op, backward_op = operator(
    "gated_delta_rule", ("q", "k", "v", "beta", "log_decay", "initial_state"), "v", ("k", "v"), _run
)
