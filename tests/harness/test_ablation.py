"""A whole ablation: equal terms, one reading of the test split, no run done twice, no failure that stops the others."""

import dataclasses
import errno
import io
import json
import math
import multiprocessing
import operator
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from chela_plugin.harness import ablation, cell, grid, workers
from chela_plugin.harness.config import ConfigError, load_ablation
from chela_plugin.harness.results import ResultsError, load_tensors, open_for_reading, read_records
from chela_plugin.harness.terms import violations
from chela_plugin.registry import register_mixer


@pytest.fixture
def ablate(tmp_path, quiet):
    def run(path, out="out", overrides=()):
        name, config = load_ablation(path, overrides)
        assert ablation.run_ablations({name: config}, tmp_path / out, quiet) is None
        return read_records(tmp_path / out / "results.jsonl")[0]

    return run


def of_kind(records, kind):
    return [r for r in records if r["record"] == kind]


def broken(dim, *, causal, depth=None, layer_idx=None, device=None, dtype=None):
    """Builds, and fails as soon as it is used."""

    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(dim))

        def forward(self, x, **_):
            raise RuntimeError("no such kernel")

        def reset_parameters(self): ...

    return Broken()


def test_every_run_of_a_task_has_equal_terms(tiny, ablate, tmp_path):
    runs = of_kind(ablate(tiny(mixers=["identity", "attention", "attention + identity"], backbone__depth=2)), "run")
    assert [r["status"] for r in runs] == ["finished"] * 3, [r.get("reason") for r in runs]
    assert all(abs(r["parameter_ratio"] - 1) <= 0.02 for r in runs)
    for key in ("data", "steps", "tokens", "learning_rate", "seed", "versions", "device"):
        assert len({json.dumps(r[key]) for r in runs}) == 1, key
    assert all(len(r["history"]["step"]) == 2 for r in runs)
    assert len({(r["order"], r["schedule"]) for r in runs}) == 1 and None not in (runs[0]["order"], runs[0]["schedule"])
    assert violations(*open_for_reading(tmp_path / "out")) == (3, [])


def test_language_models_are_compared_in_bits_per_byte_and_by_what_decoding_keeps(tiny, ablate):
    text = {"task": "bytes", "context": 32, "train_bytes": 4000, "validation_bytes": 2000, "test_bytes": 2000}
    backbone = {"kind": "language", "dim": 64, "depth": 2, "mlp_hidden": 170}
    records = ablate(tiny(tasks=[text], backbone=backbone, mixers=["attention", "gla", "identity"]))
    runs = {r["mixer"]: r for r in of_kind(records, "run")}
    assert {r["status"] for r in runs.values()} == {"finished"}, [r.get("reason") for r in runs.values()]
    assert runs["attention"]["state"]["per_token"] == 2 * 2 * 64  # a key and a value a block
    assert runs["gla"]["state"]["per_token"] == 0 < runs["gla"]["state"]["fixed"]
    assert runs["identity"]["state"] == {"fixed": 0, "per_token": 0}
    for test in of_kind(records, "test"):
        assert test["metric"] == "bits_per_byte"
        assert test["test"] == pytest.approx(test["test_loss"] / math.log(2))
        assert 4 < test["test"] < 8.1  # after 6 steps: near 8, a guess among 256 bytes
    assert len(of_kind(records, "test")) == 3


def test_mixers_see_the_same_batches_in_the_same_order(tiny, ablate, monkeypatch):
    seen: dict[int, list] = {}
    monkeypatch.setattr(cell, "augment", lambda task, inputs, generator: seen_by(inputs))
    runs = iter(range(100))

    def seen_by(inputs):
        seen[current[0]].append(inputs.clone())
        return inputs

    current = [0]
    train = cell.training.run

    def count(*args, **kwargs):
        current[0] = next(runs)
        seen[current[0]] = []
        return train(*args, **kwargs)

    monkeypatch.setattr(cell.training, "run", count)
    ablate(tiny())
    assert len(seen) == 2
    assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[1], strict=True))


def test_the_test_split_is_read_after_all_training_and_once_for_each_seed(tiny, ablate, monkeypatch):
    asked = []
    real = cell.examples
    monkeypatch.setattr(cell, "examples", lambda task, split: asked.append(split) or real(task, split))
    path = tiny(learning_rates=[0.01, 0.0001], seeds=[0, 1])
    records = ablate(path)
    kinds = [r["record"] for r in records]
    assert kinds == ["run"] * 8 + ["test"] * 4
    assert asked.index("test") == len(asked) - 1  # one reading, cached, after everything else was read
    for mixer in ("identity", "attention"):
        runs = [r for r in of_kind(records, "run") if r["mixer"] == mixer]
        chosen = {r["learning_rate"] for r in of_kind(records, "test") if r["mixer"] == mixer}
        assert chosen == {grid.choose_learning_rate(runs)}
    asked.clear()
    assert ablate(path) == records
    assert "test" not in asked


