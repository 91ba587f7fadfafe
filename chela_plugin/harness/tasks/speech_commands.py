"""Google's Speech Commands (Warden, arXiv:1804.03209) as raw audio, read from the archive as published.

Version 0.02 has 35 words. `validation_list.txt` and `testing_list.txt` name the files of those splits; the rest trains.
"""

from __future__ import annotations

import wave
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from chela_plugin.harness.task_configs.base import DataError
from chela_plugin.harness.task_configs.sequences import SpeechCommandsTask
from chela_plugin.harness.tasks import Examples, Split, cache

RATE = 16_000
SOURCE = "http://download.tensorflow.org/data/speech_commands_v0.02.tar.gz"


def examples(config: SpeechCommandsTask, split: Split) -> Examples:
    """Inputs `[N, samples, 1]` in [-1, 1), targets `[N]`: the word's number in alphabetical order.

    float16, which keeps 11 of a sample's 16 bits: the training split is 2.7 GB so. Raises DataError.
    """
    words, files = split_files(config.path, config.words)
    names = files[split]
    if not names:
        raise DataError(f"task speech_commands: {config.path} holds no recording of the {split} split")
    inputs = torch.empty(len(names), config.samples, 1, dtype=torch.float16)
    for row, name in enumerate(names):
        inputs[row, :, 0] = torch.from_numpy(recording(Path(config.path) / name, config.samples))
        if row % 512 == 0:
            cache.report(row, len(names))
    targets = torch.tensor([words.index(name.partition("/")[0]) for name in names])
    return Examples(inputs, targets, classes=len(words), metric="accuracy")


@lru_cache
def split_files(folder: str, words: tuple[str, ...]) -> tuple[tuple[str, ...], dict[Split, list[str]]]:
    """The words, and the 'word/file.wav' of each split in alphabetical order."""
    root = Path(folder)
    lists = {}
    for split, name in (("validation", "validation_list.txt"), ("test", "testing_list.txt")):
        try:
            lists[split] = frozenset((root / name).read_text(encoding="utf-8").split())
        except (OSError, UnicodeDecodeError):
            raise DataError(
                f"task speech_commands: {root} holds no {name}; unpack {SOURCE} there, or set path to where it is"
            ) from None
    found = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(("_", ".")))
    missing = sorted(set(words) - set(found))
    if missing or not found:
        raise DataError(
            f"task speech_commands: {root} has no folder for {', '.join(missing) or 'any word'}; "
            f"it has {', '.join(found) or 'none'}"
        )
    chosen = tuple(sorted(words)) or tuple(found)
    files: dict[Split, list[str]] = {"train": [], "validation": [], "test": []}
    for word in chosen:
        for path in sorted((root / word).glob("*.wav")):
            name = f"{word}/{path.name}"
            part: Split = "test" if name in lists["test"] else "validation" if name in lists["validation"] else "train"
            files[part].append(name)
    return chosen, files


def recording(path: Path, samples: int) -> np.ndarray:
    """A 16 kHz mono 16-bit WAV as float32 `[samples]` in [-1, 1), cut or padded with silence behind."""
    try:
        with wave.open(str(path), "rb") as file:
            form = file.getnchannels(), file.getsampwidth(), file.getframerate()
            content = file.readframes(samples)
    except (OSError, EOFError, wave.Error) as error:
        raise DataError(
            f"task speech_commands: {path} is no readable WAV ({error}); unpack the archive again"
        ) from None
    if form != (1, 2, RATE):
        raise DataError(
            f"task speech_commands: {path} has {form[0]} channels of {8 * form[1]} bits at {form[2]} Hz; "
            f"the archive's files have 1 of 16 bits at {RATE} Hz"
        )
    heard = np.frombuffer(content[: len(content) // 2 * 2], dtype="<i2").astype(np.float32) / 32768
    return np.pad(heard, (0, samples - len(heard)))
