"""Relative error of every op against fp64, beside a peer's on the same inputs, ordinary and adversarial.

    python benchmarks/numerics.py [--device cuda] [--out FILE] [--revision R] [--time T] [--jobs N]

Error of an output or gradient: norm of the difference over norm of the fp64 definition, on the same rounded inputs.
Peers: flash-linear-attention on a GPU where it is installed, each of its kernels in the first configuration of its
search (which takes minutes, and no time is read here); and the op's formula written with torch's own products in the
dtype of the inputs (torch). Also: 20 runs bit for bit, rows of nothing but padding, T = 1, and on a GPU T = 1,048,576,
forward and backward, with the time per token beside T = 32,768. The last lines say where ours is worse than a peer.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tables import markdown
from torch import Tensor

from chela_plugin.bench.timing import conditions
from chela_plugin.kernels.gated_delta_rule import gated_delta_rule
from chela_plugin.kernels.gated_linear_attention import gated_linear_attention
from chela_plugin.kernels.linear_attention import linear_attention, linear_attention_step
from chela_plugin.kernels.long_conv import long_conv
from chela_plugin.kernels.selective_scan import selective_scan

Op = Callable[..., Tensor]
WIDTH = 64
HEADS = 4
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KEPT = ("log_decay", "a", "delta", "beta")  # fp32 beside inputs of any dtype
ADVERSARIES = ["normal", "large", "tiny", "equal tokens", "decay near 1", "decay near 0", "T = 1"]


class Case(NamedTuple):
    """inputs: names with widths of what is `[B, T, H, width]`. decay: 'none', 'head', 'token' or 'channel'."""

    op: str
    form: str
    decay: str
    ours: Op
    torch: Op | None
    fla: Op | None


def causal(q, k, v, log_decay=None, **_):
    return linear_attention(q, k, v, log_decay)[0]


def bidirectional(q, k, v):
    return linear_attention(q, k, v, causal=False)[0]


def carried(q, k, v, log_decay=None):
    """Prefill in two parts, the state handed on."""
    cut = q.shape[1] // 2
    if cut == 0:
        return causal(q, k, v, log_decay)
    first, second = (
        [None if x is None else x if x.dim() == 1 else x[:, s] for x in (q, k, v, log_decay)]
        for s in (slice(0, cut), slice(cut, None))
    )
    o, state = linear_attention(*first, output_final_state=True)
    return torch.cat((o, linear_attention(*second, initial_state=state)[0]), 1)


def steps(q, k, v, log_decay=None):
    state = torch.zeros(
        q.shape[0], HEADS, WIDTH, WIDTH, device=q.device, dtype=torch.promote_types(q.dtype, torch.float32)
    )
    out = []
    for t in range(q.shape[1]):
        now = None if log_decay is None else log_decay[:, t]
        o, state = linear_attention_step(q[:, t], k[:, t], v[:, t], state, now)
        out.append(o)
    return torch.stack(out, 1)


def quadratic(q, k, v, log_decay=None, look_ahead=False):
    """All pairs, with torch's products in the dtype of the inputs."""
    scores = torch.einsum("bthk,bshk->bhts", q, k) * WIDTH**-0.5
    time = q.shape[1]
    past = torch.ones(time, time, dtype=torch.bool, device=q.device).tril()
    if log_decay is not None:
        log_decay = log_decay.expand(*q.shape[:3]) if log_decay.dim() == 1 else log_decay
        g = log_decay.cumsum(1).transpose(1, 2)
        scores = scores * (g[..., :, None] - g[..., None, :]).masked_fill(~past, 0).exp().to(scores.dtype)
    scores = scores if look_ahead else scores.masked_fill(~past, 0)
    return torch.einsum("bhts,bshv->bthv", scores, v)


def convolved(x, taps):
    """Through rfft in fp32, as one would write it in torch."""
    size = 2 * x.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    spectrum = torch.fft.rfft(x.to(wide), size, 1) * torch.fft.rfft(taps.to(wide).t(), size, 0)
    return torch.fft.irfft(spectrum, size, 1)[:, : x.shape[1]].to(x.dtype)


def recurrent(q, k, v, log_decay, beta=None):
    """One token after another: decay by head or by channel; with beta, the delta rule."""
    state = q.new_zeros(q.shape[0], HEADS, WIDTH, WIDTH)
    out = []
    for t in range(q.shape[1]):
        decay = log_decay[:, t].exp().to(q.dtype)
        state = state * (decay[..., None, None] if decay.dim() == 2 else decay[..., None])
        value = v[:, t]
        if beta is not None:
            value = (value - torch.einsum("bhk,bhkv->bhv", k[:, t], state)) * beta[:, t, :, None].to(q.dtype)
        state = state + k[:, t, :, :, None] * value[:, :, None]
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) * WIDTH**-0.5)
    return torch.stack(out, 1)