def test_the_learning_rate_is_chosen_by_mean_validation_and_missing_seeds_count_against_it():
    def run(rate, seed, validation, metric="accuracy"):
        return {"learning_rate": rate, "seed": seed, "validation": validation, "validation_loss": 1.0, "metric": metric}

    runs = [run(1, 0, 0.9), run(1, 1, 0.7), run(2, 0, 0.81), run(2, 1, 0.82), run(3, 0, 0.99)]
    assert grid.choose_learning_rate(runs) == 2
    assert grid.choose_learning_rate([run(1, 0, 1.2, "bits_per_byte"), run(2, 0, 1.3, "bits_per_byte")]) == 1


def test_a_failed_run_is_recorded_with_its_reason_and_the_others_go_on(tiny, ablate):
    register_mixer("broken", broken)
    path = tiny(mixers=["broken", "attention", "mamba2_of_nobody"])
    with pytest.raises(ConfigError, match="mamba2_of_nobody"):
        ablate(path)
    records = ablate(tiny(mixers=["broken", "attention"]))
    first, second = of_kind(records, "run")
    assert (first["status"], first["reason"]) == ("failed", "RuntimeError: no such kernel")
    assert second["status"] == "finished"
    assert [r["mixer"] for r in of_kind(records, "test")] == ["attention"]


def test_a_mixer_whose_package_is_missing_shows_the_pip_line_and_can_be_no_baseline(
    tiny, ablate, tmp_path, monkeypatch
):
    info = tmp_path / "site" / "needy-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "entry_points.txt").write_text("[chela_plugin.mixers]\nneedy = needy_code:factory [fast]\n")
    requires = "Provides-Extra: fast\nRequires-Dist: no-such-package-of-anyone; extra == 'fast'\n"
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: needy\nVersion: 1.0\n{requires}")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    needy, other = of_kind(ablate(tiny(mixers=["needy", "identity"], baseline="identity")), "run")
    assert (needy["status"], other["status"]) == ("failed", "finished")
    assert "pip install 'needy[fast]'" in needy["reason"]
    with pytest.raises(ConfigError, match=r"baseline: .*needs no-such-package-of-anyone"):
        ablate(tiny(mixers=["needy", "identity"], baseline="needy"), "other")
    assert not (tmp_path / "other").exists()


def test_a_model_that_fails_on_the_test_split_keeps_its_run_and_the_others_are_read(
    tiny, ablate, tmp_path, monkeypatch
):
    read_test = cell.CellRunner.read_test

    def fail_for_identity(self, run):
        if run["mixer"] == "identity":
            raise RuntimeError("no such kernel")
        return read_test(self, run)

    path = tiny()
    with monkeypatch.context() as patch:
        patch.setattr(cell.CellRunner, "read_test", fail_for_identity)
        with pytest.raises(ResultsError, match=r"digits, identity, seed 0: RuntimeError: no such kernel"):
            ablate(path)
    records = read_records(tmp_path / "out" / "results.jsonl")[0]
    assert [r["mixer"] for r in of_kind(records, "test")] == ["attention"]
    assert {r["mixer"] for r in of_kind(ablate(path), "test")} == {"attention", "identity"}


def test_a_mixer_that_can_not_be_matched_is_an_error_in_its_row(tiny, ablate):
    records = ablate(tiny(baseline="identity", backbone__mlp_hidden=4))
    failed = [r for r in of_kind(records, "run") if r["status"] == "failed"]
    assert [r["mixer"] for r in failed] == ["attention"]
    assert "UnmatchedParameters" in failed[0]["reason"]


def test_a_finished_run_is_never_done_twice_and_a_failed_one_is_tried_again(tiny, ablate, monkeypatch):
    register_mixer("broken", broken)
    path = tiny(mixers=["broken", "attention"])
    before = of_kind(ablate(path), "run")
    after = of_kind(ablate(path), "run")
    assert after[:2] == before
    assert [r["mixer"] for r in after[2:]] == ["broken"]


def test_a_run_whose_record_was_half_written_is_done_again_with_the_same_result(tiny, ablate, tmp_path, comparable):
    path = tiny()
    records = ablate(path)
    log = tmp_path / "out" / "results.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(lines[0] + lines[1][:50])
    again = ablate(path)
    assert again[0] == records[0]
    assert [comparable(r) for r in again] == [comparable(r) for r in records]


