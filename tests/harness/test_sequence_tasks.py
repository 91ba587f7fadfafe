"""Pixels, spoken words, any text: files as their publishers ship them, in miniature; and missing or damaged ones."""

import gzip
import struct
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from chela_plugin.cli import app
from chela_plugin.harness.config import ConfigError, DataError
from chela_plugin.harness.preview import preview
from chela_plugin.harness.task_configs.builtin import BytesTask, DigitsTask
from chela_plugin.harness.task_configs.sequences import PixelsTask, SpeechCommandsTask
from chela_plugin.harness.tasks import SPLITS, Examples, examples
from chela_plugin.harness.tasks.byte_text import split_files


def idx(array: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def fashion(tmp_path):
    rng = np.random.default_rng(0)
    for name, count in (("train", 20), ("t10k", 6)):
        images = rng.integers(0, 256, (count, 4, 5), dtype=np.uint8)
        (tmp_path / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{name}-labels-idx1-ubyte").write_bytes(idx((np.arange(count) % 10).astype(np.uint8)))
    return PixelsTask(task="pixels", source="idx", path=str(tmp_path), validation_images=5)


def test_pixels_of_idx_files_come_row_after_row_and_splits_are_apart(fashion):
    data = {split: examples(fashion, split) for split in SPLITS}
    assert [len(data[split]) for split in SPLITS] == [15, 5, 6]
    raw = gzip.decompress((Path(fashion.path) / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    assert torch.equal(data["test"].inputs[0, :, 0], torch.tensor(list(raw[:20])) / 127.5 - 1)
    assert data["test"].targets.tolist() == [0, 1, 2, 3, 4, 5]
    rows = {split: {tuple(r) for r in data[split].inputs[..., 0].tolist()} for split in SPLITS}
    assert len(rows["train"] | rows["validation"] | rows["test"]) == 26
    assert examples(fashion, "train").sha256() == data["train"].sha256()


def test_pixels_of_digits_are_the_digits_tasks_images():
    sequence = examples(PixelsTask(task="pixels"), "validation")
    images = examples(DigitsTask(task="digits", max_shift=0), "validation")
    assert sequence.inputs.shape == (len(images), 64, 1)
    assert torch.equal(sequence.inputs.view(-1, 1, 8, 8), images.inputs)
    assert torch.equal(sequence.targets, images.targets)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t10k-images-idx3-ubyte.gz", None, "github.com/zalandoresearch/fashion-mnist"),
        ("t10k-images-idx3-ubyte.gz", b"not gzip", "fetch it again"),
        ("t10k-images-idx3-ubyte.gz", gzip.compress(b"\0\0\x08\x03\0\0\0\x06", mtime=0), "cut short"),
        ("t10k-labels-idx1-ubyte", idx(np.zeros(5, np.uint8)), "labels"),
        ("t10k-labels-idx1-ubyte", idx(np.full(6, 11, np.uint8)), "label 11"),
    ],
)
def test_missing_or_damaged_idx_files_are_one_error(fashion, name, content, message):
    path = Path(fashion.path) / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        examples(fashion, "test")


def test_idx_files_need_a_path():
    with pytest.raises(ValueError, match="source: idx needs it"):
        PixelsTask(task="pixels", source="idx")


def spoken(path: Path, samples: list[int], rate: int = 16_000) -> None:
    path.parent.mkdir(exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", "not compressed"))
        file.writeframes(np.array(samples, dtype="<i2").tobytes())


@pytest.fixture
def speech(tmp_path):
    for word in ("yes", "no", "_background_noise_"):
        for number in range(4):
            spoken(tmp_path / word / f"{number}.wav", [number * 8192 - 16384] * (6 + 4 * number))
    (tmp_path / "validation_list.txt").write_text("yes/1.wav\nno/1.wav\n")
    (tmp_path / "testing_list.txt").write_text("yes/0.wav\n")
    return SpeechCommandsTask(task="speech_commands", path=str(tmp_path), samples=10)


def test_speech_commands_are_split_by_the_published_lists_and_cut_or_padded(speech):
    data = {split: examples(speech, split) for split in SPLITS}
    assert [data[split].targets.tolist() for split in SPLITS] == [[0, 0, 0, 1, 1], [0, 1], [1]]  # no, yes
    assert data["train"].classes == 2 and data["train"].inputs.shape == (5, 10, 1)
    assert data["test"].inputs[0, :, 0].tolist() == [-0.5] * 6 + [0.0] * 4
    assert data["train"].inputs[1, :, 0].tolist() == [0.0] * 10  # no/2: 14 zeros, cut
    assert data["train"].inputs[2, :, 0].tolist() == [0.25] * 10


def test_missing_lists_words_and_other_recordings_are_one_error(speech):
    split_files.cache_clear()
    with pytest.raises(DataError, match="no folder for maybe; it has no, yes"):
        examples(speech.model_copy(update={"words": ("maybe", "no")}), "train")
    spoken(Path(speech.path) / "yes" / "0.wav", [0], rate=8000)
    with pytest.raises(DataError, match="at 8000 Hz"):
        examples(speech, "test")
    (Path(speech.path) / "yes" / "0.wav").write_bytes(b"RIFF")
    with pytest.raises(DataError, match="no readable WAV"):
        examples(speech, "test")
    with pytest.raises(DataError, match=r"no validation_list\.txt; unpack http"):
        examples(speech.model_copy(update={"path": speech.path + "/nowhere"}), "test")


def test_a_single_text_is_cut_by_range_and_a_folder_by_file(tmp_path):
    text = bytes(i % 251 for i in range(5000))
    (tmp_path / "one.txt").write_bytes(text)
    one = BytesTask(task="bytes", context=16, path=str(tmp_path / "one.txt"))
    data = {split: examples(one, split) for split in SPLITS}
    assert bytes(data["train"].inputs[0].tolist()) == text[:16]
    assert bytes(data["validation"].inputs[0].tolist()) == text[4000:4016]
    assert bytes(data["test"].inputs[0].tolist()) == text[4500:4516]
    assert data["train"].inputs.numel() <= 4000
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_bytes(bytes([65 + i]) * 40)
    (folder / ".hidden").write_text("no")
    many = BytesTask(task="bytes", context=16, path=str(folder))
    letters = [set(examples(many, split).inputs.unique().tolist()) for split in SPLITS]
    assert sum(map(len, letters)) == len(set.union(*letters)) == 40


@pytest.mark.parametrize(("path", "message"), [("nowhere", "neither a file nor a folder"), ("empty", "holds no file")])
def test_text_that_is_not_there_is_one_error(tmp_path, path, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        examples(BytesTask(task="bytes", path=str(tmp_path / path)), "train")


def test_missing_data_ends_an_ablation_before_any_run(tiny, tmp_path, quiet):
    from chela_plugin.harness.ablation import run_ablations
    from chela_plugin.harness.config import load_ablation
    from chela_plugin.harness.results import read_records

    task = {"task": "pixels", "source": "idx", "path": str(tmp_path / "nowhere")}
    name, config = load_ablation(tiny(tasks=[task], backbone={"kind": "sequence", "dim": 16, "depth": 1}))
    with pytest.raises(ConfigError, match="zalandoresearch"):
        run_ablations({name: config}, tmp_path / "out", quiet)
    assert read_records(tmp_path / "out" / "results.jsonl")[0] == []


def test_chela_data_tells_how_much_there_is_and_shows_examples(tmp_path, monkeypatch):
    monkeypatch.setenv("CHELA_CACHE", str(tmp_path))
    told = CliRunner().invoke(app, ["data", "mad_recall", "train_examples=5", "test_examples=3", "--show", "1"])
    assert told.exit_code == 0, told.output
    assert "train              5 examples of 127" in told.output and str(tmp_path) in told.output.replace("\n", "")
    assert "…" in told.output


def test_previews_show_pictures_curves_and_tokens_above_their_targets():
    one = torch.ones(1, dtype=torch.long)
    picture = Examples(torch.tensor([[[[0.0, 1.0], [1.0, 0.0]]]]), one, 2, "accuracy")
    assert preview(picture, 0) == "class 1 of 2\n @\n@"
    square = Examples(torch.tensor([[[0.0], [1.0], [1.0], [0.0]]]), one, 2, "accuracy")
    assert preview(square, 0) == preview(picture, 0)
    sound = Examples(torch.tensor([[[0.0], [-1.0], [0.5]]]), one, 2, "accuracy")
    assert preview(sound, 0) == "class 1 of 2\n▁█▄"
    tokens = Examples(torch.tensor([[3, 4, 0, 0]]), torch.tensor([[-100, 5, -100, -100]]), 9, "accuracy", padding=0)
    assert preview(tokens, 0) == " 3 4\n   5"
