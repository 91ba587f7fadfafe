"""Norm and gate as torch operators: `chela::gated_norm` and its gradient. An empty tensor stands for what is absent."""

from __future__ import annotations

import torch
from torch import Tensor

from chela_plugin.kernels.backend import multiplied_as, ready_for
from chela_plugin.kernels.launching import Launcher
from chela_plugin.kernels.precision import as_type

from . import triton as kernels

norm, norm_gradient = Launcher(kernels.forward), Launcher(kernels.backward)
_INPUTS = "Tensor o, Tensor? v, Tensor? skip, Tensor weight, Tensor? gate"
# Backward, measured on an H100 (32,768 x 1,024, bf16, eight tensors of 64 MiB): blocks of 2,048 numbers 0.222 ms in 528
# programs, 0.231 in 2,048, 0.252 in 8,192; blocks of 4,096 0.241 in 512. Each leaves one partial sum of a weight.
BACKWARD_BLOCK = 2048
PROGRAMS = 528


def rows_of(x: Tensor, width: int) -> tuple[Tensor, int]:
    """`x` `[..., H, V]` or `[B, T, H V]` as rows of `width` dense numbers: where the first begins, and the stride
    between rows; of a copy where it can't be addressed so. A view of the rows would cost the host more than this."""
    if x.is_contiguous():
        return x, width
    dim, shape, stride = x.dim(), x.shape, x.stride()
    dense = stride[-1] == 1 and (
        shape[2] == width if dim == 3 else dim == 4 and (stride[2] == shape[3] or shape[2] == 1)
    )
    if dense and (shape[0] == 1 or stride[0] == shape[1] * stride[1]):
        return x, stride[1]
    return x.contiguous(), width


def blocks_of(width: int, size: int) -> tuple[int, int]:
    """Rows and columns of a block of `size` numbers."""
    columns = max(16, 1 << (width - 1).bit_length())
    return max(1, size // columns), columns


def forward(
    o: Tensor, v: Tensor | None, skip: Tensor | None, weight: Tensor, gate: Tensor | None, eps: float
) -> Tensor:
    heads, width = weight.shape
    o_rows, stride_o = rows_of(_computed(o), heads * width)
    v_rows, stride_v = (o_rows, 0) if v is None else rows_of(_computed(v), heads * width)
    g_rows, stride_g = (o_rows, 0) if gate is None else rows_of(_computed(gate), heads * width)
    rows = o.numel() // (heads * width)
    y = torch.empty(*o.shape[:-2], heads * width, dtype=o_rows.dtype, device=o.device)
    block, columns = blocks_of(width, 4096)
    with ready_for(o):
        norm(
            (-(-rows // block), heads), (o_rows, v_rows, weight if skip is None else skip, weight, g_rows, y),
            (rows, stride_o, stride_v, stride_g, eps),
            V=width, H=heads, SKIP=skip is not None, GATE=gate is not None, BR=block, BV=columns, num_warps=8,
        )  # fmt: skip
    return as_type(y, o.dtype)


def backward(
    dy: Tensor,
    o: Tensor,
    v: Tensor | None,
    skip: Tensor | None,
    weight: Tensor,
    gate: Tensor | None,
    eps: float,
    dgate: Tensor | None = None,
    with_dv: bool = True,
    y: Tensor | None = None,
    activated: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of o, v, skip, weight and gate.

    dgate: where the gate's is to be written, rows `[B T, H V]` of o's dtype. with_dv: False leaves out v's, which is
    skip times o's. y: where forward's result is to be written once more, dense, for who did not keep it. activated: the
    same for v, which is then given before its SiLU.
    """
    heads, width = weight.shape
    o_rows, stride_o = rows_of(_computed(o), heads * width)
    dy_rows, stride_dy = rows_of(_computed(dy), heads * width)
    v_rows, stride_v = (o_rows, 0) if v is None else rows_of(_computed(v), heads * width)
    g_rows, stride_g = (o_rows, 0) if gate is None else rows_of(_computed(gate), heads * width)
    rows = o.numel() // (heads * width)
    block, columns = blocks_of(width, BACKWARD_BLOCK)
    all_blocks = -(-rows // block)
    blocks = max(1, -(-all_blocks * heads // PROGRAMS))
    programs = -(-all_blocks // blocks)
    do = torch.empty(*o.shape, dtype=o_rows.dtype, device=o.device)
    dv = o.new_empty(0) if v is None or skip is None or not with_dv else torch.empty_like(do)
    if dgate is None:
        dgate = o.new_empty(0) if gate is None else torch.empty(*gate.shape, dtype=o_rows.dtype, device=o.device)
    dweight = torch.empty(programs, heads, width, dtype=torch.float32, device=o.device)
    dskip = torch.empty(programs, heads, dtype=torch.float32, device=o.device)
    with ready_for(o):
        norm_gradient(
            (programs, heads),
            (dy_rows, o_rows, v_rows, weight if skip is None else skip, weight, g_rows, do if y is None else y,
             do if activated is None else activated, do, dv, dgate, dweight, dskip),
            (rows, stride_dy, stride_o, stride_v, stride_g, 0 if gate is None else dgate.stride(-2), eps, blocks),
            V=width, H=heads, SKIP=skip is not None, DV=with_dv,
            GATE=gate is not None, Y=y is not None, SILU=activated is not None, BR=block, BV=columns, num_warps=8,
        )  # fmt: skip
    dskip = o.new_empty(0) if skip is None else as_type(dskip.sum(0), skip.dtype)
    dweight = as_type(dweight.sum(0), weight.dtype)
    return as_type(do, o.dtype), as_type(dv, o.dtype), dskip, dweight, as_type(dgate, o.dtype)


def _computed(x: Tensor) -> Tensor:
    return as_type(x, multiplied_as(x))


forward_op = torch.library.custom_op(
    "chela::gated_norm", forward, mutates_args=(), schema=f"({_INPUTS}, float eps) -> Tensor"
)
backward_op = torch.library.custom_op(
    "chela::gated_norm_backward",
    backward,
    mutates_args=(),
    schema=f"(Tensor dy, {_INPUTS}, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@forward_op.register_fake
def _forward_fake(o, v, skip, weight, gate, eps):
    return o.new_empty(*o.shape[:-2], o.shape[-2] * o.shape[-1])


@backward_op.register_fake
def _backward_fake(dy, o, v, skip, weight, gate, eps):
    # A tensor of its own for each: outputs that share one would be declared aliases.
    return (
        o.new_empty(o.shape),
        o.new_empty(0 if v is None or skip is None else v.shape),
        o.new_empty(0) if skip is None else skip.new_empty(skip.shape),
        weight.new_empty(weight.shape),
        o.new_empty(0 if gate is None else gate.shape),
    )


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx, dy):
    gradients = backward_op(dy, *ctx.saved_tensors, ctx.eps)
    wanted = ctx.needs_input_grad
    return *(x if want and x.numel() else None for x, want in zip(gradients, wanted[:5], strict=True)), None


forward_op.register_autograd(_gradient, setup_context=_setup)