def test_a_signal_while_the_test_split_is_read_stops_after_this_reading(tiny, ablate, tmp_path, quiet, monkeypatch):
    path = tiny()
    name, config = load_ablation(path)
    read_test = cell.CellRunner.read_test

    def interrupted(self, run):
        os.kill(os.getpid(), signal.SIGINT)
        return read_test(self, run)

    with monkeypatch.context() as patch:
        patch.setattr(cell.CellRunner, "read_test", interrupted)
        assert ablation.run_ablations({name: config}, tmp_path / "out", quiet) == 128 + signal.SIGINT
    assert len(of_kind(read_records(tmp_path / "out" / "results.jsonl")[0], "test")) == 1
    assert len(of_kind(ablate(path), "test")) == 2


def test_runs_are_not_added_to_those_that_saw_other_data(tiny, ablate, tmp_path, monkeypatch):
    path = tiny()
    ablate(path)
    log = tmp_path / "out" / "results.jsonl"
    first_run = log.read_bytes().splitlines(keepends=True)[0]
    log.write_bytes(first_run)
    real = cell.examples

    def changed(task, split):
        data = real(task, split)
        return dataclasses.replace(data, inputs=data.inputs + 1)

    monkeypatch.setattr(cell, "examples", changed)
    with pytest.raises(ResultsError, match=r"the train split of task 'digits' is not what the finished runs saw"):
        ablate(path)
    assert log.read_bytes() == first_run


@pytest.mark.parametrize("other", ["attention()", "2*attention", "attention + attention"])
def test_two_spellings_of_one_model_collide_and_are_refused_before_any_run(tiny, ablate, tmp_path, other):
    with pytest.raises(ConfigError, match=r"'attention' and '.*' are the same model: two cells would collide"):
        ablate(tiny(mixers=["attention", other], backbone__depth=2))
    assert not (tmp_path / "out").exists()


def saved_steps(folder: Path) -> int:
    """Steps that the checkpoints in a results folder hold, all cells together."""
    states = [load_tensors(p) for p in folder.glob("cells/*/run.safetensors")]
    return sum(state[1]["step"] for state in states if state is not None)


def test_in_slices_of_a_single_step_it_ends_as_if_undisturbed(
    tiny, ablate, tmp_path, quiet, comparable, assert_same_weights
):
    path = tiny(training__steps=3, training__evaluate_every=3, mixers=["identity", "attention"])
    whole = ablate(path, "whole")
    name, config = load_ablation(path)
    codes = []
    while not codes or codes[-1] is not None:
        codes.append(ablation.run_ablations({name: config}, tmp_path / "parts", quiet, max_seconds=0))
    assert codes == [75] * 7 + [None]  # three steps of two cells, two readings of the test split
    parts = read_records(tmp_path / "parts" / "results.jsonl")[0]
    assert [comparable(r) for r in parts] == [comparable(r) for r in whole]
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")


def test_a_disk_that_is_full_at_any_write_loses_nothing_finished(tiny, ablate, tmp_path, monkeypatch, comparable):
    training = {"training__steps": 2, "training__evaluate_every": 2, "training__warmup_steps": 0}
    path = tiny(**training, mixers=["identity"], baseline="identity")
    whole = ablate(path, "whole")
    real = os.fsync
    writes = 0

    def full(handle):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    while True:  # fails at the first write, the second, ... until none is left to fail
        left, out = writes, f"full{writes}"
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            try:
                ablate(path, out)
                break
            except ResultsError as error:
                assert "No space left on device" in str(error) and "Finished runs are kept" in str(error)
        before = read_records(tmp_path / out / "results.jsonl")[0]
        after = ablate(path, out)
        assert after[: len(before)] == before
        assert [comparable(r) for r in after] == [comparable(r) for r in whole]
        writes += 1
    assert writes >= 8  # manifest, checkpoint, best weights: a file and its folder each; two records


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
@pytest.mark.parametrize("where", ["tensorboard", "cells"])
def test_a_disk_that_is_full_for_a_folder_or_a_curve_is_the_same_error(tiny, ablate, monkeypatch, where):
    path = tiny(mixers=["identity"], baseline="identity")
    with monkeypatch.context() as patch:
        if where == "cells":
            real = Path.mkdir

            def refuse(self, *args, **kwargs):
                if self.parent.name == "cells":
                    raise OSError(errno.ENOSPC, "No space left on device")
                return real(self, *args, **kwargs)

            patch.setattr(Path, "mkdir", refuse)
        else:
            from tensorboard.summary.writer.record_writer import RecordWriter

            def write(self, data):
                raise OSError(errno.ENOSPC, "No space left on device")

            patch.setattr(RecordWriter, "write", write)
        with pytest.raises(ResultsError, match=rf"cannot write .*{where}.*No space left on device"):
            ablate(path)
    assert [r["record"] for r in ablate(path)] == ["run", "test"]


