"""MQAR and MAD: the rules derived again from the tensors alone, equal data for equal arguments, and what is refused."""

import pytest
import torch

from chela_plugin.harness.config import ConfigError, load_task
from chela_plugin.harness.data_order import bucket_rows
from chela_plugin.harness.task_configs import synthetic
from chela_plugin.harness.tasks import IGNORE, SPLITS, examples, mqar
from chela_plugin.harness.tasks.random_state import numpy_generator

pytestmark = pytest.mark.usefixtures("own_cache")

SMALL = {
    "vocabulary": 64,
    "validation": [{"length": 32, "pairs": 8, "examples": 30}],
    "test": [{"length": 48, "pairs": 3, "examples": 30}],
}
MQAR = synthetic.MQARTask(
    task="mqar", train=[{"length": 16, "pairs": 2, "examples": 40}, {"length": 32, "pairs": 4, "examples": 25}], **SMALL
)
MAD = {
    name: kind(task=name, train_examples=60, validation_examples=40, test_examples=40)
    for kind in synthetic.TASKS
    if issubclass(kind, synthetic.MADTask)
    for name in kind.model_fields["task"].annotation.__args__
}


@pytest.mark.parametrize("config", [MQAR, *MAD.values()], ids=lambda config: config.task)
def test_a_split_follows_from_its_arguments_and_is_apart_from_the_others(config, tmp_path, monkeypatch):
    first = {split: examples(config, split) for split in SPLITS}
    again = {split: examples(config, split) for split in SPLITS}  # from the cache
    monkeypatch.setenv("CHELA_CACHE", str(tmp_path / "other"))
    anew = {split: examples(config, split) for split in SPLITS}
    other = examples(config.model_copy(update={"data_seed": 1}), "train")
    for split in SPLITS:
        assert first[split].sha256() == again[split].sha256() == anew[split].sha256()
    assert other.sha256() != first["train"].sha256()
    rows = {split: {tuple(row) for row in first[split].inputs.tolist()} for split in SPLITS}
    assert not rows["train"] & rows["test"] and not rows["train"] & rows["validation"]
    assert not rows["validation"] & rows["test"]


@pytest.mark.parametrize("split", SPLITS)
def test_mqar_asks_each_key_once_for_the_value_that_stood_behind_it(split):
    data = examples(MQAR, split)
    for row, part in zip(range(len(data)), data.slice_of.tolist(), strict=True):
        length, pairs = (int(word) for word in data.slices[part].replace(",", "").split()[::2])
        inputs, targets = data.inputs[row].tolist(), data.targets[row].tolist()
        shown = dict(zip(inputs[0 : 2 * pairs : 2], inputs[1 : 2 * pairs : 2], strict=True))
        assert len(shown) == pairs == len(set(shown.values()))
        assert all(1 <= key < 32 <= value < 64 for key, value in shown.items())
        asked = [t for t, target in enumerate(targets) if target != IGNORE]
        assert sorted(inputs[t] for t in asked) == sorted(shown)
        assert all(targets[t] == shown[inputs[t]] for t in asked)
        assert all(2 * pairs <= t < length and t % 2 == 0 for t in asked)
        assert inputs[length:] == [0] * (len(inputs) - length)


def test_mqar_keys_are_uniform_and_queries_come_early_by_the_power_law():
    rng = numpy_generator("a test", 0)
    drawn = mqar.distinct(6, 3, 12_000, rng)
    assert all(len(set(row)) == 3 for row in drawn[:100].tolist())
    counts = torch.zeros(6, 6, 6)
    for a, b, c in drawn.tolist():
        counts[a, b, c] += 1
    expected = 12_000 / 120  # ordered choices
    chi2 = ((counts[counts > 0] - expected) ** 2 / expected).sum()
    assert (counts > 0).sum() == 120
    assert chi2 < 190  # 119 degrees of freedom: above this once in 30,000 draws
    config = synthetic.MQARTask(task="mqar", gap_power=0.01, random_fill=False)
    inputs, _ = mqar.sequences(config, 64, 1, 6000, rng)
    first = (inputs[:, 2::2] != 0).argmax(1)
    weights = torch.arange(1, 32, dtype=torch.float64) ** -0.99
    share = (weights / weights.sum())[0].item()
    assert abs((first == 0).mean() - share) < 0.03  # five standard deviations of 6,000 draws


def test_a_batch_of_a_mixture_holds_one_setting_and_no_column_of_padding():
    data = examples(MQAR, "train")
    seen = set()
    for step in range(7):  # of an epoch: 5 batches of the first setting, 3 of the second
        rows = bucket_rows(data.buckets, 8, seed=0, step=step)
        assert torch.equal(rows, bucket_rows(data.buckets, 8, seed=0, step=step))
        parts = data.buckets[rows].unique().tolist()
        assert len(parts) == 1
        inputs, targets = data.batch(rows)
        assert inputs.shape == targets.shape == (8, (16, 32)[parts[0]])
        assert not seen & set(rows.tolist())
        seen |= set(rows.tolist())
    with pytest.raises(ValueError, match=r"no bucket .* batch_size = 64"):
        bucket_rows(data.buckets, 64, seed=0, step=0)


