"""Training replayed from CUDA graphs ends as training launched step by step, and stops and goes on as that does."""

import pytest
import torch
from timm.data.loader import PrefetchLoader

from chela_plugin.harness import training
from chela_plugin.harness.backbones import build
from chela_plugin.harness.config import LanguageBackbone, Training
from chela_plugin.harness.results import load_tensors
from chela_plugin.harness.train.images import held

pytestmark = pytest.mark.gpu

MIXTURE = "[{length: 64, pairs: 4, examples: 96}, {length: 128, pairs: 8, examples: 96}]"


class Watcher:
    def __init__(self, stop_after=None):
        self.stop_after, self.asked = stop_after, 0

    def step(self, step, loss): ...

    def scalars(self, step, values): ...

    def stop(self):
        self.asked += 1
        return self.asked == self.stop_after


@pytest.fixture
def run(recall):
    def train(folder, mixer, *, graph, watcher=None):
        folder.mkdir(exist_ok=True)
        words = {"steps": 24, "batch_size": 32, "warmup_steps": 2, "evaluate_every": 12, "accelerator": "cuda"}
        recipe = Training(**words, precision="bf16-mixed", cuda_graph=graph)
        fabric = training.new_fabric(recipe)
        backbone = LanguageBackbone(kind="language", dim=128, depth=2, mlp_hidden=128)
        with training.reproducible(1):
            return training.run(
                lambda: build(backbone, recall, mixer, 128),
                recall,
                recall,
                None,
                recipe,
                learning_rate=1e-3,
                seed=0,
                folder=folder,
                checkpoint_seconds=1e9,
                fabric=fabric,
                watcher=watcher or Watcher(),
            )

    return train


def test_a_batch_stays_as_it_is_while_a_slow_step_waits_for_it():
    data = [(torch.full((4, 1, 8, 8), i, dtype=torch.uint8), torch.full((4,), i)) for i in range(30)]
    loader = PrefetchLoader(data, mean=(0.0,), std=(1.0,), channels=1)
    seen = []
    for batch in loader:
        images, labels = held(*batch)
        torch.cuda._sleep(20_000_000)  # about 10 ms on the device; the host goes on
        seen.append(torch.stack((images[:, 0, 0, 0] * 255, labels.float())))
        del images, labels
    found = torch.stack(seen).round().cpu()
    assert found[:, 0].eq(torch.arange(30.0)[:, None]).all() and found[:, 1].eq(torch.arange(30.0)[:, None]).all()


def weights(folder):
    return load_tensors(folder / "best.safetensors")[0]


@pytest.mark.parametrize("mixer", ["chela", "attention", "linear_attention", "mamba2", "conv"])
def test_a_replayed_run_ends_as_an_eager_one(run, tmp_path, mixer):
    eager = run(tmp_path / "eager", mixer, graph=False)
    replayed = run(tmp_path / "replayed", mixer, graph=True)
    assert eager.replayed == 0
    assert replayed.replayed == 16  # of two shapes, four steps each launch
    one, other = weights(tmp_path / "eager"), weights(tmp_path / "replayed")
    for name in one:
        # Equal launches on equal numbers, but cuBLAS may choose another algorithm under capture: one product's rounding
        # to bf16, grown over 20 updates of 1e-3.
        torch.testing.assert_close(one[name], other[name], rtol=1e-2, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_a_replayed_run_goes_on_after_a_stop(run, tmp_path):
    whole = run(tmp_path / "whole", "chela", graph=True)
    with pytest.raises(training.Interrupted):
        run(tmp_path / "parts", "chela", graph=True, watcher=Watcher(stop_after=15))
    parts = run(tmp_path / "parts", "chela", graph=True)
    assert parts.step == whole.step == 24
    assert parts.order == whole.order
    assert parts.history["train_loss"] == pytest.approx(whole.history["train_loss"], rel=1e-2)
