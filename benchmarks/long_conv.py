"""Times `long_conv`, torch's real FFT and, where installed, FlashFFTConv, interleaved in one process; writes JSON.

    python benchmarks/long_conv.py --out benchmarks/results/long_conv_h100.json

All do the same work from the same bf16 activations and fp32 taps and bias, in both memory orders: `[B, T, D]`, and
time first (`[D, B, T]` for ours, `[B, D, T]` for the FFTs). FlashFFTConv has no bias, so it does without. Milliseconds
are medians with 20 % and 80 % quantiles of CUDA-event times of whole calls through autograd.

`modal_conv` does the work of a CHELA layer's causal convolution: 7 short taps, 8 modes for 16 channels, scale, bias and
SiLU in one call, matrices included; beside it the same filter alone, the same two-sided, and what does the same by the
exact path: modal taps, or the multiscale generator's, folded with the short ones, convolved, SiLU. The floor is the
fewest bytes (inputs read once, outputs written once; the backward pass reads x, dy and taps and writes all gradients)
over the bandwidth in chela_plugin/bench/timing.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from chela_plugin.bench.timing import BANDWIDTH, conditions, event_times, passes, peak_over_inputs, quantiles
from chela_plugin.kernels.folded_taps import folded_taps
from chela_plugin.kernels.long_conv import configs, long_conv, modal_conv
from chela_plugin.kernels.long_conv.reference import modal_conv_reference, modal_taps

TOKENS = 32768
FLASH = "FlashFFTConv [B,D,T], no bias"
CASES = [  # (B, T, D)
    *((TOKENS // t, t, 1024) for t in (1024, 2048, 4096, 8192, 16384, 32768)),
    (8, 4096, 768),
    (8, 4096, 2048),
    (32, 1000, 1024),
    (10, 3000, 1024),
    (3, 10000, 1024),
    (1, 4096, 1024),
]

MODAL_CASES = [
    *((max(TOKENS // t, 1), t, 1024) for t in (1024, 2048, 4096, 8192, 16384, 32768, 65536)),
    (3, 10000, 1024),
]


def torch_fft(x: Tensor, taps: Tensor, bias: Tensor, *, time_first: bool) -> Tensor:
    """What one writes without a kernel: x `[B, D, T]` or `[B, T, D]`."""
    tokens, dim = (x.shape[2], 2) if time_first else (x.shape[1], 1)
    taps_f = torch.fft.rfft(taps, n=2 * tokens)
    if not time_first:
        taps_f, bias = taps_f.t(), bias[None]
    else:
        bias = bias[:, None]
    x_f = torch.fft.rfft(x.float(), n=2 * tokens, dim=dim)
    y = torch.fft.irfft(x_f * taps_f, n=2 * tokens, dim=dim).narrow(dim, 0, tokens)
    return (y + bias).to(x.dtype)


def flash_fft_conv(tokens: int) -> Callable[[Tensor, Tensor], Tensor] | None:
    """FlashFFTConv (arXiv:2311.05908; x `[B, D, T]`, taps `[D, T]`), where it is installed and takes the length."""
    try:
        from flashfftconv import FlashFFTConv
    except ImportError:
        return None
    if tokens & (tokens - 1):
        return None
    return FlashFFTConv(2 * tokens, dtype=torch.bfloat16).cuda()


def contenders(batch: int, tokens: int, channels: int) -> dict[str, tuple[Callable[..., Tensor], list[Tensor], Tensor]]:
    """name -> (function, leaves, gradient of the output)."""
    torch.manual_seed(0)
    x, dy = (torch.randn(batch, tokens, channels, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    taps = torch.randn(channels, tokens, device="cuda") * tokens**-0.5
    bias = torch.randn(channels, device="cuda")
    first = [t.permute(2, 0, 1).contiguous().permute(1, 2, 0) for t in (x, dy)]
    rows = [t.transpose(1, 2).contiguous() for t in (x, dy)]
    found = {
        "long_conv [B,T,D]": (long_conv, [x, taps, bias], dy),
        "long_conv time first": (long_conv, [first[0], taps, bias], first[1]),
        "torch rfft [B,D,T]": (partial(torch_fft, time_first=True), [rows[0], taps, bias], rows[1]),
        "torch rfft [B,T,D]": (partial(torch_fft, time_first=False), [x, taps, bias], dy),
    }
    if (flash := flash_fft_conv(tokens)) is not None:
        found[FLASH] = (lambda x, taps, bias: flash(x, taps), [rows[0], taps, bias], rows[1])
    return found


def reference(leaves: list[Tensor], dy: Tensor) -> list[Tensor]:
    """Output and gradients in fp64, a few channels at a time."""
    x, taps, bias = leaves
    parts = []
    for d in range(0, x.shape[2], 32):
        cut = [t.detach().double().requires_grad_() for t in (x[..., d : d + 32], taps[d : d + 32], bias[d : d + 32])]
        y = torch_fft(cut[0].transpose(1, 2), cut[1], cut[2], time_first=True).transpose(1, 2)
        parts.append((y.detach(), *torch.autograd.grad(y, cut, dy[..., d : d + 32].double())))
    return [torch.cat(tensors, dim) for tensors, dim in zip(zip(*parts, strict=True), (2, 2, 0, 0), strict=True)]


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().double() - wanted).norm() / wanted.norm())


def floor_ms(batch: int, tokens: int, channels: int) -> tuple[float, float]:
    """Forward, and forward with backward."""
    activations, taps = batch * tokens * channels * 2, channels * tokens * 4
    forward, backward = 2 * activations + taps, 3 * activations + 2 * taps
    return forward / BANDWIDTH * 1e3, (forward + backward) / BANDWIDTH * 1e3


def measure(batch: int, tokens: int, channels: int, rounds: int) -> list[dict[str, object]]:
    entries = contenders(batch, tokens, channels)
    runs = {name: passes(*entry, allow_unused=True) for name, entry in entries.items()}
    f_times = event_times({name: run["forward"] for name, run in runs.items()}, rounds)
    b_times = event_times({name: run["forward_backward"] for name, run in runs.items()}, rounds)
    _, leaves, dy = entries["long_conv [B,T,D]"]
    wanted = reference(leaves, dy)
    algorithms = [configs.algorithm(tokens, 0, tokens - 1, torch.bfloat16, backward=b) for b in (False, True)]
    f_floor, b_floor = floor_ms(batch, tokens, channels)
    rows = []
    for name, run in runs.items():
        found = [run["forward"](), *run["forward_backward"]()]
        if name == FLASH:
            found[0] = found[0] + leaves[2][:, None]
        if "[B,D,T]" in name:
            found[:2] = [t.transpose(1, 2) for t in found[:2]]
        errors = {
            key: float(f"{error(a, b):.2e}")
            for key, a, b in zip(("y", "dx", "dtaps", "dbias"), found, wanted, strict=True)
            if a is not None
        }
        del found
        rows.append(
            {
                "B": batch, "T": tokens, "D": channels, "name": name,
                "algorithm": algorithms if name.startswith("long_conv") else None,
                "forward_ms": quantiles(f_times[name]), "forward_backward_ms": quantiles(b_times[name]),
                "floor_ms": [round(f_floor, 4), round(b_floor, 4)],
                "share_of_floor": [
                    round(f_floor / quantiles(f_times[name])[0], 3), round(b_floor / quantiles(b_times[name])[0], 3)
                ],
                "peak_mib": [peak_over_inputs(run["forward"]), peak_over_inputs(run["forward_backward"])],
                "input_mib": round(batch * tokens * channels * 2 / 2**20, 1),
                "error": errors,
            }
        )  # fmt: skip
    return rows


def modal(x: Tensor, *leaves: Tensor, alone: bool) -> Tensor:
    time, frequency, residue, short, scale, bias = leaves
    if alone:
        return modal_conv(x, time, frequency, residue)
    return modal_conv(x, time, frequency, residue, short=short, scale=scale, bias=bias, silu=True)


def modal_by_exact_path(x: Tensor, *leaves: Tensor) -> Tensor:
    time, frequency, residue, short, scale, bias = leaves
    long = modal_taps(time, frequency, residue, x.shape[1])
    return long_conv(x, folded_taps(long, length=x.shape[1], scales=scale[None], kernels=[short]), bias, silu=True)


def multiscale(
    x: Tensor, sub_kernels: Tensor, ratio_logit: Tensor, short: Tensor, scale: Tensor, bias: Tensor
) -> Tensor:
    taps = folded_taps(sub_kernels, ratio_logit, length=x.shape[1], scales=scale[None], kernels=[short])
    return long_conv(x, taps, bias, silu=True)


def two_sided(x: Tensor, *leaves: Tensor) -> Tensor:
    """With the filters of two neighbouring groups as those of one group's two sides."""
    time, frequency, residue, short, scale, bias = leaves
    return modal_conv(x, time, frequency, residue, short=short, scale=scale, bias=bias, silu=True, causal=False)


