"""Language runs: resuming bit for bit, micro-batches, several processes, and what is saved."""

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from chela_plugin.harness.config import ConfigError
from chela_plugin.harness.train import show
from chela_plugin.harness.train.launch import TrainingFailed, start

from .conftest import metrics


def train(run, out, console=None):
    return start(run, out, console or Console(file=io.StringIO()))


def assert_same_end(one, other):
    """Bit for bit: every metric, the final weights, the optimiser's state."""
    assert metrics(one) == metrics(other)
    last = sorted((one / "checkpoints").iterdir())[-1].name
    for name in (
        "model.safetensors",
        f"checkpoints/{last}/model.safetensors",
        f"checkpoints/{last}/optimizer.safetensors",
    ):
        a, b = load_file(one / name), load_file(other / name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name


@pytest.fixture
def interrupt_at(monkeypatch):
    """SIGINT as step N is shown: the run stops a step later."""

    def at(number):
        step = show.Lines.step

        def interrupting(self, now, values):
            step(self, now, values)
            if now == number:
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(show.Lines, "step", interrupting)

    return at


def test_a_run_that_ctrl_c_stopped_ends_bit_for_bit_as_an_undisturbed_one(tiny, tmp_path, interrupt_at, monkeypatch):
    run = tiny("language", "model.config.mixer=chela")
    assert train(run, tmp_path / "whole") is None
    with monkeypatch.context():
        interrupt_at(4)
        assert train(run, tmp_path / "stopped") == signal.SIGINT
        assert not (tmp_path / "stopped" / "model.safetensors").exists()
        interrupt_at(None)
    assert train(run, tmp_path / "stopped") is None
    assert_same_end(tmp_path / "whole", tmp_path / "stopped")
    assert [p.name for p in (tmp_path / "stopped" / "checkpoints").iterdir()] == ["step-8"]
    before = (tmp_path / "stopped" / "result.json").stat().st_mtime_ns
    assert train(run, tmp_path / "stopped") is None  # finished: nothing is done again
    assert (tmp_path / "stopped" / "result.json").stat().st_mtime_ns == before


def test_a_run_that_kill_9_ended_goes_on_bit_for_bit(tiny, config_file, tmp_path):
    words = ("training.steps=40", "checkpoints.steps=3")
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "chela_plugin.cli", "train", config_file("language"), *words, "--out", out]
    process = subprocess.Popen([*map(str, command)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    while process.poll() is None and not [*out.glob("checkpoints/step-*")]:
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not (out / "result.json").exists()
    for folder in (out, tmp_path / "whole"):
        assert train(tiny("language", *words), folder) is None
    assert_same_end(tmp_path / "whole", out)


def test_micro_batches_give_the_large_batch(tiny, tmp_path):
    train(tiny("language"), tmp_path / "one")
    train(tiny("language", "machine.micro_batch_size=1"), tmp_path / "four")
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "four"), strict=True):
        # Sums of fp32 taken in another order differ by 1e-7 of a number; eight steps of AdamW, whose first ones divide
        # a gradient by itself, were seen to make 2e-6 of it.
        assert a == pytest.approx(b, rel=5e-5)


def test_ddp_until_a_process_dies_and_fsdp_from_there_give_one_process_s_losses(tiny, tmp_path):
    words = ("training.steps=120", "training.learning_rate=0.001", "checkpoints.steps=5")
    train(tiny("language", *words), tmp_path / "one")
    out, begin = tmp_path / "two", time.monotonic()

    def kill_one():
        while not [*out.glob("checkpoints/step-*")] and time.monotonic() - begin < 90:
            time.sleep(0.002)
        max(multiprocessing.active_children(), key=lambda p: p.pid).kill()

    thread = threading.Thread(target=kill_one)
    thread.start()
    two = (*words, "machine.devices=2", "machine.strategy=%s")
    with pytest.raises(TrainingFailed, match=r"process \d of the run.* the same command goes on"):
        train(tiny("language", *two[:-1], two[-1] % "ddp"), out)
    thread.join()
    assert time.monotonic() - begin < 150  # no hang: torch's agent gives the others 30 s, then kills them
    kept = int(next(out.glob("checkpoints/step-*")).name.removeprefix("step-"))
    assert 0 < kept < 120
    assert train(tiny("language", *two[:-1], two[-1] % "fsdp"), out) is None
    assert json.loads((out / "result.json").read_text())["devices"] == 2
    for a, b in zip(metrics(tmp_path / "one"), metrics(out), strict=True):
        assert a == pytest.approx(b, rel=5e-5)  # sums in another order, as above
    one, other = (load_file(folder / "model.safetensors") for folder in (tmp_path / "one", out))
    assert {k: t.shape for k, t in one.items()} == {k: t.shape for k, t in other.items()}


