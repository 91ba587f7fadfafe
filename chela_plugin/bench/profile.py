"""Where a layer's time goes: its kernels by torch's profiler."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from chela_plugin.bench.timing import Run, synchronize

REPEATS = 3
KEPT = 30  # kernels; the rest is one row


def kernels(run: Run, device: torch.device) -> list[dict[str, Any]]:
    """Kernels (operators on a CPU) of one call, the longest first: name, launches, milliseconds, share of them all."""
    cuda = device.type == "cuda"
    for _ in range(2):
        run()
    synchronize()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        for _ in range(REPEATS):
            run()
        synchronize()
    spent: dict[str, float] = defaultdict(float)
    calls: dict[str, float] = defaultdict(float)
    for event in found.key_averages():
        us = event.self_device_time_total if cuda else event.self_cpu_time_total
        if us > 0:
            spent[event.key[:120]] += us / 1e3 / REPEATS
            calls[event.key[:120]] += event.count / REPEATS
    total = sum(spent.values())
    rows: list[dict[str, Any]] = [
        {"kernel": name, "launches": round(calls[name], 1), "ms": round(ms, 4), "share": round(ms / total, 4)}
        for name, ms in sorted(spent.items(), key=lambda item: -item[1])
    ]
    rest = rows[KEPT:]
    if rest:
        launches, ms = sum(row["launches"] for row in rest), sum(row["ms"] for row in rest)
        rows[KEPT:] = [{"kernel": f"{len(rest)} others", "launches": launches, "ms": ms, "share": round(ms / total, 4)}]
    return rows
