"""Linear attention, causal with or without decay and bidirectional: `linear_attention` and `linear_attention_step`.

`reference.py` is the definition, `triton.py` and `triton_bidirectional.py` the kernels (with the two-level scheme and
what is computed again), `launch.py` and `configs.py` how they are launched, `ops.py` what torch sees of them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from chela_plugin.kernels.backend import backend, environment, may_read, multiplied_as, precision, traced
from chela_plugin.kernels.packing import check_cu_seqlens, unread
from chela_plugin.kernels.precision import without_autocast

from . import reference
from .configs import LARGEST_PASSED, passed

if TYPE_CHECKING:
    from .launch import Whole

__all__ = ["backend", "linear_attention", "linear_attention_step"]

MAX_WIDTH = 256


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention over a sequence, in time linear in T. Differentiable in every floating-point argument.

        causal:         o_t = scale * ( exp(g_t) q_t S_0 + sum_{s <= t} exp(g_t - g_s) (q_t . k_s) v_s )
        bidirectional:  o_t = scale * q_t ( S_0 + sum_s k_s^T v_s )

    Args:
        q, k: `[B, T, H, K]`, K up to 256; fp16, bf16, fp32 or (plain PyTorch only) fp64, all of one dtype.
        v: `[B, T, H, V]`, V up to 256.
        log_decay: natural logarithm of the decay per step, at most 0, in q's dtype or fp32: `[H]`, or `[B, T, H]`, the
            factor by which the state shrinks before token t is added. `g` is its running sum. Needs `causal`.
            Its sign is checked; on a CUDA device, where to read it is to wait for the stream, at the first call of a
            kind (static or per token, heads, dtype) and under `CHELA_CHECK=1`; else a decay above 0 yields NaN there.
        causal: token t sees tokens up to t; else every token sees every token.
        scale: factor on the output; default K ** -0.5.
        initial_state: S_0 `[B, H, K, V]` (`[N, H, K, V]` with cu_seqlens), fp32 (fp64 for fp64 inputs).
        output_final_state: also return the state after the last token.
        cu_seqlens: `[N + 1]` integers from 0 to T: B is 1 and N sequences lie behind one another, as in FlashAttention.
            Its values are checked once for each tensor.
        mask: `[B, T]` bool, True where there is a token. The others add nothing to the state and do not decay it.

    Returns:
        `(o, state)`: o `[B, T, H, V]` in q's dtype; state `[B, H, K, V]` fp32 (fp64), or None unless asked for.

    Raises:
        ValueError: shapes, dtypes or values that do not fit, before anything runs.
    """
    kind = None
    usual = causal and initial_state is None and cu_seqlens is None and mask is None
    if usual and (scale is None or type(scale) is float) and not traced(q):
        kind = _kind_of_call(q, k, v, log_decay, scale, output_final_state)
        known = passed.get(kind)
        if known is not None:
            found = _again(known, q, k, v, log_decay, output_final_state)
            if found is not None:
                return found
    check_inputs(q, k, v, log_decay, causal, scale, initial_state, cu_seqlens, mask)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    triton = backend(q.device, q.dtype) == "triton"
    if mask is not None and (causal or not triton):
        k = k.masked_fill(~mask[..., None, None], 0.0)
        if log_decay is not None:
            log_decay = log_decay.expand(*q.shape[:3]).masked_fill(~mask[..., None], 0.0)
        mask = None
    if triton:
        result = _triton(q, k, v, log_decay, causal, scale, initial_state, output_final_state, cu_seqlens, mask)
        if kind is not None:
            _remember(kind, q, k, v, log_decay, scale, output_final_state)
        return result
    with without_autocast(q):
        if cu_seqlens is not None:
            o, state = reference.packed(q, k, v, log_decay, scale, initial_state, cu_seqlens.tolist(), causal)
        elif causal:
            o, state = reference.chunked(q, k, v, log_decay, scale, initial_state)
        else:
            o, state = reference.bidirectional(q, k, v, scale, initial_state)
    return o, state if output_final_state else None


def _kind_of_call(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, scale: float | None, want_state: bool
) -> tuple:
    """All that the checks and the launch of a causal call depend on, but for values and addresses."""
    decays = None
    if log_decay is not None:
        decays = log_decay.shape, log_decay.stride(), log_decay.dtype, log_decay.device, environment("CHELA_CHECK")
    return (
        q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype,
        q.device, k.device, v.device, decays, scale, want_state, environment("CHELA_BACKEND"),
        precision(q.dtype), None if q.is_cuda else environment("TRITON_INTERPRET"),
    )  # fmt: skip


