"""Equal terms: every run of a report is looked at, and a planted violation is found."""

import copy
from pathlib import Path

import pytest

from chela_plugin.harness.results import open_for_reading
from chela_plugin.harness.terms import violations

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results"


def results(name="demo"):
    return copy.deepcopy(open_for_reading(COMMITTED / name))


@pytest.mark.parametrize("folder", sorted(p.parent.name for p in COMMITTED.glob("*/results.jsonl")))
def test_every_committed_run_had_equal_terms(folder):
    manifest, records = results(folder)
    finished = {r["cell"] for r in records if r["record"] == "run" and r["status"] == "finished"}
    assert violations(manifest, records) == (len(finished), [])


def other_rate(run):
    run["learning_rate"] = 0.5


PLANTED = {
    "parameters": (lambda run: run.update(parameters=int(run["parameters"] * 1.021)), "of the baseline's"),
    "data": (lambda run: run["data"].update(train="0" * 64), "another data than"),
    "steps": (lambda run: run.update(steps=run["steps"] - 1), "another number of steps than"),
    "tokens": (lambda run: run.update(tokens=1), "another number of tokens than"),
    "schedule": (lambda run: run.update(schedule="0123456789abcdef"), "another schedule than"),
    "order": (lambda run: run.update(order="0123456789abcdef"), "another order of examples"),
    "readings": (lambda run: run["history"]["step"].pop(), "another steps at which validation was read than"),
    "device": (lambda run: run.update(device="NVIDIA H100"), "another device than"),
    "versions": (lambda run: run["versions"].update(torch="1.0"), "another versions than"),
    "learning rate": (other_rate, "its learning_rate is not in the ablation's learning_rates"),
}


@pytest.mark.parametrize("term", PLANTED)
@pytest.mark.parametrize("mixer", ["chela", "attention"])
def test_a_planted_violation_is_found_and_named(term, mixer):
    plant, sentence = PLANTED[term]
    manifest, records = results()
    run = next(r for r in records if (r["record"], r["ablation"], r["mixer"], r["seed"]) == ("run", "digits", mixer, 1))
    plant(run)
    found = violations(manifest, records)[1]
    assert any(sentence in line and line.startswith("digits/digits: ") for line in found), found
    assert any(f"{mixer}, learning rate" in line for line in found)


def test_a_second_reading_of_the_test_split_is_found():
    manifest, records = results()
    test = next(r for r in records if r["record"] == "test")
    assert "read more than once" in violations(manifest, [*records, test])[1][0]


def test_a_test_at_a_learning_rate_that_validation_does_not_choose_is_found():
    manifest, records = results()
    manifest["ablations"]["digits"]["learning_rates"].append(0.01)
    better = [
        {**r, "learning_rate": 0.01, "cell": r["cell"] + "x", "validation": 1.0}
        for r in records
        if r["record"] == "run" and (r["ablation"], r["mixer"]) == ("digits", "chela")
    ]
    found = violations(manifest, [*records, *better])[1]
    assert len(found) == 2  # both seeds
    assert all("at another learning rate than validation chooses, 0.01" in line for line in found)


def test_a_test_on_other_data_is_found():
    manifest, records = results()
    tests = [r for r in records if r["record"] == "test" and r["ablation"] == "bytes"]
    tests[-1]["data"]["test"] = "0" * 64
    assert ["another test split" in line for line in violations(manifest, records)[1]] == [True]
