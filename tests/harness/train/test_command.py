"""`chela train` on the command line: one message for a mistake, and the way to go on after Ctrl-C."""

import os
import signal

import pytest

from chela_plugin.harness.train import show


def test_ctrl_c_says_how_to_go_on_and_the_end_says_where_all_is(chela, config_file, tmp_path, monkeypatch):
    words = ("train", config_file("language"), "training.steps=6", "--out", tmp_path / "out")
    step = show.Lines.step

    def interrupting(self, now, values):
        step(self, now, values)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(show.Lines, "step", interrupting)
        code, text, _ = chela(*words)
    assert code == 130
    assert "chela " + " ".join(map(str, words)) in text
    code, text, _ = chela(*words)
    assert code == 0
    assert "going on from step 3" in text and "step 6/6  loss" in text
    assert f"are in {tmp_path / 'out'}" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "shipped: bytes_small"),
        (["bytes_small", "lm_340m"], "one YAML file or shipped run is needed"),
        (["bytes_small", "training.stepz=3"], "did you mean 'steps'"),
        (["bytes_small"], "text.txt is no file and no folder"),
        (["bytes_small", "machine.accelerator=cuda"], "sees no CUDA device"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(chela, words, message, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, _, err = chela("train", *words, "--out", tmp_path / "out")
    assert code == 2
    assert message in err and "Traceback" not in err
    assert not (tmp_path / "out" / "run.json").exists()
