"""What every benchmark here shares: interleaved timing by CUDA events, quantiles, peak memory, the record's head."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable

import torch
import triton

BANDWIDTH = 3.0e12  # bytes read plus written a second by a copy on the H100; the floor of memory-bound work


def event_times(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each run, one after the other in every round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
        run()
    for _ in range(rounds):
        pairs = {}
        for name, run in runs.items():
            pairs[name] = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            torch.cuda._sleep(6_000_000)  # about 3 ms: the host runs ahead, so that launches are not what is timed
            pairs[name][0].record()
            run()
            pairs[name][1].record()
        torch.cuda.synchronize()
        for name, (start, end) in pairs.items():
            times[name].append(start.elapsed_time(end))
    return times


def quantiles(times: list[float]) -> list[float]:
    """Median, 20 % and 80 %."""
    ordered = sorted(times)
    return [round(ordered[int(q * (len(ordered) - 1))], 4) for q in (0.5, 0.2, 0.8)]


def peak_over_inputs(run: Callable[[], object]) -> float:
    """Most memory in use above what there was before, MiB."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def revision_of(given: str | None) -> str:
    """`given`, or what git says of this checkout."""
    if given is not None:
        return given
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def conditions(revision: str | None) -> dict[str, object]:
    """Device, versions and code revision; `revision` where there is no git repository."""
    return {
        "device": torch.cuda.get_device_name(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
        "revision": revision_of(revision),
    }