def _remember(
    kind: tuple, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, scale: float, want_state: bool
) -> None:
    """That calls of this kind have passed the checks, unless the sign of their decay is to be read each time."""
    from . import launch

    if multiplied_as(q) != q.dtype or (log_decay is not None and _sign_is_read(log_decay)):
        return
    if log_decay is not None and _kind(log_decay) not in _right_kinds:  # not read yet, as while a graph is captured
        return
    known = launch.whole(q, k, v, log_decay, None, scale, want_state)
    if known is not None:
        if len(passed) >= LARGEST_PASSED:
            passed.clear()
        passed[kind] = known


def _again(
    known: Whole, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, want_state: bool
) -> tuple[Tensor, Tensor | None] | None:
    """A call of a kind that has passed the checks, or None where it takes more than a launch."""
    if torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or (log_decay is not None and log_decay.requires_grad)
    ):
        from . import ops

        return ops.Eager.apply(q, k, v, log_decay, None, None, None, known.scale, True, want_state)
    if known.cuda >= 0 and known.cuda != torch._C._cuda_getDevice():
        return None
    return known.run(q, k, v, log_decay, None)


def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    causal: bool,
    scale: float,
    initial_state: Tensor | None,
    want_state: bool,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    from . import ops

    K, V = q.shape[3], v.shape[3]
    row = 16 // q.element_size()  # tensor descriptors move rows of whole 16 bytes
    pad_K, pad_V = -K % row, -V % row
    if pad_K or pad_V:
        q, k, v = pad(q, (0, pad_K)), pad(k, (0, pad_K)), pad(v, (0, pad_V))
        initial_state = None if initial_state is None else pad(initial_state, (0, pad_V, 0, pad_K))
    save = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, log_decay, initial_state)
    )
    arguments = (q, k, v, log_decay, initial_state, cu_seqlens, mask, scale, causal, want_state)
    state: Tensor | None
    if traced(q):
        o, state, _ = ops.forward_op(*arguments, save)
    elif save:
        o, state = ops.Eager.apply(*arguments)
    else:
        o, state, _ = ops.forward(*arguments, False)
    if not want_state:  # an operator has an empty tensor in its place
        state = None
    if pad_K or pad_V:
        return o[..., :V], None if state is None else state[..., :K, :V]
    return o, state


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    *,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """One token of causal linear attention: `state = exp(log_decay) * state + k^T v`, `o = scale * q state`.

    Args:
        q, k: `[B, H, K]`; v: `[B, H, V]`; one dtype, widths up to 256.
        state: `[B, H, K, V]` fp32 (fp64 for fp64 inputs); not modified unless `in_place`.
        Where a gradient is asked for, plain PyTorch runs; training goes through `linear_attention`.
        log_decay: `[H]` or `[B, H]`, at most 0.
        scale: factor on the output; default K ** -0.5.
        in_place: allow the state to be overwritten, which spares a graph of steps a copy; where the kernel runs it is.

    Returns:
        `(o, state)`: o `[B, H, V]` in q's dtype, and the new state.

    Raises:
        ValueError: shapes, dtypes or values that do not fit.
    """
    kind = None
    plain = (scale is None or type(scale) is float) and not traced(q)
    if plain and state is not None and (log_decay is None or not may_read(log_decay)):
        given = (q, k, v, state) if log_decay is None else (q, k, v, state, log_decay)
        kind = (scale, *[x.shape for x in given], *[x.dtype for x in given], *[x.device for x in given])
    if kind is None or kind not in _right_steps:
        check_step(q, k, v, state, log_decay, scale)
        if kind is not None and (log_decay is None or _kind(_of_step(log_decay)) in _right_kinds):
            if len(_right_steps) >= LARGEST_PASSED:
                _right_steps.clear()
            _right_steps.add(kind)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    tensors = (q, k, v, state, log_decay)
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    if learns or backend(q.device, q.dtype) == "reference":
        with without_autocast(q):
            return reference.step(q, k, v, state, log_decay, scale)
    from . import ops

    if traced(q):
        return ops.step_op(q, k, v, state, log_decay, scale)
    return ops.step(q, k, v, state, log_decay, scale, in_place)


