"""A run as a CUDA graph: the device's work without the host's, the same for every contender."""

from __future__ import annotations

import functools
from typing import Any

import torch

from chela_plugin.bench.timing import Run

WARM_UPS = 3  # as torch's documentation asks: allocations, searches and libraries' handles come first


class Captured:
    """Captures `run` at the first call and replays it from then on.

    All graphs of a process share one pool of memory: nothing in it outlives a replay, and no two run at once.
    Raises what the capture raises, for a run that waits for the device or reads from it.
    """

    def __init__(self, run: Run):
        self.run = run
        self.graph: Any = None

    def __call__(self) -> None:
        if self.graph is None:
            self.graph = self._capture()
        self.graph.replay()

    def _capture(self) -> Any:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self.run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=_first().pool()):
            self.run()
        return graph


@functools.cache
def _first() -> Any:
    """A graph that stays, for a pool goes with the last graph that used it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.zeros(1, device="cuda")
    return graph
