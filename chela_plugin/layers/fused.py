"""CHELA behind its convolution as one node of autograd: the eager path on a GPU, with its defaults.

The composed form (`chela.py`) is the definition. There every projection, activation and sum is a node and a pass of its
own; at width 1,024 and 32,768 tokens the host then takes twice as long to launch a layer as the device to run it. Here:

    [q' k' g] = Z [Wq Wk Wg]'        [v' t'] = X [Wv Wt]'         two products
    q, k, v = SiLU(q', k', v'), log_decay = -softplus(t' + b)     one pass (kernels/qkv_activation)
    O = attention(q, k, v, log_decay)
    Y = (RMSNorm_head(O + d v) * SiLU(g)) Wo'                     one pass (kernels/gated_norm) and a product

and backward the gradients of [q' k' g] and [v' t'] are written into one buffer each, so that Z and X get theirs from
one product each instead of sums of several. Of what the forward pass made, q, k, v and Y are not kept, three of a
block's 19 tensors: the norm's backward pass writes v and Y once more, q and k take a pass of their own. Kernels are
called as functions: what torch would ask of an operator (a fake, a gradient) only this node needs.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from chela_plugin.kernels.backend import backend, multiplied_as, traced
from chela_plugin.kernels.precision import as_type

EPS = 1e-5  # of the norm, as `gated_norm` has it


class Shape(NamedTuple):
    """What is no tensor."""

    heads: int
    keys: int
    values: int
    causal: bool


def fusible(x: Tensor, linears: tuple[nn.Module, ...], *parameters: Tensor) -> bool:
    """Whether the node can stand for the modules: eager, Triton, plain linear layers without hooks, one dtype.

    A hooked or replaced linear layer (an adapter, a parametrization, a tensor-parallel one) is called as a module.
    """
    if backend(x.device, x.dtype) != "triton" or traced(x) or not x.numel() or multiplied_as(x) != x.dtype:
        return False
    autocast = x.is_cuda and torch.is_autocast_enabled("cuda")
    for linear in linears:
        if type(linear) is not nn.Linear or linear._forward_hooks or linear._forward_pre_hooks:
            return False
        weight = linear._parameters.get("weight")  # not through torch's slow __getattr__
        if linear._backward_hooks or linear._backward_pre_hooks or type(weight) is not nn.Parameter:
            return False
        if weight.dtype != x.dtype and not autocast:
            return False
    return all(p.device == x.device for p in parameters)


class FusedAttention(torch.autograd.Function):
    """`(x, z)` to the layer's output, both `[B, T, D]`; dt's weight and bias None without a decay."""

    @staticmethod
    def forward(ctx, x, z, q, k, g, v, dt, bias, head_norm, skip, proj, shape: Shape, learns: bool):
        from chela_plugin.kernels.gated_norm import ops as norm
        from chela_plugin.kernels.linear_attention import ops as attention
        from chela_plugin.kernels.qkv_activation import launch as activation

        batch, time, dim = x.shape
        heads, keys, values, causal = shape
        with exactly(x):
            x_rows, z_rows = x.reshape(-1, dim), z.reshape(-1, dim)
            z_weight, x_weight = joined(x.dtype, q, k, g), joined(x.dtype, v, dt, multiple=16)
            from_z, from_x = z_rows @ z_weight.T, x_rows @ x_weight.T
            q_heads, k_heads, v_heads, log_decay = activation.activate(from_z, from_x, bias, heads, keys, values)
            rows = (batch, time, heads)
            q_heads, k_heads, v_heads = (h.view(*rows, h.shape[-1]) for h in (q_heads, k_heads, v_heads))
            log_decay = None if log_decay is None else log_decay.view(rows)
            o, state, saved = attention.forward(
                q_heads, k_heads, v_heads, log_decay, None, None, None, keys**-0.5, causal, False, learns
            )
            gate = from_z[:, 2 * heads * keys :].view(batch, time, -1)
            y = norm.forward(o, v_heads, skip, head_norm, gate, EPS)
            out_weight = proj.to(x.dtype)
            out = y.view(-1, heads * values) @ out_weight.T
        if learns:
            ctx.shape = shape
            # Where autocast casts weights, the casts are kept as its own linear layers keep them; else they are cheap.
            weights = (z_weight, x_weight, out_weight) if proj.dtype != x.dtype else (None, None, None)
            tensors = (*weights, log_decay, state, saved, from_z, from_x, o)
            ctx.save_for_backward(x, z, q, k, g, v, dt, bias, head_norm, skip, proj, *tensors)
        return out.view(batch, time, -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        from chela_plugin.kernels.gated_norm import ops as norm
        from chela_plugin.kernels.linear_attention import ops as attention
        from chela_plugin.kernels.qkv_activation import launch as activation

        x, z, q, k, g, v, dt, bias, head_norm, skip, proj, *tensors = ctx.saved_tensors
        z_weight, x_weight, out_weight, log_decay, state, saved, from_z, from_x, o = tensors
        heads, keys, values, causal = ctx.shape
        batch, time, dim = x.shape
        x_rows, z_rows = x.reshape(-1, dim), z.reshape(-1, dim)
        with exactly(x):
            if z_weight is None:
                z_weight, x_weight = joined(x.dtype, q, k, g), joined(x.dtype, v, dt, multiple=16)
                out_weight = proj
            dout = dout.to(x.dtype).reshape(-1, dout.shape[-1])
            dy = (dout @ out_weight).view(batch, time, -1)
            y, v_heads, dfrom_z = torch.empty_like(dy), torch.empty_like(o), torch.empty_like(from_z)
            gate = from_z[:, 2 * heads * keys :].view(batch, time, -1)
            before = from_x[:, : heads * values].view(o.shape)
            do, _, dskip, dhead_norm, _ = norm.backward(
                dy, o, before, skip, head_norm, gate, EPS, dfrom_z[:, 2 * heads * keys :], False, y, v_heads
            )
            dproj = product(dout.T, y.view(-1, heads * values), proj.dtype)
            del y, dy
            q_heads, k_heads = (h.view(*o.shape[:3], keys) for h in activation.activate_qk(from_z, heads, keys))
            dq, dk, dv, dlog_decay, _ = attention.backward(
                q_heads, k_heads, v_heads, log_decay, None, None, None, state, saved, do, None, keys**-0.5, causal
            )
            dfrom_x = torch.empty_like(from_x)
            if dt is None and from_x.shape[1] > heads * values:  # with a decay its pass does this
                dfrom_x[:, heads * values :] = 0
            dbias = activation.gradient(dq, dk, dv, do, dlog_decay, from_z, from_x, bias, skip, dfrom_z, dfrom_x)
            dz = (dfrom_z @ z_weight).view(z.shape)
            dx = (dfrom_x @ x_weight).view(x.shape)
            dz_weight, dx_weight = product(dfrom_z.T, z_rows, q.dtype), product(dfrom_x.T, x_rows, v.dtype)
            dq_weight, dk_weight, dg_weight = dz_weight.split([len(q), len(k), len(g)])
            dv_weight, ddt_weight = dx_weight.split([len(v), from_x.shape[1] - len(v)])
        return (
            dx,
            dz,
            as_type(dq_weight, q.dtype),
            as_type(dk_weight, k.dtype),
            as_type(dg_weight, g.dtype),
            as_type(dv_weight, v.dtype),
            None if dt is None else as_type(ddt_weight[: dt.shape[0]], dt.dtype),
            None if bias is None or dbias is None else as_type(dbias, bias.dtype),
            dhead_norm,
            dskip,
            dproj,
            None,
            None,
        )


def exactly(x: Tensor) -> AbstractContextManager:
    """No autocast; entering its context costs the host as much as a launch, so not where there is none."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """`a @ b` in dtype; fp32 of 16-bit matrices on a GPU comes from the product itself, unrounded, in no pass more."""
    if a.is_cuda and dtype == torch.float32 and a.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def joined(dtype: torch.dtype, *weights: Tensor | None, multiple: int = 1) -> Tensor:
    """The weights below one another, `[rows, D]`, with more rows up to a multiple.

    Triton reads 16 bytes at once only where it knows that a stride is a multiple of 16 numbers. The rows are any
    weights, one launch less than zeros: nothing reads what comes of them, and its gradient is 0.
    """
    there = [w for w in weights if w is not None]
    missing = -sum(w.shape[0] for w in there) % multiple
    if missing:
        first = there[0]
        there.append(first[:missing] if first.shape[0] >= missing else first.new_zeros(missing, first.shape[1]))
    return as_type(torch.cat(there) if len(there) > 1 else there[0], dtype)