def test_a_second_process_on_the_folder_is_refused_while_runs_go_on(tiny, tmp_path, quiet, monkeypatch):
    name, config = load_ablation(tiny())
    refused = []

    def start(self, cell):
        with pytest.raises(ResultsError, match="another process is writing") as error:
            ablation.run_ablations({name: config}, tmp_path / "out", quiet)
        refused.append(error)

    monkeypatch.setattr(ablation._Events, "start", start)
    monkeypatch.setattr(ablation._Events, "done", lambda self, cell, record: self.results.append(record))
    assert ablation.run_ablations({name: config}, tmp_path / "out", quiet) is None
    assert len(refused) == 2


def test_runs_of_another_revision_are_kept_and_said(tiny, ablate, tmp_path, monkeypatch):
    path = tiny()
    records = ablate(path)
    monkeypatch.setattr(ablation, "revision", lambda: {"commit": "0" * 40})
    out = io.StringIO()
    name, config = load_ablation(path)
    assert ablation.run_ablations({name: config}, tmp_path / "out", Console(file=out)) is None
    assert "2 finished runs are of another revision of this code" in out.getvalue()
    assert read_records(tmp_path / "out" / "results.jsonl")[0] == records


def test_each_worker_sees_one_gpu(monkeypatch):
    config = load_ablation("digits")[1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert workers.visible_gpus([config]) == ["0", "1", "2"]
    assert workers.default_workers([config]) == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5,6")
    gpus = workers.visible_gpus([config])
    seen = []
    for slot in range(4):
        with workers._one_gpu(gpus, slot):
            seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert seen == ["4", "GPU-5", "6", "4"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,GPU-5,6"
    on_cpu = config.model_copy(update={"training": config.training.model_copy(update={"accelerator": "cpu"})})
    assert workers.visible_gpus([on_cpu]) == []


def test_interrupted_and_killed_it_goes_on_and_ends_as_if_undisturbed(
    tiny, ablate, tmp_path, comparable, assert_same_weights
):
    path = tiny(training__steps=40, training__evaluate_every=20, checkpoint_seconds=0)
    whole = ablate(path, "whole")
    out = tmp_path / "parts"
    command = [sys.executable, "-m", "chela_plugin.cli", "ablate", str(path), "--workers", "2", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}

    def start_and(send: signal.Signals) -> subprocess.CompletedProcess:
        seen = {p: p.stat().st_mtime_ns for p in out.glob("cells/*/run.safetensors")}
        child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 240  # a crowded machine takes a minute to import torch
        while not any(p.stat().st_mtime_ns != seen.get(p) for p in list(out.glob("cells/*/run.safetensors"))):
            assert child.poll() is None and time.monotonic() < deadline, child.communicate()
            time.sleep(0.01)
        child.send_signal(send)
        stdout, stderr = child.communicate(timeout=240)
        return subprocess.CompletedProcess(command, child.returncode, stdout, stderr)

    # Two processes side by side; the signal goes to the main one alone.
    interrupted = start_and(signal.SIGINT)
    assert interrupted.returncode == 130, interrupted.stderr
    assert f"chela ablate {path} --out {out} --workers 2" in interrupted.stdout
    command[command.index("--workers") + 1] = "1"
    done = [saved_steps(out)]
    for _ in range(3):  # in the middle of the first cell, each time
        assert start_and(signal.SIGKILL).returncode == -signal.SIGKILL
        done.append(saved_steps(out))
    assert not (out / "results.jsonl").exists()
    assert done == sorted(set(done)), done  # each start went on where the last checkpoint stood
    parts = ablate(path, "parts")
    by_cell = operator.itemgetter("record", "cell")  # side by side, runs end in any order
    assert [comparable(r) for r in sorted(parts, key=by_cell)] == [comparable(r) for r in sorted(whole, key=by_cell)]
    assert_same_weights(tmp_path / "whole", out)


def test_no_file_of_a_results_folder_is_a_pickle(tiny, ablate, tmp_path):
    ablate(tiny())
    suffixes = {p.suffix for p in (tmp_path / "out").rglob("*") if p.is_file() and "tfevents" not in p.name}
    assert suffixes <= {".safetensors", ".json", ".jsonl", ""}


def test_a_worker_that_dies_costs_its_own_cell_only(tiny, tmp_path):
    changes = {"training__steps": 400, "training__evaluate_every": 400, "mixers": ["identity"], "baseline": "identity"}
    name, config = load_ablation(tiny(seeds=[0, 1], **changes))
    outcomes: dict[int, dict] = {}

    class Events:
        killed = False

        def start(self, cell): ...

        def step(self, cell, step, loss):
            if not self.killed:
                self.killed = True
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

        def done(self, cell, record):
            outcomes[cell.seed] = record

    workers.run_in_processes(grid.cells(name, config), {name: config}, tmp_path, 1, Events(), workers.Stop())
    assert outcomes[0]["status"] == "failed"
    assert outcomes[0]["reason"].startswith("the process of this run was killed by signal 9")
    assert outcomes[1]["status"] == "finished"