def scanned(u, delta, a, b, c):
    """Mamba's recurrence, one token after another."""
    state = u.new_zeros(u.shape[0], WIDTH, a.shape[1])
    out = []
    for t in range(u.shape[1]):
        step = delta[:, t, :, None]
        state = state * (step * a).exp().to(u.dtype) + (step.to(u.dtype) * u[:, t, :, None]) * b[:, t, None]
        out.append((state * c[:, t, None]).sum(-1))
    return torch.stack(out, 1)


def of_fla(module: str, name: str, decay: str | None = "g") -> Op:
    """fla's function under our arguments' names; decay: what it calls log_decay."""

    def run(log_decay=None, **x):
        function = getattr(importlib.import_module(module), name)
        return function(**x, **({} if log_decay is None else {decay: log_decay}))[0]

    return run


CHUNKED = of_fla("fla.ops.simple_gla", "chunk_simple_gla")
CASES = [
    Case("linear_attention", "causal", "none", causal, quadratic, CHUNKED),
    # fla gives its constant decay no gradient
    Case("linear_attention", "causal", "head", causal, quadratic, of_fla(
        "fla.ops.simple_gla", "chunk_simple_gla", "g_gamma")),
    Case("linear_attention", "causal", "token", causal, quadratic, CHUNKED),
    Case("linear_attention", "bidirectional", "none", bidirectional, lambda **x: quadratic(**x, look_ahead=True), None),
    Case("linear_attention", "prefill in two", "token", carried, quadratic, CHUNKED),
    Case("linear_attention", "step by step", "token", steps, recurrent, of_fla(
        "fla.ops.simple_gla", "fused_recurrent_simple_gla")),
    Case("gated_linear_attention", "chunked", "channel", lambda **x: gated_linear_attention(**x)[0], recurrent, of_fla(
        "fla.ops.gla", "chunk_gla")),
    Case("gated_delta_rule", "chunked", "token", lambda **x: gated_delta_rule(**x)[0], recurrent, of_fla(
        "fla.ops.gated_delta_rule", "chunk_gated_delta_rule")),
    Case("selective_scan", "chunked", "scan", lambda **x: selective_scan(**x)[0], scanned, None),
    Case("long_conv", "causal", "taps", long_conv, convolved, None),
]  # fmt: skip
LOOPS = (recurrent, scanned)  # on a GPU at 2,000 tokens they are not waited for


def inputs(case: Case, adversary: str, time: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    g = torch.Generator(device).manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=g, device=device)

    time = 1 if adversary == "T = 1" else time
    factor = {"large": 30.0, "tiny": 1e-2}.get(
        adversary, 1.0
    )  # 30^3 times a sum of some hundred stays below 65504 x 10
    rate = {"decay near 1": 1e-5, "decay near 0": 30.0}.get(adversary, 0.1)
    if case.decay == "taps":
        x = {"x": factor * random(2, time, WIDTH), "taps": random(WIDTH, time) / time**0.5}
    elif case.decay == "scan":
        x = {
            "u": factor * random(2, time, WIDTH),
            "delta": rate * torch.rand(2, time, WIDTH, generator=g, device=device),
        }
        x |= {"a": -torch.rand(WIDTH, 16, generator=g, device=device) - 0.1}
        x |= {"b": random(2, time, 16), "c": random(2, time, 16)}
    else:
        x = {name: random(2, time, HEADS, WIDTH) for name in "qkv"}
        if case.op == "gated_delta_rule":  # its keys are of unit length
            x["k"] = F.normalize(x["k"], dim=-1)
            x["beta"] = torch.rand(2, time, HEADS, generator=g, device=device)
            x["v"] = factor * x["v"]
        else:
            scaled = factor if dtype != torch.float16 or factor < 1 else 4.0  # fp16 ends at 65504
            x = {name: scaled * value for name, value in x.items()}
        shape = {"head": (HEADS,), "token": (2, time, HEADS), "channel": (2, time, HEADS, WIDTH)}.get(case.decay)
        if shape is not None:
            x["log_decay"] = -rate * torch.rand(shape, generator=g, device=device)
    if adversary == "equal tokens":
        repeated = {
            n: value[:, :1].expand_as(value).clone() for n, value in x.items() if n in ("q", "k", "v", "x", "u")
        }
        x |= repeated
    return {name: value if name in KEPT else value.to(dtype) for name, value in x.items()}


