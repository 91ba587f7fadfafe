"""What torch.compile sees of `selective_scan`: one operator (`kernels/untraced.py`)."""

from __future__ import annotations

from torch import Tensor

from chela_plugin.kernels.untraced import operator

from . import selective_scan


def _run(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    y, last = selective_scan(u, delta, a, b, c, initial_state=state, output_final_state=True)
    assert last is not None
    return y * scale, last


forward_op, backward_op = operator(
    "selective_scan", ("u", "delta", "a", "b", "c", "initial_state"), "u", ("u", "b"), _run
)
