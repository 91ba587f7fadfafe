"""Linear attention on the GPU: ours and fla's interleaved, with memory, error against fp64 and the memory floor.

    python benchmarks/linear_attention.py [--out FILE] [--revision R] [--rounds N] [--fla-shapes N]
        [--processes N] [--compile-only | --compiled]

Peers: fla's chunk_simple_gla and fused_recurrent_simple_gla (flash-linear-attention, where it is installed) and
PyTorch's flash attention. fla's static decay (g_gamma) has no gradient of the decay, ours has; its per-token decay
refuses to run backward on Hopper. The floor counts every input read once and every output written once, backward
inputs, dO and gradients, at the bandwidth in chela_plugin/bench/timing.py. Times are milliseconds: median, 20 %, 80 %.
`--compile-only` compiles everything, fla's search too; it may run beside other work, and `--compiled` comes after it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from chela_plugin.bench.ahead import only_compile
from chela_plugin.bench.timing import BANDWIDTH, conditions, event_times, passes, peak_over_inputs, quantiles
from chela_plugin.kernels.linear_attention import linear_attention, linear_attention_step, reference

TOKENS = 32768
SHAPES = [(16, 128, 128), (32, 64, 64), (16, 64, 128)]
TIMES = [1024, 2048, 8192, 32768]
VARIANTS = ["none", "static", "token", "bidirectional"]
FLA_SHARES = 12  # its search compiles some 150 kernels a shape: that many processes do it


def inputs(batch: int, T: int, H: int, K: int, V: int) -> tuple[Tensor, ...]:
    """q, k, v, dO in bf16, a static and a per-token log decay."""
    g = torch.Generator("cuda").manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, device="cuda", generator=g)

    q, k, v, do = (random(batch, T, H, w).bfloat16() for w in (K, K, V, V))
    static = torch.log1p(-torch.exp2(torch.linspace(-8, -3, H, device="cuda")))  # horizons of 256 to 8 tokens
    token = F.logsigmoid(random(batch, T, H) + 4)
    return q, k, v, do, static, token


def ours(variant: str) -> Callable[..., Tensor]:
    def function(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None) -> Tensor:
        return linear_attention(q, k, v, decay, causal=variant != "bidirectional")[0]

    return function


def leaves_of(variant: str, q: Tensor, k: Tensor, v: Tensor, static: Tensor, token: Tensor) -> list[Tensor]:
    return [q, k, v, *{"static": [static], "token": [token]}.get(variant, [])]


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)


def compile_case(case: tuple[int, int, int, int, str]) -> None:
    """One forward and backward pass of ours, so that the compiled kernels lie in Triton's cache."""
    T, H, K, V, variant = case
    q, k, v, do, static, token = inputs(TOKENS // T, T, H, K, V)
    for run in passes(ours(variant), leaves_of(variant, q, k, v, static, token), do).values():
        run()
    torch.cuda.synchronize()
    del q, k, v, do, static, token, run
    torch.cuda.empty_cache()  # other processes compile on this card


def fla_searches() -> list[Any]:
    """The kernels of fla that search for their configuration."""
    from fla.ops.common import chunk_h, chunk_o

    found: list[Any] = []
    for kernel in (*vars(chunk_h).values(), *vars(chunk_o).values()):
        while kernel is not None and not hasattr(kernel, "configs"):
            kernel = getattr(kernel, "fn", None)
        if kernel is not None and isinstance(kernel.configs, list) and kernel not in found:
            found.append(kernel)
    return found


def search_fla(T: int, H: int, K: int, V: int) -> None:
    """One pass of each kind that is timed."""
    from fla.ops.simple_gla import chunk_simple_gla

    q, k, v, do, static, _ = inputs(TOKENS // T, T, H, K, V)
    for gamma in (None, static):
        passes(lambda q, k, v, g=gamma: chunk_simple_gla(q, k, v, g_gamma=g)[0], [q, k, v], do)["forward_backward"]()
    torch.cuda.synchronize()


def compile_fla(case: tuple[int, tuple[int, int, int]]) -> None:
    """Every FLA_SHARES-th of the configurations that fla searches through, so that the search finds them compiled."""
    share, shape = case
    # A share's best is not the search's: neither Triton nor fla, not imported yet, may keep it.
    os.environ["TRITON_CACHE_AUTOTUNING"] = os.environ["FLA_CACHE_RESULTS"] = "0"
    only_compile(share, FLA_SHARES)
    try:
        search_fla(2048, *shape)
    except RuntimeError as error:  # a configuration that spills by the gigabyte, beside other processes
        print(f"fla, share {share}: {error}")


def fla_measured(shapes: list[tuple[int, int, int]]) -> Callable[..., tuple]:
    """fla's operator after its search, which is fla's own but for 12 ms a configuration where it would take 100."""
    from fla.ops.simple_gla import chunk_simple_gla

    start = time.perf_counter()
    for search in fla_searches():
        search._do_bench = lambda call, quantiles: triton.testing.do_bench(call, warmup=3, rep=12, quantiles=quantiles)
    for shape in shapes:
        search_fla(2048, *shape)
    print(f"fla's search: {time.perf_counter() - start:.0f} s", flush=True)
    return chunk_simple_gla


def in_parallel(compile_one: Callable[[Any], None], cases: list, processes: int) -> None:
    start = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(min(processes, multiprocessing.cpu_count())) as pool:
        pool.map(compile_one, cases, chunksize=1)
    print(f"{compile_one.__name__}: {time.perf_counter() - start:.0f} s", flush=True)


def throughput(T: int, H: int, K: int, V: int, rounds: int, fla: Callable[..., tuple] | None) -> list[dict]:
    """All variants and peers at one shape, forward and forward + backward."""
    q, k, v, do, static, token = inputs(TOKENS // T, T, H, K, V)
    runs: dict[str, Callable[[], object]] = {}

    def timed(name: str, function: Callable[..., Tensor], leaves: list[Tensor]) -> dict[str, Callable[[], object]]:
        both = passes(function, leaves, do)
        return {f"{name} forward": both["forward"], f"{name} both": both["forward_backward"]}

    for variant in VARIANTS:
        runs |= timed(f"ours {variant}", ours(variant), leaves_of(variant, q, k, v, static, token))
    if fla is not None:
        for variant, gamma in (("none", None), ("static", static)):
            runs |= timed(f"fla {variant}", lambda q, k, v, g=gamma: fla(q, k, v, g_gamma=g)[0], [q, k, v])
    times = event_times(runs, rounds)
    if K == V:  # apart: right behind its long runs others spread by half (NOTES-linear_attention.md)
        softmax = timed("flash causal", flash, [q, k, v])
        times |= event_times(softmax, rounds)
        runs |= softmax
    forward_bytes = 2 * TOKENS * H * (2 * K + 2 * V)
    backward_bytes = 2 * TOKENS * H * (4 * K + 3 * V)
    rows = []
    for name, run in runs.items():
        who, variant, what = name.split()
        decay_bytes = 4 * TOKENS * H if variant == "token" else 0
        moved = forward_bytes + decay_bytes + ((backward_bytes + 2 * decay_bytes) if what == "both" else 0)
        floor = 1e3 * moved / BANDWIDTH
        ms = quantiles(times[name])
        row = {"T": T, "H": H, "K": K, "V": V, "who": who, "variant": variant, "what": what, "ms": ms}
        rows.append(row | {"floor_ms": round(floor, 4), "share": round(floor / ms[0], 3), "MiB": peak_over_inputs(run)})
    return rows


def relative(found: Tensor, wanted: Tensor) -> float:
    return float(f"{float((found.double() - wanted).norm() / wanted.norm()):.3g}")


def errors(T: int, H: int, K: int, V: int, fla: Callable[..., tuple] | None) -> list[dict]:
    """Relative error of output and gradients against the chunked definition in fp64, ours beside fla's."""
    q, k, v, do, static, token = inputs(1, T, H, K, V)
    rows = []
    for variant in VARIANTS:
        leaves = leaves_of(variant, q, k, v, static, token)
        names = ["q", "k", "v", "log_decay"][: len(leaves)]

        def exact(q, k, v, d=None, variant=variant):
            if variant == "bidirectional":
                return reference.bidirectional(q, k, v, K**-0.5, None)[0]
            return reference.chunked(q, k, v, d, K**-0.5, None)[0]

        def all_of(forward, leaves, do, names=tuple(names)):
            live = [x.detach().requires_grad_() for x in leaves]
            o = forward(*live)
            return {"o": o.detach()} | dict(zip(names, torch.autograd.grad(o, live, do), strict=True))

        wanted = all_of(exact, [x.double() for x in leaves], do.double())
        found = all_of(ours(variant), leaves, do)
        row = {"T": T, "H": H, "K": K, "V": V, "variant": variant}
        row["ours"] = {name: relative(x, wanted[name]) for name, x in found.items()}
        if fla is not None and variant in ("none", "static"):
            gamma = static if variant == "static" else None
            found = all_of(lambda q, k, v, gamma=gamma: fla(q, k, v, g_gamma=gamma)[0], [q, k, v], do, ["q", "k", "v"])
            row["fla"] = {name: relative(x, wanted[name]) for name, x in found.items()}
        rows.append(row)
    return rows


def host_microseconds(run: Callable[[], object], calls: int = 300, loops: int = 9) -> float:
    """Host time of a call, the device far behind or idle: microseconds, the median of some loops."""
    for _ in range(20):
        run()
    spent = []
    for _ in range(loops):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        spent.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return round(1e6 * statistics.median(spent) / calls, 1)


def small_calls(fused_recurrent: Callable[..., tuple] | None) -> dict:
    """Host time of a small forward call, and one decoding step beside fla's fused recurrent kernel."""
    q, k, v, _, static, token = inputs(1, 512, 16, 64, 64)
    found: dict = {
        "host_us_forward_B1_T512": host_microseconds(lambda: linear_attention(q, k, v)),
        "host_us_forward_B1_T512_static": host_microseconds(lambda: linear_attention(q, k, v, static)),
    }
    if fused_recurrent is None:
        return found
    for batch in (1, 64):
        q, k, v, _, _, token = inputs(batch, 1, 16, 128, 128)
        state = torch.randn(batch, 16, 128, 128, device="cuda")
        runs = {
            "ours": lambda q=q, k=k, v=v, s=state, d=token: linear_attention_step(
                q[:, 0], k[:, 0], v[:, 0], s, d[:, 0]
            ),
            "fla": lambda q=q, k=k, v=v, s=state, d=token: fused_recurrent(
                q, k, v, g=d, initial_state=s, output_final_state=True
            ),
        }
        times = event_times(runs, 50)
        found[f"step_ms_B{batch}"] = {name: quantiles(ms) for name, ms in times.items()}
        found[f"step_host_us_B{batch}"] = {name: host_microseconds(run) for name, run in runs.items()}
    return found


def million(rounds: int) -> list[dict]:
    """Time per token at T = 1,048,576 against T = 32,768, batch 1."""
    rows = []
    for H, D in ((16, 128), (32, 64)):
        q, k, v, *_ = inputs(1, 2**20, H, D, D)
        short = [x[:, :TOKENS].contiguous() for x in (q, k, v)]
        runs = {
            "1048576": lambda q=q, k=k, v=v: linear_attention(q, k, v),
            "32768": lambda s=short: linear_attention(*s),
        }
        times = {T: quantiles(ms)[0] for T, ms in event_times(runs, rounds).items()}
        per_token = {T: round(1e6 * ms / int(T), 3) for T, ms in times.items()}
        rows.append({"H": H, "D": D, "ms": times, "ns_per_token": per_token})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "linear_attention_h100.json")
    parser.add_argument("--revision", help="of the code, where there is no git repository")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--fla-shapes", type=int, default=len(SHAPES), help="fla at the first N shapes only")
    parser.add_argument("--processes", type=int, default=14, help="that compile")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--compiled", action="store_true")
    options = parser.parse_args()
    rounds = options.rounds
    record: dict[str, Any] = conditions(options.revision)
    record |= {"tokens": TOKENS, "dtype": "bfloat16", "bandwidth": BANDWIDTH, "rounds": rounds}

    def save(name: str, value: object) -> None:
        """Kept as results come: a run that is cut off leaves what it had."""
        record[name] = value
        options.out.write_text(json.dumps(record, indent=1) + "\n")
        print(name, value if name != "results" else "", flush=True)

    peer = importlib.util.find_spec("fla") is not None
    if not options.compiled:
        cases = [(T, *shape, variant) for shape in SHAPES for T in (2048, 8192, 32768, 1024) for variant in VARIANTS]
        in_parallel(compile_case, cases, options.processes)
    if options.compile_only:
        for shape in SHAPES[: options.fla_shapes if peer else 0]:
            in_parallel(compile_fla, [(share, shape) for share in range(FLA_SHARES)], options.processes)
        return
    fla = fused_recurrent = None
    fla_shapes = SHAPES[: options.fla_shapes if peer else 0]
    if fla_shapes:
        from fla.ops import simple_gla

        fused_recurrent = simple_gla.fused_recurrent_simple_gla
        fla = fla_measured(fla_shapes)
        record["versions"]["fla"] = importlib.metadata.version("fla-core")
    save("small", small_calls(fused_recurrent))
    results: list[dict] = []
    for shape in SHAPES:
        for T in TIMES:
            results += throughput(T, *shape, rounds, fla if shape in fla_shapes else None)
            save("results", results)
    save("million", million(rounds))
    found: list[dict] = []
    for T in (2048, 32768):
        for shape in ((16, 128, 128), (32, 64, 64)):
            found += errors(T, *shape, fla if shape in fla_shapes else None)
            save("errors", found)
    for row in sorted(results, key=lambda row: (row["H"], row["K"], row["T"])):
        where = (
            f"H {row['H']} K {row['K']} V {row['V']} T {row['T']:6} {row['who']:5} {row['variant']:13} {row['what']:7}"
        )
        print(f"{where} {row['ms'][0]:7.3f} ms, {row['share']:4.2f} of the floor, {row['MiB']:7.1f} MiB")


if __name__ == "__main__":
    main()
