"""Image runs: resuming inside an epoch, other sizes, timm's folders, and files that are damaged."""

import io
import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from chela_plugin.harness.config import ConfigError
from chela_plugin.harness.train import show
from chela_plugin.harness.train.launch import start

from .conftest import metrics


def train(run, out):
    return start(run, out, Console(file=io.StringIO()))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_stopped_inside_an_epoch_ends_bit_for_bit_as_an_undisturbed_one(tiny, tmp_path, monkeypatch, workers):
    run = tiny("images", f"data.workers={workers}")
    assert train(run, tmp_path / "whole") is None
    step = show.Lines.step

    def interrupting(self, now, values):
        step(self, now, values)
        if now == 3:  # it stops a step later: one step into the second epoch
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(show.Lines, "step", interrupting)
        assert train(run, tmp_path / "stopped") == signal.SIGINT
    assert train(run, tmp_path / "stopped") is None
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "stopped")
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "stopped"))
    assert all(torch.equal(one[k], other[k]) for k in one)
    sizes = json.loads((tmp_path / "whole" / "result.json").read_text())["accuracy_at_size"]
    assert sizes.keys() == {"4", "16"}


def test_a_folder_of_images_trains_through_timm_s_reader(tiny, tmp_path):
    folder = tmp_path / "folder"
    for split, count in (("train", 8), ("val", 3)):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.full((9, 12, 3), 10 * i + 100 * (name == "dog"), np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    words = ["data={kind: folder, path: %s, workers: 0}" % folder, "model.arguments.in_chans=3"]  # noqa: UP031
    assert train(tiny("images", *words, "augmentation.re_prob=0"), tmp_path / "out") is None
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_classes"] == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("augmentation.mixupp=0", "did you mean 'mixup'"),
        ("machine.strategy=fsdp", "image models train with ddp"),
        ("training.batch_size=64", "fewer training images"),
        ("training.batch_size=7", "even number"),
        ("model.name=chela_vit_tinyy", "chela_vit_tinyy"),
        ("model.arguments.mixer=chelaa", "chelaa"),
        ("data.path=nowhere", "apt install dataset-fashion-mnist"),
        ("data.kind=folder", "must hold train/"),
    ],
)
def test_a_mistake_is_one_clear_error(tiny, tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        train(tiny("images", override), tmp_path / "out")


def test_a_damaged_idx_file_is_named(tiny, tmp_path, idx_folder):
    path = idx_folder / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ConfigError, match=r"train-images-idx3-ubyte is no whole idx file"):
        train(tiny("images"), tmp_path / "out")
