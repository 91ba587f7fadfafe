"""Whether all runs of a report had equal terms, re-derived from its records: what differs is named, run by run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from chela_plugin.harness.grid import choose_learning_rate, latest_runs
from chela_plugin.harness.results import Record
from chela_plugin.harness.table import unedited


def violations(manifest: dict[str, Any], records: Sequence[Record]) -> tuple[int, list[str]]:
    """How many finished runs were looked at, and a sentence for each term that one of them breaks.

    For each task: parameters within the ablation's tolerance of the baseline's; the same data, steps, tokens, schedule,
    readings of the validation split, device and versions as the baseline's runs; the same order of examples
    for the same seed; seeds and learning rates from the ablation's grid; the test split read once a seed, at the
    learning rate that validation chooses, on the same data. Raises ResultsError for edited records.
    """
    checked, wrong = 0, []
    with unedited():
        for ablation, config in manifest["ablations"].items():
            for task in config["tasks"]:
                here = [r for r in records if (r["ablation"], r["task"]) == (ablation, task["task"])]
                runs = [r for r in latest_runs(here) if r["status"] == "finished"]
                checked += len(runs)
                found = [*_runs(config, runs), *_tests(runs, [r for r in here if r["record"] == "test"])]
                wrong += [f"{ablation}/{task['task']}: {sentence}" for sentence in found]
    return checked, wrong


# Terms that all runs of a task share, and how a record shows them. None: written by a version that kept no such digest.
SHARED: dict[str, Callable[[Record], Any]] = {
    "data": lambda run: run["data"],
    "number of steps": lambda run: run["steps"],
    "number of tokens": lambda run: run["tokens"],
    "schedule": lambda run: run.get("schedule"),
    "steps at which validation was read": lambda run: run["history"]["step"],
    "device": lambda run: run["device"],
    "versions": lambda run: run["versions"],
}


def _name(run: Record) -> str:
    return f"{run['mixer']}, learning rate {run['learning_rate']:g}, seed {run['seed']}"


def _same(value: Any, other: Any) -> bool:
    return json.dumps(value, sort_keys=True) == json.dumps(other, sort_keys=True)


def _runs(config: dict[str, Any], runs: Sequence[Record]) -> Iterator[str]:
    baselines = [r for r in runs if r["mixer"] == config["baseline"]]
    if not runs:
        return
    model = (baselines or runs)[0]
    target = model["parameters"] if baselines else model["parameters"] / model["parameter_ratio"]
    first: dict[int, Record] = {}  # by seed
    for run in [*baselines, *(r for r in runs if r not in baselines)]:
        ratio = run["parameters"] / target
        if abs(ratio - 1) > config["parameter_tolerance"]:
            yield f"{_name(run)}: {run['parameters']:,} parameters are {ratio:.4f} of the baseline's {target:,.0f}"
        for term, shown in SHARED.items():
            if not _same(shown(run), shown(model)):
                yield f"{_name(run)}: another {term} than {_name(model)}: {shown(run)} against {shown(model)}"
        if run["steps"] != config["training"]["steps"]:
            yield f"{_name(run)}: {run['steps']} steps, the ablation says {config['training']['steps']}"
        other = first.setdefault(run["seed"], run)
        if run.get("order") != other.get("order"):
            yield f"{_name(run)}: another order of examples than {_name(other)}"
        for key, grid in (("mixer", "mixers"), ("seed", "seeds"), ("learning_rate", "learning_rates")):
            if run[key] not in config[grid]:
                yield f"{_name(run)}: its {key} is not in the ablation's {grid}"


def _tests(runs: Sequence[Record], tests: Sequence[Record]) -> Iterator[str]:
    cells = {r["cell"]: r for r in runs}
    read: set[tuple[str, int]] = set()
    for test in tests:
        if (test["mixer"], test["seed"]) in read:
            yield f"{_name(test)}: the test split was read more than once"
        read.add((test["mixer"], test["seed"]))
        if not _same(test["data"], tests[0]["data"]):
            yield f"{_name(test)}: read on another test split than {_name(tests[0])}"
        run = cells.get(test["cell"])
        if run is None:
            yield f"{_name(test)}: the test split was read for a run that is not in the records"
            continue
        chosen = choose_learning_rate(r for r in runs if r["mixer"] == test["mixer"])
        if not run["learning_rate"] == test["learning_rate"] == chosen:
            yield f"{_name(test)}: the test split was read at another learning rate than validation chooses, {chosen:g}"
