"""Faults: kills while a checkpoint is written, damaged and foreign checkpoints, two processes on one folder, pickle."""

import ast
import errno
import json
import os
import pickle
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save as safetensors_bytes

from chela_plugin.harness.config import ConfigError
from chela_plugin.harness.results import ResultsError, ResultsFolder, load_tensors, read_records, save_tensors
from chela_plugin.harness.train.checkpoint import RunFolder

ROOT = Path(__file__).parents[2]
KILLS = 50


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("checkpoint") / "run.safetensors"
    save_tensors(path, {"model/w": torch.arange(12.0).reshape(3, 4), "step": torch.tensor(3)}, {"step": 3})
    return path.read_bytes()


def test_a_checkpoint_comes_back_as_it_was_written(tmp_path):
    written = {
        "half": torch.randn(3, 5).bfloat16(),
        "view": torch.randn(4, 6).t()[1:],
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 3),
        "whole": torch.arange(7),
        "flags": torch.tensor([True, False]),
    }
    save_tensors(tmp_path / "x", written, {"step": 1, "history": {"ü": [0.1, None]}})
    tensors, state = load_tensors(tmp_path / "x")
    assert state == {"step": 1, "history": {"ü": [0.1, None]}}
    assert tensors.keys() == written.keys()
    for name, tensor in written.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_fifty_kills_during_checkpoint_writes_leave_a_loadable_checkpoint_each(tmp_path):
    """kill -9 at random moments of a process that does nothing but write one checkpoint after another."""
    rng = random.Random(0)
    path = tmp_path / "run.safetensors"
    program = f"""
import itertools, os, pathlib, signal, time, torch
from chela_plugin.harness.results import save_tensors
torch.set_num_threads(1)
path = pathlib.Path({str(path)!r})
for wait in {[rng.uniform(0.005, 0.03) for _ in range(KILLS)]}:
    path.unlink(missing_ok=True)
    child = os.fork()  # a new interpreter for each kill would cost seconds of imports
    if child == 0:
        for i in itertools.count():
            save_tensors(path, {{"x": torch.full((500_000,), float(i))}}, {{"step": i}})
    while not path.exists():
        time.sleep(0.001)
    time.sleep(wait)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.rename(path, path.with_name(f"left-{{time.monotonic_ns()}}"))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
    left = sorted(tmp_path.glob("left-*"))
    assert len(left) == KILLS
    steps = []
    for file in left:
        tensors, state = load_tensors(file)
        assert (tensors["x"] == state["step"]).all()
        steps.append(state["step"])
    assert max(steps) > 0, "no kill came after the first write: the moments are not spread over the writing"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_kills_of_a_training_run_that_saves_leave_its_newest_checkpoint_whole(tmp_path):
    """`chela train` writes two files and removes the checkpoint before; 50 kills, one folder, as a cluster would."""
    program = f"""
