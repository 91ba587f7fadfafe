"""The one home of timing: interleaved runs, quantiles, peak memory, and what a record says of its machine and code."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chela_plugin.harness import environment

BANDWIDTH = 3.0e12  # bytes read plus written a second by a copy on the H100; the floor of memory-bound work
MATMUL_RATE = 7.0e14  # operations a second of a large bf16 product on the H100 (690 to 745 TFLOP/s measured)
HEAD_START = 6_000_000  # cycles, about 3 ms: the host runs ahead, so that launches are not what is timed

Run = Callable[[], object]


def passes(
    function: Callable[..., Tensor], leaves: Sequence[Tensor], dy: Tensor, *, allow_unused: bool = False
) -> dict[str, Run]:
    """`function(*leaves)`, 'forward' alone and 'forward_backward' with the gradient of every leaf.

    `allow_unused`: some leaves may be left out by the function.
    """
    live = [x.detach().requires_grad_() for x in leaves]

    def forward() -> Tensor:
        with torch.no_grad():
            return function(*live)

    def forward_backward() -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(function(*live), live, dy, allow_unused=allow_unused)

    return {"forward": forward, "forward_backward": forward_backward}


def interleaved(runs: dict[str, Run], rounds: int, device: torch.device | str) -> dict[str, list[float]]:
    """Milliseconds of each run, one after the other in every round: CUDA events, or the clock on a CPU."""
    if torch.device(device).type == "cuda":
        return event_times(runs, rounds)
    return clock_times(runs, rounds)


def event_times(runs: dict[str, Run], rounds: int, warm_ups: int = 2) -> dict[str, list[float]]:
    """Milliseconds of each run on the device, without the time that the host needs to launch it."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        for _ in range(warm_ups):
            run()
    for _ in range(rounds):
        pairs = {}
        for name, run in runs.items():
            pairs[name] = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            torch.cuda._sleep(HEAD_START)
            pairs[name][0].record()
            run()
            pairs[name][1].record()
        torch.cuda.synchronize()
        for name, (start, end) in pairs.items():
            times[name].append(start.elapsed_time(end))
    return times


def clock_times(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each run by the clock, launches included; a CUDA device is waited for at both ends."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def quantiles(times: list[float]) -> list[float]:
    """Median, 20 % and 80 %."""
    ordered = sorted(times)
    return [round(ordered[int(q * (len(ordered) - 1))], 4) for q in (0.5, 0.2, 0.8)]


def peak_over_inputs(run: Run) -> float:
    """Most memory in use on the CUDA device above what there was before, MiB."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def conditions(revision: str | None = None, device: torch.device | str | None = None) -> dict[str, Any]:
    """Device, versions and code of a record.

    Args:
        revision: git revision, where the code stands outside its repository (a copy on another machine).
        device: default: the CUDA device where there is one.

    `dirty` is None where git can't say; `source` identifies the package's code whatever git says.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    known = environment.revision()
    versions = environment.versions() | _mamba_ssm()
    return {
        "device": environment.device_name(place),
        "versions": versions,
        "revision": revision or known["commit"] or "unknown",
        "dirty": known.get("dirty"),
        "source": source_hash(),
        "load": [round(load, 2) for load in os.getloadavg()],
    }


def source_hash() -> str:
    """Of every Python file of the package, the kernels' and registry's included."""
    import chela_plugin.kernels
    import chela_plugin.registry

    package = Path(__file__).parents[1]
    folders = [package, *(Path(str(m.__file__)).parent for m in (chela_plugin.kernels, chela_plugin.registry))]
    return _hash({path for folder in folders for path in folder.rglob("*.py")})


def _hash(paths: set[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: (path.parent.name, path.name)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _mamba_ssm() -> dict[str, str]:
    """A hash of mamba_ssm's Triton code: its version string doesn't tell its builds apart."""
    found = importlib.util.find_spec("mamba_ssm")
    if found is None or not found.submodule_search_locations:
        return {}
    folder = Path(next(iter(found.submodule_search_locations)))
    return {"mamba-ssm (source)": _hash(set(folder.glob("ops/triton/*.py")) | set(folder.glob("modules/*.py")))}