def check_step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, log_decay: Tensor | None, scale: float | None
) -> None:
    """Raise ValueError, saying what to do, unless the arguments of `linear_attention_step` fit together."""
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3:
        raise ValueError(
            f"linear_attention_step takes one token: q, k [B, H, K] and v [B, H, V], "
            f"got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if state is None or state.dim() != 4:
        raise ValueError("linear_attention_step needs a state of shape [B, H, K, V]; zeros to start with")
    decays = None if log_decay is None else _of_step(log_decay)
    check_inputs(q[:, None], k[:, None], v[:, None], decays, True, scale, state, None, None)


def _of_step(log_decay: Tensor) -> Tensor:
    """As a whole sequence has it: `[H]`, or `[B, 1, H]` of `[B, H]`."""
    return log_decay[:, None] if log_decay.dim() == 2 else log_decay


_right_steps: set[tuple] = set()  # kinds of steps that were checked
_right_kinds: set[tuple] = set()


def _kind(log_decay: Tensor) -> tuple:
    return log_decay.dim(), log_decay.shape[-1], log_decay.dtype, log_decay.device


def _sign_is_read(log_decay: Tensor) -> bool:
    """On a CUDA device a first call compiles or loads kernels, so that waiting for the stream costs nothing more there;
    a wrong sign, or a factor in place of its logarithm, shows at once."""
    if may_read(log_decay):
        return True
    if traced(log_decay) or not log_decay.is_cuda or _kind(log_decay) in _right_kinds:
        return False
    return not torch.cuda.is_current_stream_capturing()


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    causal: bool,
    scale: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
) -> None:
    """Raise ValueError, saying what to do, unless the arguments of `linear_attention` fit together."""
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(
            f"q, k and v must be [B, T, H, width], got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if q.shape != k.shape:
        raise ValueError(f"q and k must have one shape, got {list(q.shape)} and {list(k.shape)}")
    if v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v must agree with q in [B, T, H] = {list(q.shape[:3])}, got {list(v.shape[:3])}")
    batch, time, heads, key_width = q.shape
    value_width = v.shape[3]
    if time == 0 or batch == 0 or heads == 0:
        raise ValueError(f"q has no tokens: its shape is {list(q.shape)}")
    for name, width in (("K", key_width), ("V", value_width)):
        if not 0 < width <= MAX_WIDTH:
            raise ValueError(f"{name} must be 1 to {MAX_WIDTH}, got {width}: use more heads of a smaller width")
    if not q.dtype.is_floating_point or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k and v must have one floating-point dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if k.device != q.device or v.device != q.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")
    if scale is not None and (scale == 0 or not math.isfinite(scale)):
        raise ValueError(f"scale must be finite and not 0, got {scale}")
    if log_decay is not None:
        if not causal:
            raise ValueError("log_decay needs causal=True: bidirectional attention has no decay")
        if log_decay.shape not in ((heads,), (batch, time, heads)):
            raise ValueError(
                f"log_decay must be [H] = [{heads}] or [B, T, H] = {[batch, time, heads]}, got {list(log_decay.shape)}"
            )
        if log_decay.dtype not in (q.dtype, reference.state_dtype(q.dtype)):
            raise ValueError(f"log_decay must be {q.dtype} or {reference.state_dtype(q.dtype)}, got {log_decay.dtype}")
        if log_decay.device != q.device:
            raise ValueError(f"log_decay must be on {q.device} like q, got {log_decay.device}")
        if _sign_is_read(log_decay):
            if bool((log_decay > 0).any()):
                raise ValueError(
                    f"log_decay must be at most 0 (the state may only shrink), got {float(log_decay.max()):.3g}; "
                    "logsigmoid(x) or -softplus(x) gives a valid one"
                )
            if log_decay.is_cuda:
                _right_kinds.add(_kind(log_decay))
    rows = batch
    if cu_seqlens is not None:
        if cu_seqlens.device != q.device:
            raise ValueError(f"cu_seqlens must be on {q.device} like q, got {cu_seqlens.device}")
        check_cu_seqlens(cu_seqlens, batch, time, read=unread(cu_seqlens, time))
        if mask is not None:
            raise ValueError("cu_seqlens goes without mask: leave the padding out")
        rows = len(cu_seqlens) - 1
    if initial_state is not None:
        wanted = [rows, heads, key_width, value_width]
        if list(initial_state.shape) != wanted:
            raise ValueError(f"the state must have shape {wanted}, got {list(initial_state.shape)}")
        if initial_state.dtype != reference.state_dtype(q.dtype):
            raise ValueError(f"the state must be {reference.state_dtype(q.dtype)}, got {initial_state.dtype}")
        if initial_state.device != q.device:
            raise ValueError(f"the state must be on {q.device} like q, got {initial_state.device}")
    if mask is not None:
        if mask.shape != (batch, time) or mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool [B, T] = {[batch, time]}, got {mask.dtype} {list(mask.shape)}")
        if mask.device != q.device:
            raise ValueError(f"mask must be on {q.device} like q, got {mask.device}")