def measure_modal(batch: int, tokens: int, channels: int, rounds: int) -> list[dict[str, object]]:
    torch.manual_seed(0)
    x, dy = (torch.randn(batch, tokens, channels, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    time = torch.logspace(0.3, 3, 8, device="cuda").log().expand(channels // 16, 8).clone()
    frequency = torch.rand_like(time) * 6.28 * torch.exp(-time)
    shapes = ((*time.shape, 2), (channels, 7), (channels,), (channels,))
    leaves = [x, time, frequency, *(torch.randn(s, device="cuda") * 0.3 for s in shapes)]
    entries: dict[str, Callable[..., Tensor]] = {
        "modal_conv, short, long, SiLU": partial(modal, alone=False),
        "modal_conv, long alone": partial(modal, alone=True),
        "modal_conv two-sided, short, long, SiLU": two_sided,
        "exact path, short, long, SiLU": modal_by_exact_path,
        "multiscale, exact path, short, long, SiLU": multiscale,
    }
    if tokens > 8192:  # modal taps in torch take GiB there
        del entries["exact path, short, long, SiLU"]
    generator = [
        torch.randn(channels // 16, 8, 16, device="cuda") / 4,
        torch.full((channels // 16,), 2.0, device="cuda"),
    ]
    learned = {multiscale: [x, *generator, *leaves[4:]]}
    runs = {name: passes(f, learned.get(f, leaves), dy, allow_unused=True) for name, f in entries.items()}
    f_times = event_times({name: run["forward"] for name, run in runs.items()}, rounds)
    b_times = event_times({name: run["forward_backward"] for name, run in runs.items()}, rounds)
    few = [t.double() for t in leaves]  # 64 channels: the fp64 form keeps every chunk's states
    few = [few[0][..., :64], *(t[:4] for t in few[1:4]), *(t[:64] for t in few[4:])]
    error_y = error(runs["modal_conv, short, long, SiLU"]["forward"]()[..., :64], modal_conv_reference(*few, True))
    activations = batch * tokens * channels * 2
    return [
        {
            "B": batch, "T": tokens, "D": channels, "name": name, "forward_ms": quantiles(f_times[name]),
            "forward_backward_ms": quantiles(b_times[name]),
            "floor_ms": [round(n * activations / BANDWIDTH * 1e3, 4) for n in (2, 5)],
            "peak_mib": [peak_over_inputs(run["forward"]), peak_over_inputs(run["forward_backward"])],
            "input_mib": round(activations / 2**20, 1),
        } | ({"error": {"y": float(f"{error_y:.2e}")}} if name == "modal_conv, short, long, SiLU" else {})
        for name, run in runs.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cases", type=int, default=len(CASES), help="only the first so many of each kind")
    parser.add_argument("--only", choices=["exact", "modal"], help="one of the two kinds")
    parser.add_argument("--revision", default=None, help="of the code, where there is no git repository")
    args = parser.parse_args()
    record: dict[str, object] = conditions(args.revision)
    record |= {"bandwidth": BANDWIDTH, "rounds": args.rounds, "results": []}
    rows: list[dict[str, object]] = []
    # What matters most first: a run that is cut leaves what it has.
    for part, cases in ((measure, CASES[:6]), (measure_modal, MODAL_CASES), (measure, CASES[6:])):
        kind = "modal" if part is measure_modal else "exact"
        for case in cases[: args.cases] if args.only in (None, kind) else ():
            for row in part(*case, args.rounds):
                print(json.dumps(row), flush=True)
                rows.append(row)
            torch.cuda.empty_cache()
            record["results"] = rows
            if args.out:
                args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
