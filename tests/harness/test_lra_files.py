"""Long Range Arena's Text, Retrieval and Image: small files as the publishers ship them, and damaged ones."""

import io
import tarfile

import numpy as np
import pytest

from chela_plugin.harness.task_configs.base import DataError
from chela_plugin.harness.task_configs.lra import ImageTask, RetrievalTask, TextTask
from chela_plugin.harness.tasks import SPLITS, examples
from chela_plugin.harness.tasks.lra_image import RECORD, TRAIN_FILES


def archive(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def unpack(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.fixture
def cifar():
    """20 records a file; colours that make grey levels easy to tell."""
    rng = np.random.default_rng(0)
    files = {}
    for name in (*TRAIN_FILES, "test_batch.bin"):
        records = rng.integers(0, 256, (20, RECORD), np.uint8)
        records[:, 0] = np.arange(20) % 10
        files[f"cifar-10-batches-bin/{name}"] = records.tobytes()
    return files


@pytest.fixture
def imdb():
    """30 reviews of each kind and half; review 0 is longer than the task reads, another isn't ASCII."""
    files = {"aclImdb/README": b"", "aclImdb/train/unsup/0_0.txt": b"not labelled"}
    for half in ("train", "test"):
        for kind in ("pos", "neg"):
            for i in range(30):
                text = f"{half} {kind} {i} caf\u00e9".encode()
                files[f"aclImdb/{half}/{kind}/{i}_9.txt"] = text * 50 if i == 0 else text
    return files


def test_image_is_grey_cifar_in_the_files_order_from_a_folder_or_the_archive(tmp_path, cifar):
    archive(tmp_path / "cifar.tar.gz", cifar)
    unpack(tmp_path, cifar)
    config = ImageTask(task="lra_image", path=str(tmp_path / "cifar.tar.gz"))
    data = {split: examples(config, split) for split in SPLITS}
    assert [len(data[split]) for split in SPLITS] == [90, 10, 20]
    for path in (tmp_path, tmp_path / "cifar-10-batches-bin"):
        assert examples(config.model_copy(update={"path": str(path)}), "train").sha256() == data["train"].sha256()
    record = np.frombuffer(cifar["cifar-10-batches-bin/data_batch_5.bin"], np.uint8).reshape(20, RECORD)[10]
    assert data["validation"].targets[0] == record[0]
    red, green, blue = record[1:].reshape(3, 1024).astype(float)
    grey = 0.2989 * red + 0.587 * green + 0.114 * blue
    # TensorFlow scales by 255.5 / 255 and cuts; a float32 sum just below a whole number may fall the other way.
    assert np.abs(data["validation"].inputs[0].numpy() - np.floor(grey * 255.5 / 255)).max() <= 1
    signal = examples(config.model_copy(update={"inputs": "signal"}), "test").inputs
    assert signal.shape == (20, 1024, 1) and -1 <= signal.min() < signal.max() <= 1


def test_image_files_that_are_missing_damaged_or_pickles_are_one_error(tmp_path, cifar):
    config = ImageTask(task="lra_image", path=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"there is no .*get cifar-10-binary.tar.gz"):
        examples(config, "train")
    config = config.model_copy(update={"path": str(tmp_path)})
    unpack(tmp_path, {"cifar-10-batches-py/data_batch_1": b"\x80", "cifar-10-batches-py/test_batch": b"\x80"})
    with pytest.raises(DataError, match="Python version, which is a pickle"):
        examples(config, "train")
    unpack(tmp_path, cifar)
    damaged = tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin"
    content = damaged.read_bytes()
    damages = {content[:-1]: "one length", content[:RECORD]: "one length", b"\xff" + content[1:]: "above 9"}
    for wrong, message in damages.items():
        damaged.write_bytes(wrong)
        with pytest.raises(DataError, match=message):
            examples(config, "test")
    damaged.unlink()
    with pytest.raises(DataError, match=r"lacks data_batch_3\.bin"):
        examples(config, "train")
    archive(tmp_path / "cut.tar.gz", cifar)
    (tmp_path / "cut.tar.gz").write_bytes((tmp_path / "cut.tar.gz").read_bytes()[:-9000])
    with pytest.raises(DataError, match="can't be read"):
        examples(config.model_copy(update={"path": str(tmp_path / "cut.tar.gz")}), "train")


def test_text_is_bytes_with_zeros_behind_and_no_review_is_in_two_splits(tmp_path, imdb):
    archive(tmp_path / "imdb.tar.gz", imdb)
    unpack(tmp_path, imdb)
    config = TextTask(task="lra_text", path=str(tmp_path / "imdb.tar.gz"), max_length=64)
    data = {split: examples(config, split) for split in SPLITS}
    for path in (tmp_path, tmp_path / "aclImdb"):
        assert examples(config.model_copy(update={"path": str(path)}), "train").sha256() == data["train"].sha256()
    texts = {split: [bytes(row).rstrip(b"\0") for row in d.inputs.tolist()] for split, d in data.items()}
    published: dict[str, set[bytes]] = {"train": set(), "test": set()}
    for name, text in imdb.items():
        if "/pos/" in name or "/neg/" in name:
            published[name.split("/")[1]].add(text[:64])
    assert set(texts["train"]) | set(texts["validation"]) == published["train"]
    assert len(texts["train"]) + len(texts["validation"]) == 60 and len(texts["validation"]) > 0
    assert set(texts["test"]) == published["test"]
    for split in SPLITS:
        assert [b" pos " in text for text in texts[split]] == data[split].targets.bool().tolist()
    assert data["test"].padding == 0 and data["test"].inputs.shape == (60, 64)


def test_text_that_is_missing_or_damaged_is_one_error(tmp_path, imdb):
    config = TextTask(task="lra_text", path=str(tmp_path / "nowhere.tar.gz"))
    with pytest.raises(DataError, match=r"there is no .*get aclImdb_v1.tar.gz from https"):
        examples(config, "train")
    with pytest.raises(DataError, match="no reviews of both kinds to test on"):
        examples(config.model_copy(update={"path": str(tmp_path)}), "test")
    archive(tmp_path / "cut.tar.gz", imdb)
    (tmp_path / "cut.tar.gz").write_bytes((tmp_path / "cut.tar.gz").read_bytes()[:-200])
    with pytest.raises(DataError, match="can't be read"):
        examples(config.model_copy(update={"path": str(tmp_path / "cut.tar.gz")}), "train")


def test_retrieval_is_pairs_of_bytes(tmp_path):
    rows = {"train": [(1, b"one text", b"another\0one"), (0, b'a "quote', b"x" * 50)], "eval": [(1, b"a", b"b")]}
    for name, lines in rows.items():
        content = b"".join(b"%d.0\tid1\tid2\t%s\t%s\n" % line for line in lines)
        (tmp_path / f"new_aan_pairs.{name}.tsv").write_bytes(content)
    config = RetrievalTask(task="lra_retrieval", path=str(tmp_path), max_length=16)
    train = examples(config, "train")
    assert train.inputs.shape == (2, 2, 16) and train.targets.tolist() == [1, 0] and train.padding == 0
    texts = [[bytes(text).rstrip(b"\0") for text in pair] for pair in train.inputs.tolist()]
    assert texts == [[b"one text", b"another one"], [b'a "quote', b"x" * 16]]
    assert examples(config, "validation").targets.tolist() == [1]
    with pytest.raises(DataError, match=r"test.tsv can't be read .*lra_release.gz"):
        examples(config, "test")
    for wrong in (b"1.0\tid1\tid2\tonly one text\n", b"0.5\tid1\tid2\ta\tb\n"):
        (tmp_path / "new_aan_pairs.test.tsv").write_bytes(b"1.0\ti\tj\ta\tb\n" + wrong)
        with pytest.raises(DataError, match=r"line 2 of .* is no pair"):
            examples(config, "test")