def without_search() -> None:
    """Triton's searches take their first configuration that fits, and keep to it."""
    from triton.runtime import autotuner
    from triton.runtime.errors import OutOfResources

    run = autotuner.Autotuner.run

    def run_one(self, *args, **kwargs):
        while True:
            rest = self.configs[1:]
            self.configs = self.configs[:1]
            try:
                return run(self, *args, **kwargs)
            except OutOfResources:
                if not rest:
                    raise
                self.configs = rest

    autotuner.Autotuner.run = run_one


def outputs(op: Op, x: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The output and the gradient of every input, for one fixed dO; dtype: what dO is rounded to, that of o if None."""
    live = {name: value.detach().clone().requires_grad_() for name, value in x.items()}
    o = op(**live)
    do = torch.randn(o.shape, generator=torch.Generator(o.device).manual_seed(1), device=o.device)
    do = do.to(dtype or o.dtype).to(o.dtype)
    names = [name for name in live if o.requires_grad]
    gradients = torch.autograd.grad(o, [live[n] for n in names], do, allow_unused=True) if names else ()
    found = {"o": o.detach()}
    return found | {f"d{n}": g for n, g in zip(names, gradients, strict=True) if g is not None}


def errors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Per tensor; nan where something isn't finite that should be. 0 over 0 counts as 0."""
    table = {}
    for name, exact in wanted.items():
        difference, size = (found[name].double() - exact).norm(), exact.norm()
        table[name] = float(f"{float(difference / size if size > 0 else difference):.2g}")
    return table


@contextmanager
def using(backend: str):
    before = os.environ.get("CHELA_BACKEND")
    os.environ["CHELA_BACKEND"] = "" if backend == "default" else backend
    try:
        yield
    finally:
        os.environ.pop("CHELA_BACKEND")
        if before is not None:
            os.environ["CHELA_BACKEND"] = before


def rows(number: int, name: str, device: str, time: int) -> list[dict]:
    """Of the case of that number in CASES, in one dtype: a row for each kind of input."""
    case, dtype, found = CASES[number], DTYPES[name], []
    without_search()
    short = min(time, 64) if case.form == "step by step" else time
    for adversary in ADVERSARIES:
        if case.decay in ("none", "taps") and adversary.startswith("decay"):
            continue
        x = inputs(case, adversary, short, dtype, device)
        row: dict[str, Any] = {"op": case.op, "form": case.form, "decay": case.decay, "inputs": adversary}
        row |= {"dtype": name, "T": short, "errors": {}}
        try:
            with using("reference"):
                wanted = outputs(case.ours, {n: value.double() for n, value in x.items()}, dtype)
            for who in ["default", "reference"] if device == "cuda" else ["default"]:
                with using(who):
                    row["errors"][f"ours {who}"] = errors(outputs(case.ours, x), wanted)
            if case.torch is not None and not (case.torch in LOOPS and short > 300):
                row["errors"]["torch"] = errors(outputs(case.torch, x), wanted)
            if case.fla is not None and device == "cuda" and importlib.util.find_spec("fla"):
                row["errors"]["fla"] = errors(outputs(case.fla, x), wanted)
        except Exception as error:  # the rest of the table is worth having
            row["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
        found.append(row)
    return found


def identical(device: str, time: int) -> dict[str, bool]:
    """Whether 20 runs, gradients included, agree to the last bit."""
    found = {}
    for case in CASES:
        if case.form == "step by step":
            continue
        x = inputs(case, "normal", time, torch.bfloat16, device)
        first = outputs(case.ours, x)
        same = all(torch.equal(y, first[n]) for _ in range(19) for n, y in outputs(case.ours, x).items())
        found[f"{case.op}, {case.form}, {case.decay}"] = same
    return found


def padded(device: str) -> dict[str, bool]:
    """A row of nothing but padding: its outputs and gradients are finite, its neighbour's are as if it were alone."""
    found = {}
    for is_causal in (True, False):
        x = inputs(CASES[0], "normal", 100, torch.bfloat16, device)
        mask = torch.tensor([[True], [False]], device=device).expand(2, 100)

        def op(mask=mask, is_causal=is_causal, **x):
            return linear_attention(**x, causal=is_causal, mask=mask)[0]

        both = outputs(op, x)
        alone = outputs(lambda mask=mask, op=op, **x: op(mask=mask[:1], **x), {n: value[:1] for n, value in x.items()})
        finite = all(bool(value.isfinite().all()) for value in both.values())
        found["causal" if is_causal else "bidirectional"] = finite and torch.equal(both["o"][:1], alone["o"])
    return found


def million() -> list[dict]:
    """T = 1,048,576 on a GPU: finite, and nanoseconds a token of forward + backward, beside T = 32,768."""
    table = []
    for decay in ("none", "head", "token"):
        case = next(c for c in CASES if c.decay == decay)
        row: dict[str, Any] = {"decay": decay, "H": HEADS, "K": WIDTH, "dtype": "bf16"}
        for time in (32768, 1048576):
            x = {n: value[:1] if value.dim() > 1 else value for n, value in
                 inputs(case, "normal", time, torch.bfloat16, "cuda").items()}  # fmt: skip
            live = {n: value.requires_grad_() for n, value in x.items()}
            o = case.ours(**live)
            do = torch.randn_like(o)

            def run(live=live, do=do, case=case):
                return torch.autograd.grad(case.ours(**live), list(live.values()), do)

            finite = all(bool(g.isfinite().all()) for g in (o, *run()))
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(6_000_000)
            start.record()
            for _ in range(5):
                run()
            end.record()
            torch.cuda.synchronize()
            row[f"T = {time}"] = {"finite": finite, "ns_per_token": round(1e6 * start.elapsed_time(end) / 5 / time, 3)}
        table.append(row)
    return table


def table(found: list[dict]) -> str:
    """Largest error over outputs and gradients, one line an op, form, inputs and dtype."""
    who = ["ours default", "ours reference", "torch", "fla"]
    who = [name for name in who if any(name in row["errors"] for row in found)]
    lines = []
    for row in found:
        cells = [row["op"], f"{row['form']}, decay {row['decay']}", row["inputs"], row["dtype"]]
        for name in who:
            values = row["errors"].get(name)
            worst = max(values, key=lambda n: values[n] if values[n] == values[n] else float("inf")) if values else ""
            cells.append(f"{values['o']:.1e}, {worst} {values[worst]:.1e}" if values else row.get("failed", "")[:40])
        lines.append(cells)
    return markdown(["op", "form", "inputs", "dtype", *(f"{name}: o, worst" for name in who)], lines)


def worse(found: list[dict]) -> list[str]:
    """Tensors whose error is above a peer's by more than chance, a quarter, and that rounding alone does not explain:
    half a unit of the tensor's dtype to store it, and four units of fp32, in which all are computed.
    """
    lines = []
    for row in found:
        ours = {n: e for n, e in row["errors"].items() if n.startswith("ours default")}
        peers = {n: e for n, e in row["errors"].items() if n in ("torch", "fla")}
        stored = torch.finfo(DTYPES[row["dtype"]]).eps / 2
        for tensor, error in next(iter(ours.values()), {}).items():
            for who, theirs in peers.items():
                peer = theirs.get(tensor)
                rounding = max(4 * torch.finfo(torch.float32).eps, 0 if tensor[1:] in KEPT else stored)
                if peer is not None and peer == peer and not error <= max(1.25 * peer, rounding):
                    place = f"{row['op']}, {row['form']}, decay {row['decay']}, {row['inputs']}, {row['dtype']}"
                    lines.append(f"{place}: {tensor} {error:.1e}, {who} {peer:.1e}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--revision", help="of the code, where there is no git repository")
    parser.add_argument("--time", type=int, help="tokens; default 2,000 on a GPU, 200 on a CPU")
    parser.add_argument("--jobs", type=int, default=1, help="processes for the table; compiling is what takes time")
    parser.add_argument("--parts", default="rows,exact,million", help="what of it; million is timed: run it alone")
    options = parser.parse_args()
    device = options.device
    name = "numerics_h100.json" if device == "cuda" else "numerics_cpu.json"
    out = options.out or Path(__file__).parent / "results" / name
    time = options.time or (2000 if device == "cuda" else 200)
    without_search()
    record: dict[str, Any] = conditions(options.revision, device)

    def write() -> None:
        out.write_text(json.dumps(record, indent=1) + "\n")

    if device == "cuda" and "million" in options.parts:
        record["million"] = million()
        write()
        print(json.dumps(record["million"]), flush=True)
    if "exact" in options.parts:
        record["rows_of_padding"] = padded(device)
        record["twenty_runs_identical"] = identical(device, time)
        write()
        print(json.dumps({k: record[k] for k in ("rows_of_padding", "twenty_runs_identical")}), flush=True)
    if "rows" in options.parts:
        record["results"] = []
        with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
            started = [pool.submit(rows, i, dtype, device, time) for i in range(len(CASES)) for dtype in DTYPES]
            for future in started:
                record["results"] += future.result()
                record["worse"] = worse(record["results"])
                write()
        print(table(record["results"]))
        print("\n".join(["worse than a peer:", *record["worse"]]))


if __name__ == "__main__":
    main()