def test_a_saved_model_loads_elsewhere_with_no_import_of_ours(tiny, tmp_path):
    """The calls that lm_eval --model hf makes, and timm's, in a process that names chela_plugin nowhere."""
    train(tiny("language", "model.config.mixer=chela(long:modal)"), tmp_path / "lm")
    train(tiny("images"), tmp_path / "vit")
    code = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=False)
model, info = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], config=config, dtype="auto", trust_remote_code=False, output_loading_info=True
)
assert not any(info.values()), info
print(model.config.mixer)
import timm, torch
model = timm.create_model("local-dir:" + sys.argv[2], pretrained=True)
assert model(torch.zeros(1, 1, 8, 8)).shape == (1, 3)
print(model.mixer)
"""
    words = [sys.executable, "-c", code, str(tmp_path / "lm"), str(tmp_path / "vit")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["chela(long=modal)", "bidirectional(linear_attention)"]


def test_another_config_and_a_stranger_s_folder_are_refused(tiny, tmp_path):
    train(tiny("language"), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"another config \(different: training.learning_rate\)"):
        train(tiny("language", "training.learning_rate=0.02"), tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    with pytest.raises(ConfigError, match="is no run's folder"):
        train(tiny("language"), tmp_path / "mine")


def test_a_damaged_checkpoint_is_named(tiny, tmp_path, interrupt_at):
    interrupt_at(4)
    train(tiny("language"), tmp_path / "out")
    (tmp_path / "out/checkpoints/step-5/optimizer.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(ConfigError, match="step-5 is damaged"):
        train(tiny("language"), tmp_path / "out")


def test_a_loss_that_is_no_number_ends_the_run(tiny, tmp_path):
    run = tiny("language", "training.learning_rate=1e30")
    with pytest.raises(TrainingFailed, match="try a smaller learning rate"):
        train(run, tmp_path / "out")


def test_bf16_and_gradient_checkpointing_train(tiny, tmp_path):
    run = tiny("language", "precision=bf16-true", "model.gradient_checkpointing=true", "training.steps=4")
    assert train(run, tmp_path / "out") is None
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.bfloat16}


def test_any_model_of_transformers_trains(tiny, tmp_path):
    sizes = "{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 16}"
    run = tiny("language", "model.model_type=llama", f"model.config={sizes}", "training.steps=4")
    assert train(run, tmp_path / "out") is None
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.step=3", "did you mean 'steps'"),
        ("training.warmup_steps=8", "must be fewer than steps"),
        ("machine.strategy=fspd", "machine.strategy"),
        ("data.path=nowhere", "no file and no folder"),
        ("data.split=file", "leave a part empty"),
        ("context=4096", "fewer than the context"),
        ("machine.micro_batch_size=3", "no multiple of machine.micro_batch_size"),
        ("model.model_type=chelaa", "none that transformers knows"),
        ("model.config.hiden_size=8", "did you mean 'hidden_size'"),
        ("model.config.mixer=chela(log=modal)", "chela has no option 'log'"),
        ("model.config.vocab_size=3", "the data's is 256"),
    ],
)
def test_a_mistake_is_one_clear_error(tiny, tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        train(tiny("language", override), tmp_path / "out")


def test_tokens_of_another_program_train_too(tiny, tmp_path):
    np.arange(3000, dtype="<u2").tofile(tmp_path / "tokens.bin")
    words = ["data={kind: tokens, path: %s, vocab_size: %d}", "training.steps=4"]
    path = tmp_path / "tokens.bin"
    assert train(tiny("language", words[0] % (path, 3000), words[1]), tmp_path / "good") is None
    assert json.loads((tmp_path / "good" / "config.json").read_text())["vocab_size"] == 3000
    with pytest.raises(ConfigError, match=r"does not fit data\.vocab_size 20"):
        train(tiny("language", words[0] % (path, 20), words[1]), tmp_path / "bad")