@pytest.mark.parametrize("name", ["mad_recall", "mad_noisy_recall"])
def test_recall_asks_for_the_value_of_every_key_that_came_before(name):
    config = MAD[name]
    noise = config.vocabulary - (config.noise_vocabulary if name == "mad_noisy_recall" else 0)
    data = examples(config, "test")
    noisy = 0
    for inputs, targets in zip(data.inputs.tolist(), data.targets.tolist(), strict=True):
        assert len(inputs) == config.length - 1
        known: dict[int, int] = {}
        for t in range(0, len(inputs), 2):
            key, value = inputs[t], (inputs[t + 1 : t + 2] or [targets[t]])[0]
            if key >= noise:
                noisy += 1
                assert targets[t] == IGNORE and value >= noise
                continue
            assert key < noise // 2 <= value < noise
            assert targets[t] == (value if key in known else IGNORE)
            assert known.setdefault(key, value) == value
        assert targets[1::2] == [IGNORE] * len(targets[1::2])
        assert targets[-1] != IGNORE
    pairs = len(data) * config.length / 2
    assert noisy == 0 if name == "mad_recall" else abs(noisy / pairs - 0.2) < 0.05  # 4.5 standard deviations
    train = examples(config, "train")
    assert torch.equal(train.inputs[:, 1:], train.targets[:, :-1])


def test_fuzzy_recall_asks_for_motifs_that_were_shown():
    config = MAD["mad_fuzzy_recall"]
    data = examples(config, "test")
    pad, half = config.vocabulary - 1, (config.vocabulary - 1) // 2
    for inputs, targets in zip(data.inputs.tolist(), data.targets.tolist(), strict=True):
        tokens = [t for t in [*inputs, targets[-1]] if t != pad]
        asked = [IGNORE, *targets][len(inputs) + 1 - len(tokens) :]
        assert len(tokens) > config.length - 20
        known: dict[tuple, tuple] = {}
        t = 0
        while t < len(tokens):
            end = t
            while tokens[end] < half:
                end += 1
            key, t = tuple(tokens[t:end]), end
            while end < len(tokens) and tokens[end] >= half:
                end += 1
            value = tuple(tokens[t:end])
            assert len(set(key)) == len(key) == 3 and 1 <= len(set(value)) == len(value) <= 3
            assert asked[t - 3 : end] == [IGNORE] * 3 + (list(value) if key in known else [IGNORE] * len(value))
            assert known.setdefault(key, value) == value
            t = end
        assert asked[-1] != IGNORE


def test_selective_copying_asks_for_the_tokens_between_blanks_in_order():
    config = MAD["mad_selective_copying"]
    data = examples(config, "train")
    for inputs, targets in zip(data.inputs.tolist(), data.targets.tolist(), strict=True):
        body, tail = inputs[: -config.copied - 1], inputs[-config.copied - 1 :]
        assert tail == [15] + [14] * 16
        assert [t for t in body if t != 14] == targets[-16:]
        assert targets[:-16] == [IGNORE] * (len(inputs) - 16)
        assert body[-1] != 14
    blanks_before_first = (data.inputs != 14).int().argmax(1).float().mean().item()
    assert abs(blanks_before_first - 223 / 16) < 2  # a sixteenth of the blanks; four standard deviations of 60 rows


def test_memorization_has_one_map_for_all_splits_and_compression_asks_for_its_input():
    known: dict[int, int] = {}
    for split in SPLITS:
        data = examples(MAD["mad_memorization"], split)
        assert (data.inputs[:, 1::2] == 255).all() and (data.targets[:, 0::2] == IGNORE).all()
        pairs = zip(data.inputs[:, 0::2].flatten().tolist(), data.targets[:, 1::2].flatten().tolist(), strict=True)
        for key, value in pairs:
            assert key < 127 <= value < 255
            assert known.setdefault(key, value) == value
    assert len(set(known.values())) == len(known)
    data = examples(MAD["mad_compression"], "test")
    assert torch.equal(data.inputs, data.targets)
    assert (data.inputs[:, -1] == 15).all() and data.inputs[:, :-1].max() == 14


def test_zoologys_and_mads_settings_are_the_defaults():
    config = load_task("mqar")
    assert sum(part.examples for part in config.train) == 180_000
    assert [(part.length, part.pairs) for part in config.test][-1] == (1024, 256)
    assert (load_task("mad_selective_copying").length, load_task("mad_memorization").vocabulary) == (256, 256)


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("mqar", "train=[{length: 16, pairs: 5, examples: 1}]", "need a length of 20"),
        ("mqar", "vocabulary=128", "256 different keys"),
        ("mqar", "lenght=3", "unknown key 'lenght'"),
        ("mad_selective_copying", "copied=128", "more than 257 places"),
        ("mad_noisy_recall", "noise_vocabulary=31", "leaves no key"),
        ("mad_fuzzy_recall", "length=18", "too short"),
    ],
)
def test_a_setting_that_no_sequence_can_have_is_refused(name, override, message):
    with pytest.raises(ConfigError, match=message):
        load_task(name, [override])
