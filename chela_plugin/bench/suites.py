"""The suites by name, and what `chela bench` does with one."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from chela_plugin.bench.ahead import compile_ahead
from chela_plugin.bench.runner import run_suite
from chela_plugin.harness.config import ConfigError

SUITES = ("operators", "layers", "vision", "lm")


def bench(
    suite: str,
    console: Console,
    *,
    device: str | None,
    filters: list[str],
    out: Path | None,
    rounds: int,
    budget_s: float,
    revision: str | None,
    processes: int,
) -> dict[str, Any]:
    """Run one suite on `device` (default: the GPU where there is one) and return its record.

    `processes` compile ahead on a GPU (`ahead.py`); 0 leaves it to each contender's first call.
    """
    place = device_of(device)
    cases = importlib.import_module(f"chela_plugin.bench.{suite}").cases(place)
    labels = [case.label(name, what) for case in cases for name in case.contenders for what in case.whats]
    check_filters(filters, labels)
    if out is not None and not out.parent.is_dir():
        raise ConfigError(f"the folder of --out {out} does not exist")
    settings: dict[str, Any] = {"filters": filters, "budget_s": budget_s}
    if place.type == "cuda" and processes:
        # A model's kernels are its layers'.
        ahead, words = ("layers", []) if suite == "lm" else (suite, filters)
        settings["compiled_ahead"] = compile_ahead(ahead, words, processes, budget_s)
        console.print(f"compiled ahead: {settings['compiled_ahead']}", markup=False)
    return run_suite(
        suite,
        cases,
        place,
        console,
        out=out,
        filters=filters,
        rounds=rounds,
        budget_s=budget_s,
        revision=revision,
        settings=settings,
    )


def device_of(device: str | None) -> torch.device:
    """Raises ConfigError for a device that isn't here, or that no suite has sizes for."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        place = torch.device("meta")
    if place.type not in ("cuda", "cpu"):
        raise ConfigError(f"--device is cuda or cpu, got {device!r}")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device here; --device cpu runs small sizes")
    return place


def check_filters(filters: list[str], labels: list[str]) -> None:
    """Raises ConfigError for a filter that is no regular expression, or where nothing passes them all."""
    import re

    for one in filters:
        try:
            re.compile(one)
        except re.error as error:
            raise ConfigError(f"--filter {one!r} is no regular expression: {error}") from None
    if not any(all(re.search(one, label) for one in filters) for label in labels):
        raise ConfigError(f"nothing matches --filter {' '.join(filters)}; labels look like: {labels[0]!r}")
