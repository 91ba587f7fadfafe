"""The cache of generated data: read once made, made again where damaged, and a full disk loses nothing."""

import errno

import pytest

from chela_plugin.harness import results
from chela_plugin.harness.results import ResultsError
from chela_plugin.harness.task_configs.synthetic import CompressionTask
from chela_plugin.harness.tasks import cache, examples, mad, prepare

pytestmark = pytest.mark.usefixtures("own_cache")

CONFIG = CompressionTask(task="mad_compression", train_examples=20, validation_examples=10, test_examples=10)


@pytest.fixture
def made(monkeypatch):
    """Counts how often examples are generated."""
    calls = []
    real = mad._make
    monkeypatch.setattr(mad, "_make", lambda config, split: calls.append(split) or real(config, split))
    return calls


def test_an_entry_is_made_once_and_another_config_split_or_version_is_another_entry(made):
    first = examples(CONFIG, "train")
    again = examples(CONFIG, "train")
    assert made == ["train"]
    assert vars(again).keys() == vars(first).keys() and again.sha256() == first.sha256()
    paths = {
        cache.entry(CONFIG, "train", 1),
        cache.entry(CONFIG, "test", 1),
        cache.entry(CONFIG, "train", 2),
        cache.entry(CONFIG.model_copy(update={"data_seed": 1}), "train", 1),
    }
    assert len(paths) == 4
    prepare(CONFIG)
    assert made == ["train", "validation"]


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-7], lambda b: b[:-3] + bytes([b[-3] ^ 1]) + b[-2:], lambda b: b"", lambda b: b"{}"]
)
def test_a_damaged_entry_is_made_again(made, damage):
    first = examples(CONFIG, "test")
    path = cache.entry(CONFIG, "test", mad.VERSION)
    path.write_bytes(damage(path.read_bytes()))
    assert examples(CONFIG, "test").sha256() == first.sha256()
    assert made == ["test", "test"]
    assert examples(CONFIG, "test").sha256() == first.sha256()
    assert made == ["test", "test"]  # the third reading was from the entry


def test_a_full_disk_is_one_error_that_names_the_remedy_and_leaves_other_entries_alone(made, monkeypatch):
    examples(CONFIG, "test")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(results.os, "fsync", full)
        with pytest.raises(ResultsError, match=r"No space left on device.*CHELA_CACHE"):
            examples(CONFIG, "train")
    assert [p.name for p in cache.folder().iterdir()] == [cache.entry(CONFIG, "test", mad.VERSION).name]
    assert len(examples(CONFIG, "train")) == 20


def test_progress_reaches_whoever_listens(made):
    heard = []
    with cache.reporting(lambda done, total: heard.append((done, total))):
        cache.report(3, 7)
    cache.report(4, 7)
    assert heard == [(3, 7)]
