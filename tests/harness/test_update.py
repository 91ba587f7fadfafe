"""One update of the weights: eager first, then replays of what was recorded for the batch's shape."""

from types import SimpleNamespace

import pytest
import torch

from chela_plugin.harness import training, update
from chela_plugin.harness.config import Training
from chela_plugin.harness.feed import forward
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


def recorded(step, stream):
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
    def fails(step, stream):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(update, "record", fails)
    with pytest.raises(NotCapturable, match=r"\(RuntimeError: operation not permitted .*training\.cuda_graph=false"):
        trained(graphs=True)


def test_weights_that_a_replay_changed_count_as_changed(monkeypatch):
    """What is kept of weights, such as folded taps, is kept by their version."""
    graph = SimpleNamespace(replay=lambda: None)
    monkeypatch.setattr(update, "record", lambda step, stream: (graph, torch.zeros(())))
    model, _, made = trained(graphs=True, steps=2 * EAGER_STEPS)
    before = [p._version for p in model.parameters()]
    made(next(batches(1)))
    assert made.replayed == 1
    assert all(p._version > v for p, v in zip(model.parameters(), before, strict=True))
