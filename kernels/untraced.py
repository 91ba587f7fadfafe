"""Operators out of plain functions that torch.compile can't follow: loops over chunks, other packages' kernels.

Traced, a loop over chunks is a graph for each length, and a kernel of another package breaks the graph. As an operator
the function is one node: its forward pass runs the function without a gradient, its backward pass runs it once more
with one, so that nothing but the inputs is kept. Eager calls and exports don't come here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

Run = Callable[..., tuple[Tensor, Tensor]]


def compiling() -> bool:
    """Whether a call is traced by dynamo, for torch.compile; torch.export, which by default does without it, is to see
    the definition's own operators. (In a trace of torch 2.11 `is_exporting()` is True whatever asked for it.)"""
    return torch.compiler.is_dynamo_compiling()


@contextmanager
def autograd() -> Iterator[None]:
    """Autograd inside an operator's own code, where torch leaves it out."""
    keys = (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.AutogradOther)
    left_out = [torch._C._dispatch_tls_is_dispatch_key_excluded(key) for key in keys]
    for key in keys:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for key, was in zip(keys, left_out, strict=True):
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, was)


def operator(name: str, inputs: Sequence[str], like: str, state: Sequence[str], run: Run) -> tuple[Callable, Callable]:
    """`chela::<name>(inputs, float scale) -> (output, last state)` and its backward operator.

    Args:
        inputs: names of the tensors that `run` takes, in its order; the last is an initial state and may be None.
        like: the input that the output is like.
        state: two of them, `[B, T, *rows]` and `[B, T, ..., width]`: the state is `[B, *rows, width]`, fp32 at least.
        run: `run(*tensors, scale)` to the output and the last state, differentiable.
    """
    arguments = ", ".join(f"Tensor {n}" for n in inputs[:-1]) + f", Tensor? {inputs[-1]}"
    at = {n: i for i, n in enumerate(inputs)}

    def forward(*arguments):
        with torch.no_grad():
            return tuple(x.contiguous() for x in run(*arguments))

    def backward(do, dstate, *arguments):
        *tensors, scale = arguments
        with autograd():
            leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
            outputs = run(*leaves, scale)
            wanted = [x for x in leaves if x is not None]
            found = iter(torch.autograd.grad(outputs, wanted, (do, dstate), allow_unused=True))
        grads = [None if x is None else next(found) for x in leaves]
        return [
            do.new_empty(0) if x is None else torch.zeros_like(x) if g is None else g.contiguous()
            for x, g in zip(tensors, grads, strict=True)
        ]

    forward_op = torch.library.custom_op(
        f"chela::{name}", forward, mutates_args=(), schema=f"({arguments}, float scale) -> (Tensor, Tensor)"
    )
    backward_op = torch.library.custom_op(
        f"chela::{name}_backward",
        backward,
        mutates_args=(),
        schema=f"(Tensor do, Tensor dstate, {arguments}, float scale) -> Tensor[]",
    )

    @forward_op.register_fake
    def _(*arguments):
        first, last, initial = arguments[at[state[0]]], arguments[at[state[1]]], arguments[len(inputs) - 1]
        out = arguments[at[like]]
        wide = torch.float64 if torch.float64 in {x.dtype for x in arguments[:-1] if x is not None} else torch.float32
        shape = (first.shape[0], *first.shape[2:], last.shape[-1])
        made = first.new_empty(shape if initial is None else initial.shape, dtype=wide)
        return out.new_empty(out.shape), made

    @backward_op.register_fake
    def _(do, dstate, *arguments):
        return [do.new_empty(0) if x is None else x.new_empty(x.shape) for x in arguments[:-1]]

    def keep(ctx, inputs, output):
        *tensors, ctx.scale = inputs
        ctx.save_for_backward(*tensors)

    def gradients(ctx, do, dstate):
        tensors = ctx.saved_tensors
        found = backward_op(do, dstate, *tensors, ctx.scale)
        return *(None if x is None else g for x, g in zip(tensors, found, strict=True)), None

    forward_op.register_autograd(gradients, setup_context=keep)
    return forward_op, backward_op
