"""One update of the weights: eager first, then replays of what was recorded for the batch's shape."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from chela_plugin.harness import training, update
from chela_plugin.harness.backbones import build, loss_sum
from chela_plugin.harness.config import LanguageBackbone, SequenceBackbone, Training, VisionBackbone
from chela_plugin.harness.feed import forward
from chela_plugin.harness.tasks import Examples
from chela_plugin.harness.update import EAGER_STEPS, NotCapturable, Update, adamw, set_learning_rate

RECIPE = Training(steps=2, batch_size=4, evaluate_every=2, accelerator="cpu")


def batches(count):
    generator = torch.Generator().manual_seed(0)
    for step in range(count):
        size = 4 + 2 * (step % 2)  # two shapes in turn
        yield {
            "inputs": torch.randn(size, 6, generator=generator),
            "targets": torch.randint(3, (size,), generator=generator),
        }


def recorded(step, stream, pool):
    """As CUDA does it: the step's memory is the batch's own at each replay, and recording changes no weight."""
    return SimpleNamespace(replay=lambda: loss.copy_(step())), (loss := torch.zeros(()))


def trained(*, graphs, steps=14):
    torch.manual_seed(0)
    fabric = training.new_fabric(RECIPE)
    model = torch.nn.Linear(6, 3)
    wrapped, optimizer = fabric.setup(model, adamw(model, 0.1))
    made = Update(fabric, wrapped, optimizer, 1.0, forward, graphs=graphs)
    made.on = graphs  # the device is a CPU, and `recorded` needs none
    losses = []
    for step, batch in enumerate(batches(steps)):
        set_learning_rate(optimizer, 0.01 * (step + 1))
        losses.append(made(batch))
    return model, losses, made


def test_replays_give_the_same_losses_and_weights(monkeypatch):
    monkeypatch.setattr(update, "record", recorded)
    model, losses, made = trained(graphs=True)
    plain, others, _ = trained(graphs=False)
    assert made.replayed == 14 - 2 * EAGER_STEPS
    assert len(made.captured) == 2
    assert torch.equal(torch.stack(losses), torch.stack(others))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_shapes_beyond_the_most_graphs_stay_eager(monkeypatch):
    monkeypatch.setattr(update, "record", recorded)
    monkeypatch.setattr(update, "MOST_GRAPHS", 1)
    model, _, made = trained(graphs=True)
    plain, _, _ = trained(graphs=False)
    assert len(made.captured) == 1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_a_step_that_cannot_be_captured_says_what_runs_it(monkeypatch):
    def fails(step, stream, pool):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(update, "record", fails)
    with pytest.raises(NotCapturable, match=r"\(RuntimeError: operation not permitted .*training\.cuda_graph=false"):
        trained(graphs=True)


def test_weights_that_a_replay_changed_count_as_changed(monkeypatch):
    """What is kept of weights, such as folded taps, is kept by their version."""
    graph = SimpleNamespace(replay=lambda: None)
    monkeypatch.setattr(update, "record", lambda *_: (graph, torch.zeros(())))
    model, _, made = trained(graphs=True, steps=2 * EAGER_STEPS)
    before = [p._version for p in model.parameters()]
    made(next(batches(1)))
    assert made.replayed == 1
    assert all(p._version > v for p, v in zip(model.parameters(), before, strict=True))


class NothingReadBack(TorchDispatchMode):
    """Fails at operations whose result the host must see: they wait for the device, and no capture can hold them."""

    READ_BACK = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "bincount")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").partition(".")[0]
        assert not name.startswith(self.READ_BACK), f"{function.name()} reads back from the device"
        return function(*args, **kwargs or {})


@pytest.mark.parametrize(
    "mixer",
    [
        *("chela", "chela(long=multiscale)", "chela(long=implicit)", "chela(long=explicit)", "chela(norm=batch)"),
        *("attention", "linear_attention", "retnet", "gla", "mamba2", "gated_deltanet", "conv"),
    ],
)
@pytest.mark.parametrize("kind", ["language", "padded", "images"])
def test_no_mixers_step_reads_a_number_back(mixer, kind, monkeypatch):
    # On a GPU a decay's sign is read once for each kind of input, in the eager steps, and not in every call as here.
    monkeypatch.setattr("chela_plugin.kernels.linear_attention._sign_is_read", lambda log_decay: False)
    torch.manual_seed(0)
    tokens = torch.randint(1, 32, (2, 48))
    if kind == "language":
        backbone = LanguageBackbone(kind="language", dim=64, depth=1, mlp_hidden=32)
        data = Examples(tokens, tokens, classes=32, metric="accuracy")
    else:  # hosts that look both ways
        mixer = mixer if mixer.partition("(")[0] in ("chela", "attention", "conv") else f"bidirectional({mixer})"
    if kind == "images":
        backbone = VisionBackbone(kind="vision", dim=64, depth=1, patch_size=4, mlp_hidden=32)
        data = Examples(torch.randn(2, 1, 16, 16), tokens[:, 0] % 3, classes=3, metric="accuracy")
    elif kind == "padded":
        backbone = SequenceBackbone(kind="sequence", dim=64, depth=1, mlp_hidden=32)
        tokens[0, 40:] = 0
        data = Examples(tokens, tokens[:, 0] % 3, classes=3, vocabulary=32, padding=0, metric="accuracy")
    model = build(backbone, data, mixer, 32)
    with NothingReadBack():
        logits, targets = forward(model, {"inputs": data.inputs, "targets": data.targets})
        loss_sum(logits, targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
