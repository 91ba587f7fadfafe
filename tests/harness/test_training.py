"""One run: resuming bit for bit, the recipe, and what is refused."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from chela_plugin.harness import training
from chela_plugin.harness.backbones import UnmatchedParameters, match_parameters
from chela_plugin.harness.config import Training
from chela_plugin.harness.results import ResultsError, load_tensors
from chela_plugin.harness.tasks import Examples
from chela_plugin.harness.update import adamw

RECIPE = Training(steps=12, batch_size=4, warmup_steps=2, evaluate_every=4, accelerator="cpu")


class Watcher:
    """Asks for a stop, or fails, after a number of steps."""

    def __init__(self, stop_after: int | None = None, fail_after: int | None = None):
        self.stop_after, self.fail_after, self.steps = stop_after, fail_after, 0

    def step(self, step, loss): ...

    def scalars(self, step, values): ...

    def stop(self):
        self.steps += 1
        if self.steps == self.fail_after:
            raise RuntimeError("the machine is gone")
        return self.steps == self.stop_after


def data(n: int, seed: int) -> Examples:
    inputs = torch.randn(n, 1, 2, 3, generator=torch.Generator().manual_seed(seed))
    return Examples(inputs, (inputs.sum((1, 2, 3)) > 0).long(), classes=2, metric="accuracy")


def model() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2))


@pytest.fixture(scope="module")
def fabric():
    return training.new_fabric(RECIPE)


def run(folder, fabric, watcher=None, checkpoint_seconds=1e9, recipe=RECIPE, learning_rate=0.01, build=model):
    folder.mkdir(exist_ok=True)
    return training.run(
        build,
        data(30, 0),
        data(20, 1),
        lambda inputs, generator: inputs + 0.1 * torch.randn(inputs.shape, generator=generator),
        recipe,
        learning_rate=learning_rate,
        seed=5,
        folder=folder,
        checkpoint_seconds=checkpoint_seconds,
        fabric=fabric,
        watcher=watcher or Watcher(),
    )


def without_clock(progress) -> dict:
    history = {k: v for k, v in progress.history.items() if k != "seconds"}
    return {"step": progress.step, "best": progress.best_step, "history": history}


def assert_same_run(folder, other, name):
    (one, _), (two, _) = load_tensors(folder / name), load_tensors(other / name)
    assert one.keys() == two.keys()
    for key in one:
        assert torch.equal(one[key], two[key]), key


@pytest.mark.parametrize("stops", [(1,), (5,), (4, 3), (11,)])
def test_a_run_that_was_stopped_ends_bit_for_bit_as_an_undisturbed_one(tmp_path, fabric, stops):
    whole = run(tmp_path / "whole", fabric)
    for stop in stops:
        with pytest.raises(training.Interrupted):
            run(tmp_path / "parts", fabric, Watcher(stop_after=stop))
    parts = run(tmp_path / "parts", fabric)
    assert without_clock(parts) == without_clock(whole)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", "run.safetensors")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", "best.safetensors")


def test_a_run_that_died_goes_on_from_its_last_checkpoint(tmp_path, fabric):
    whole = run(tmp_path / "whole", fabric)
    with pytest.raises(RuntimeError, match="gone"):
        run(tmp_path / "dead", fabric, Watcher(fail_after=7), checkpoint_seconds=0)
    assert load_tensors(tmp_path / "dead" / "run.safetensors")[1]["step"] == 6
    assert without_clock(run(tmp_path / "dead", fabric)) == without_clock(whole)
    assert_same_run(tmp_path / "whole", tmp_path / "dead", "best.safetensors")


def test_a_damaged_checkpoint_is_an_error_and_its_removal_starts_the_run_over(tmp_path, fabric):
    whole = run(tmp_path / "whole", fabric)
    with pytest.raises(training.Interrupted):
        run(tmp_path / "cut", fabric, Watcher(stop_after=5))
    path = tmp_path / "cut" / "run.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ResultsError, match=r"run\.safetensors is damaged .* remove it to start over"):
        run(tmp_path / "cut", fabric)
    path.unlink()
    assert without_clock(run(tmp_path / "cut", fabric)) == without_clock(whole)


def test_a_checkpoint_of_another_model_is_an_error(tmp_path, fabric):
    with pytest.raises(training.Interrupted):
        run(tmp_path / "cut", fabric, Watcher(stop_after=5))
    wider = nn.Sequential(nn.Flatten(), nn.Linear(6, 9), nn.Linear(9, 2))
    with pytest.raises(ResultsError, match=r"run\.safetensors is of another run"):
        run(tmp_path / "cut", fabric, build=lambda: wider)


def test_half_precision_trains_and_resumes_as_full_precision_does(tmp_path):
    recipe = RECIPE.model_copy(update={"precision": "bf16-mixed"})
    half = training.new_fabric(recipe)
    seen = []

    class Shows(nn.Linear):
        def forward(self, x):
            seen.append(super().forward(x).dtype)
            return super().forward(x)

    def build():
        return nn.Sequential(nn.Flatten(), Shows(6, 2))

    whole = run(tmp_path / "whole", half, recipe=recipe, build=build)
    assert set(seen) == {torch.bfloat16}
    with pytest.raises(training.Interrupted):
        run(tmp_path / "parts", half, Watcher(stop_after=5), recipe=recipe, build=build)
    assert without_clock(run(tmp_path / "parts", half, recipe=recipe, build=build)) == without_clock(whole)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", "best.safetensors")


def test_a_loss_that_is_not_finite_is_reported_and_not_trained_on(tmp_path, fabric):
    class Explodes(nn.Linear):
        def forward(self, x):
            return super().forward(x) * float("inf")

    with pytest.raises(training.Diverged, match="smaller learning rate"):
        run(tmp_path / "nan", fabric, build=lambda: nn.Sequential(nn.Flatten(), Explodes(6, 2)))


def test_the_best_weights_are_those_of_the_best_validation_score(tmp_path, fabric):
    done = run(tmp_path / "run", fabric)
    net = model()
    net.load_state_dict(load_tensors(tmp_path / "run" / "best.safetensors")[0])
    score = training.evaluate(net, data(20, 1), 4, torch.device("cpu"))
    row = done.history["step"].index(done.best_step)
    assert score.metric == done.history["validation"][row] == max(done.history["validation"])


def test_vectors_and_marked_parameters_are_not_decayed():
    net = model()
    net[1].weight._no_weight_decay = True
    decayed, kept = (group["params"] for group in adamw(net, 0.1).param_groups)
    assert [id(p) for p in decayed] == [id(net[4].weight)]
    assert len(kept) == 5


def test_the_learning_rate_warms_up_and_ends_at_a_tenth():
    rates = [training.learning_rate_at(step, 1.0, RECIPE) for step in range(RECIPE.steps)]
    assert rates[0] == 0.5
    assert max(rates) == rates[1] == rates[2] == 1.0
    assert abs(rates[-1] - 0.1) < 1e-12  # rounding of the cosine
    assert sorted(rates[2:], reverse=True) == rates[2:]


def test_parameters_are_matched_by_the_width_of_the_mlp():
    def build(extra):
        return lambda hidden: nn.Sequential(nn.Linear(10, hidden), nn.Linear(hidden, 10), nn.Linear(10, extra))

    target = sum(p.numel() for p in build(10)(100).parameters())
    found = match_parameters(build(30), target, 0.02, start=100)
    assert abs(found.ratio - 1) <= 0.02
    assert found.mlp_hidden < 100
    with pytest.raises(UnmatchedParameters, match=r"MLP width of 1, .*Make mlp_hidden or depth larger"):
        match_parameters(build(1000), target, 0.02, start=100)


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(training.torch, "cuda", SimpleNamespace(is_available=lambda: False))
    with pytest.raises(ValueError, match="sees no CUDA device; use auto or cpu"):
        training.new_fabric(RECIPE.model_copy(update={"accelerator": "cuda"}))