import os, pathlib, random, signal, time, torch
from chela_plugin.harness.train.checkpoint import RunFolder
torch.set_num_threads(1)
rng = random.Random(0)
folder = RunFolder(pathlib.Path({str(tmp_path)!r}), {{}})
step = 0
for _ in range({KILLS}):
    child = os.fork()
    if child == 0:
        while True:
            step += 1
            x = torch.full((50_000,), float(step))
            folder.save(step, {{"w": x}}, {{"w//exp_avg": x, "w//step": torch.tensor(float(step))}}, {{"step": step}})
    while folder.newest() is None or int(folder.newest().name[5:]) <= step:
        time.sleep(0.001)
    time.sleep(rng.uniform(0.002, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    model, optimizer, state = folder.load()
    assert step < state["step"] == int(optimizer["w//step"]) and (model["w"] == state["step"]).all()
    step = state["step"]
print(step)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2_000:]
    assert int(done.stdout) > KILLS, "no kill came after the first write: the moments are not spread over the writing"


@pytest.fixture
def run_folder(tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path, {})
    folder.save(3, {"w": torch.arange(12.0)}, {"w//exp_avg": torch.ones(12)}, {"step": 3})
    return folder


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_training_run_finds_a_flipped_bit_and_a_missing_file(run_folder, name):
    file = run_folder.newest() / name
    whole = bytearray(file.read_bytes())
    whole[-2] ^= 1
    file.write_bytes(whole)
    with pytest.raises(ConfigError, match=r"step-3 is damaged .*checksum differs.*remove that folder"):
        run_folder.load()
    file.unlink()
    with pytest.raises(ConfigError, match=r"step-3 is damaged \(a file is missing\)"):
        run_folder.load()


def test_a_disk_that_fills_up_while_a_training_run_saves_leaves_the_checkpoint_before(run_folder, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ConfigError, match=r"step-4: No space left on device; the checkpoint before it is kept"):
            run_folder.save(4, {"w": torch.zeros(12)}, {}, {"step": 4})
    assert run_folder.load()[2] == {"step": 3}
    run_folder.save(4, {"w": torch.zeros(12)}, {}, {"step": 4})
    assert run_folder.load()[2] == {"step": 4}
    assert [path.name for path in run_folder.checkpoints.iterdir()] == ["step-4"]


@pytest.mark.parametrize("part", ["header", "values", "anywhere"])
def test_any_flipped_bit_is_found(tmp_path, checkpoint, part):
    size = int.from_bytes(checkpoint[:8], "little") + 8
    where = {"header": range(size), "values": range(size, len(checkpoint)), "anywhere": range(len(checkpoint))}[part]
    rng, path = random.Random(0), tmp_path / "run.safetensors"
    for _ in range(60):
        damaged = bytearray(checkpoint)
        damaged[rng.choice(where)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            tensors, state = load_tensors(path)
        except ResultsError as error:
            assert str(path) in str(error) and "restore it, or remove it" in str(error)
        else:  # a bit of JSON that means nothing: a space of the header's padding made a tab or a line feed
            assert state == {"step": 3}
            assert torch.equal(tensors["model/w"], torch.arange(12.0).reshape(3, 4))


def test_a_checkpoint_cut_anywhere_is_one_clear_error(tmp_path, checkpoint):
    path = tmp_path / "run.safetensors"
    for length in range(0, len(checkpoint), 7):
        path.write_bytes(checkpoint[:length])
        with pytest.raises(ResultsError, match="is damaged or of another program"):
            load_tensors(path)


class Touch:
    """Unpickling one makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_foreign_files_are_one_clear_error_and_nothing_in_them_runs(tmp_path):
    ran = tmp_path / "ran"
    torch.save({"x": torch.ones(2), "evil": Touch(ran)}, tmp_path / "pickled.pt")
    foreign = {
        "pickle": pickle.dumps(Touch(ran)),
        "torch": (tmp_path / "pickled.pt").read_bytes(),
        "safetensors without our state": safetensors_bytes({"x": torch.ones(2)}),
        "safetensors with a state that is no JSON": safetensors_bytes(
            {"x": torch.ones(2)}, {"state": "{", "sha256": ""}
        ),
        "text": b"hello\n" * 100,
        "zip": b"PK\x03\x04" + bytes(100),
        "a header as long as memory": (2**62).to_bytes(8, "little") + b"{}",
        "values beyond the end": (lambda h: len(h).to_bytes(8, "little") + h)(
            json.dumps({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
        ),
    }
    for name, content in foreign.items():
        (tmp_path / "run.safetensors").write_bytes(content)
        with pytest.raises(ResultsError, match="is damaged or of another program"):
            load_tensors(tmp_path / "run.safetensors")
        assert not ran.exists(), name
    pickle.loads(foreign["pickle"])
    assert ran.exists(), "the trap itself works"


def test_a_missing_checkpoint_is_none_and_a_folder_in_its_place_is_an_error(tmp_path):
    assert load_tensors(tmp_path / "run.safetensors") is None
    (tmp_path / "run.safetensors").mkdir()
    with pytest.raises(ResultsError, match="is damaged or of another program"):
        load_tensors(tmp_path / "run.safetensors")


PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
SAFE_LOADERS = (["_ConfigLoader"], ["yaml.SafeLoader"], ["yaml.BaseLoader"])
UNPICKLES = {  # calls that unpickle, or run what they read
    ("torch", "load"),
    ("numpy", "load"),
    ("np", "load"),
    ("pandas", "read_pickle"),
    ("yaml", "unsafe_load"),
    ("yaml", "full_load"),
    ("yaml", "load_all"),
    ("yaml", "unsafe_load_all"),
}


def source_files() -> list[Path]:
    return [
        file for folder in ("chela_plugin", "registry", "kernels", "configs") for file in (ROOT / folder).rglob("*.py")
    ]


@pytest.mark.skipif(not (ROOT / "registry").is_dir(), reason="reads the source; here is only an installed package")
def test_no_load_path_can_unpickle_or_evaluate():
    found = []
    for file in source_files():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names if alias.name.split(".")[0] in PICKLES]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module] if (node.module or "").split(".")[0] in PICKLES else []
            elif isinstance(node, ast.Call):
                call = node.func
                if isinstance(call, ast.Name) and call.id in ("eval", "exec", "compile", "__import__"):
                    names = [call.id]
                elif isinstance(call, ast.Attribute) and isinstance(call.value, ast.Name):
                    pair = (call.value.id, call.attr)
                    if pair == ("yaml", "load"):
                        loader = [ast.unparse(k.value) for k in node.keywords if k.arg == "Loader"]
                        names = [] if loader in SAFE_LOADERS else ["yaml.load"]
                    else:
                        names = [".".join(pair)] if pair in UNPICKLES else []
            for keyword in getattr(node, "keywords", ()) if isinstance(node, ast.Call) else ():
                if keyword.arg in ("trust_remote_code", "allow_pickle", "weights_only"):
                    names.append(keyword.arg)
            found += [f"{file.relative_to(ROOT)}:{node.lineno}: {name}" for name in names]
    assert not found, "\n".join(found)


def test_the_yaml_loader_makes_no_objects(tmp_path):
    from chela_plugin.harness.config import ConfigError, load_ablation

    ran = tmp_path / "ran"
    for tag in ("!!python/object/apply:pathlib.Path.touch", "!!python/object/new:os.system", "!!python/name:os.system"):
        (tmp_path / "evil.yaml").write_text(f"tasks: {tag} [{ran}]\n")
        with pytest.raises(ConfigError, match="not valid YAML"):
            load_ablation(tmp_path / "evil.yaml")
    assert not ran.exists()


HOLDER = """
import pathlib, sys
from chela_plugin.harness.config import ConfigError
from chela_plugin.harness.results import ResultsError, ResultsFolder
try:
    with ResultsFolder(pathlib.Path(sys.argv[1]), {"a": {"seeds": [0]}}) as folder:
        print("holds", flush=True)
        for i in range(int(sys.argv[2])):
            folder.append({"record": "run", "cell": f"{sys.argv[3]}-{i}"})
        sys.stdin.readline()
except ResultsError as error:
    print(error)
    sys.exit(3)
"""


def test_of_two_processes_one_writes_and_the_other_is_told(tmp_path):
    """Also behind a kill -9 of the first: its lock falls with it, its lines stay."""
    folder = tmp_path / "runs"

    def start(name: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder), "20", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    first = start("first")
    assert first.stdout.readline() == "holds\n"
    second = start("second")
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 3
    assert "another process is writing to" in said and "give another --out" in said
    deadline = time.monotonic() + 30
    while len(read_records(folder / "results.jsonl")[0]) < 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    first.kill()
    first.communicate()
    with ResultsFolder(folder, {"a": {"seeds": [0]}}) as again:
        assert [record["cell"] for record in again.records] == [f"first-{i}" for i in range(20)]
