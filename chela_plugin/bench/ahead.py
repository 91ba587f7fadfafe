"""Compiles kernels in several processes before a suite runs, so that Triton's cache has them when a contender starts.

Most of the time that a peer's first call takes is compiling the 100 and more configurations that its search compares.
Here each process compiles its share of them; the suite's own search then only has to time them.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import time
from typing import Any

import torch

from chela_plugin.bench.cases import selected
from chela_plugin.bench.graphs import Captured


def compile_ahead(suite: str, filters: list[str], processes: int, budget_s: float) -> dict[str, Any]:
    """Run every selected contender of a suite once, peers in shares of their search; what is not done in time is left.

    Returns the record's account of it: seconds, contenders finished and not.
    """
    device = torch.device("cuda")
    tasks: list[tuple[str, int, str, int, int]] = []
    searched: set[str] = set()
    for i, case in enumerate(importlib.import_module(f"chela_plugin.bench.{suite}").cases(device)):
        for name, _ in selected(case, filters):
            peer = name.startswith(("fla ", "mamba_ssm "))
            if peer and name not in searched:  # a search depends on widths, not on lengths
                tasks = [(suite, i, name, share, processes) for share in range(processes)] + tasks
                searched.add(name)
            elif not peer:
                tasks.append((suite, i, name, 0, 1))
    start = time.perf_counter()
    done = 0
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        results = pool.imap_unordered(_compile, tasks, chunksize=1)
        for _ in tasks:
            try:
                results.next(timeout=max(budget_s - (time.perf_counter() - start), 0.1))
            except multiprocessing.TimeoutError:
                break
            done += 1
        pool.terminate()
    return {"seconds": round(time.perf_counter() - start, 1), "processes": processes, "done": done, "of": len(tasks)}


def _compile(task: tuple[str, int, str, int, int]) -> None:
    suite, index, name, share, shares = task
    # A share's best is not the search's: neither Triton nor fla may keep it.
    os.environ["TRITON_CACHE_AUTOTUNING"] = os.environ["FLA_CACHE_RESULTS"] = "0"
    device = torch.device("cuda")
    case = importlib.import_module(f"chela_plugin.bench.{suite}").cases(device)[index]
    try:
        if shares > 1:
            _import_peers()
            only_compile(share, shares)
        work = case.contenders[name]()
        for run in reversed(work.runs.values()):  # forward with backward first: it compiles most
            if not isinstance(run, Captured):
                run()
        torch.cuda.synchronize()
    except Exception as error:  # the suite itself will say so
        print(f"compiling ahead, {name}: {type(error).__name__}: {str(error)[:120]}", file=sys.stderr)
    finally:
        work = None
        torch.cuda.empty_cache()  # other processes compile on this card


def _import_peers() -> None:
    from chela_plugin.bench import peers

    peers.fla("layers")


def only_compile(share: int, shares: int) -> None:
    """Every search of this process compiles each `shares`-th configuration, from `share` on, and times nothing.

    What is chosen then only has to run, so that the contender gets to its next kernel: one of the share's, or where
    none of them fits the device, a later one, for configurations are mostly listed from large blocks to small ones.
    """
    from triton.runtime import Autotuner

    def compiled(self: Any, *args: Any, config: Any, **meta: Any) -> list[float]:
        place = self.configs.index(config)
        if place % shares != share:
            return [2.0 - 0.001 * place] * 3
        options = {**meta, **config.all_kwargs()}
        try:
            if config.pre_hook:
                config.pre_hook({**self.nargs, **options})
            self.fn.run(*args, **options)
        except Exception:  # more shared memory or registers than there are
            return [float("inf")] * 3
        return [1.0] * 3

    Autotuner._bench = compiled
