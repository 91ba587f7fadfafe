"""MAD's six synthetic tasks (Poli et al., arXiv:2403.17844), at the baseline settings of athms/mad-lab (0f49a45).

Rules as in mad/data/instances.py there, with `multi_query` as its configs have it:

- recall: pairs of a key and a value, a key's value drawn once a sequence; a last pair repeats a key. Noisy: a pair may
  be two noise tokens. Keys are the first half of the tokens, values the second half, noise the last ones.
- fuzzy recall: keys and values are 1 to 3 different tokens; test keys all have 3. One pair, placed anywhere, is asked
  for at the end; token V - 1 pads on the left.
- selective copying: tokens with blanks in between, then a copy token and as many blanks; there the tokens are asked for
  in order. Blanks go before a token, so the last one stands right before the copy token.
- compression: random tokens and a last token V - 1; every token is asked for, from the last place's features.
- memorization: keys, each followed by token V - 1, where the key's value is asked for. The map is one for all splits.

Recall tasks train on every next token and are read at repeated keys' values. A validation split, drawn as the test
split is, is ours. Draws are equal in distribution, not number by number. One slip is not copied: there a short pair
could be asked for at the end of a fuzzy sequence that never showed it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from chela_plugin.harness.task_configs.synthetic import (
    CompressionTask,
    FuzzyRecallTask,
    MADTask,
    MemorizationTask,
    NoisyRecallTask,
    RecallTask,
    SelectiveCopyingTask,
)
from chela_plugin.harness.tasks import IGNORE, Examples, Split, cache
from chela_plugin.harness.tasks.random_state import numpy_generator

VERSION = 1
Pair = tuple[np.ndarray, np.ndarray]  # inputs and targets [count, T]


def examples(config: MADTask, split: Split) -> Examples:
    """Inputs and targets `[N, T]` int16; recall's T is `length - 1`, for the last token is only a target."""
    return cache.cached(config, split, VERSION, lambda: _make(config, split))


def _make(config: MADTask, split: Split) -> Examples:
    count = {"train": config.train_examples, "validation": config.validation_examples, "test": config.test_examples}[
        split
    ]
    rng = numpy_generator(config.task, config.data_seed, split, VERSION)
    rules: dict[type[MADTask], Callable[..., Pair]] = {
        RecallTask: recall,
        NoisyRecallTask: recall,
        FuzzyRecallTask: fuzzy_recall,
        SelectiveCopyingTask: selective_copying,
        CompressionTask: compression,
        MemorizationTask: memorization,
    }
    inputs, targets = rules[type(config)](config, count, split == "train", rng)
    return Examples(
        torch.from_numpy(inputs.astype(np.int16)),
        torch.from_numpy(targets.astype(np.int16)),
        classes=config.vocabulary,
        metric="accuracy",
    )


def recall(config: RecallTask | NoisyRecallTask, count: int, train: bool, rng: np.random.Generator) -> Pair:
    """In-context recall, with noise or without."""
    noise_vocabulary, noise = 0, 0.0
    if isinstance(config, NoisyRecallTask):
        noise_vocabulary, noise = config.noise_vocabulary, config.noise
    tokens = config.vocabulary - noise_vocabulary
    half, pairs = tokens // 2, config.length // 2
    keys = rng.integers(0, half, size=(count, pairs))
    is_noise = rng.random((count, pairs)) < noise
    # One pair never is noise. The rule draws it from all places, the last one too, where it protects none.
    safe = rng.integers(0, pairs, size=count)
    safe = np.where((safe == pairs - 1) & is_noise[:, :-1].all(1), 0, safe)
    is_noise[np.arange(count), safe] = False
    is_noise[:, -1] = False
    seen = np.zeros((count, pairs, half), dtype=bool)  # keys before each pair
    here = np.zeros_like(seen)
    np.put_along_axis(here, keys[..., None], ~is_noise[..., None], axis=2)
    seen[:, 1:] = np.logical_or.accumulate(here, axis=1)[:, :-1]
    keys[:, -1] = np.argmax(np.where(seen[:, -1], rng.random((count, half)), -1.0), axis=1)
    table = rng.integers(half, tokens, size=(count, half))
    values = np.take_along_axis(table, keys, axis=1)
    again = np.take_along_axis(seen, keys[..., None], axis=2)[..., 0] & ~is_noise
    junk = rng.integers(tokens, config.vocabulary, size=(2, count, pairs)) if noise_vocabulary else np.zeros((2, 1, 1))
    sequence = np.empty((count, config.length), dtype=np.int64)
    sequence[:, 0::2] = np.where(is_noise, junk[0], keys)
    sequence[:, 1::2] = np.where(is_noise, junk[1], values)
    asked = np.full_like(sequence, IGNORE)
    asked[:, 1::2] = np.where(again, values, IGNORE)
    return sequence[:, :-1], (sequence if train else asked)[:, 1:]


def fuzzy_recall(config: FuzzyRecallTask, count: int, train: bool, rng: np.random.Generator) -> Pair:
    """In-context recall with motifs."""
    most_key, most_value, length = config.key_tokens, config.value_tokens, config.length
    pad = tokens = config.vocabulary - 1
    key_tokens, value_tokens = np.arange(tokens // 2), np.arange(tokens // 2, tokens)

    def key() -> tuple[int, ...]:
        size = rng.integers(1, most_key + 1) if train else most_key
        return tuple(rng.permutation(key_tokens)[:size].tolist())

    def value() -> tuple[int, ...]:
        return tuple(rng.permutation(value_tokens)[: rng.integers(1, most_value + 1)].tolist())

    sequences = np.full((count, length + 1), pad, dtype=np.int64)
    asked = np.full((count, length + 1), IGNORE, dtype=np.int64)
    for row in range(count):
        probe = key()
        known = {probe: value()}
        size = len(probe) + len(known[probe])
        # The rule's bound lets a short probe fall behind the last pair and be asked for without having been shown.
        place = min(int(rng.integers(0, length - 2 * size)), length - size - 2 * (most_key + most_value))
        shown: set[tuple[int, ...]] = set()
        line: list[int] = []
        wanted: list[int] = []
        while len(line) < length - size - most_key - most_value:
            k = probe if len(line) >= place and probe not in shown else key()
            v = known.setdefault(k, known[k] if k in known else value())
            line += [*k, *v]
            wanted += [IGNORE] * len(k) + (list(v) if k in shown else [IGNORE] * len(v))
            shown.add(k)
        line += [*probe, *known[probe]]
        wanted += [IGNORE] * len(probe) + list(known[probe])
        sequences[row, -len(line) :], asked[row, -len(line) :] = line, wanted
        if row % 256 == 0:
            cache.report(row, count)
    return sequences[:, :-1], (sequences if train else asked)[:, 1:]


def selective_copying(config: SelectiveCopyingTask, count: int, train: bool, rng: np.random.Generator) -> Pair:
    """Tokens to copy between blanks."""
    copied, length = config.copied, config.length
    copy, blank = config.vocabulary - 1, config.vocabulary - 2
    blanks = length - 2 * copied - 1
    tokens = rng.integers(0, blank, size=(count, copied))
    before = rng.integers(0, copied, size=(count, blanks))  # each blank's token
    gaps = (before[:, :, None] <= np.arange(copied)).sum(1)  # blanks before each token, those before earlier ones too
    inputs = np.full((count, length), blank, dtype=np.int64)
    np.put_along_axis(inputs, gaps + np.arange(copied), tokens, axis=1)
    inputs[:, length - copied - 1] = copy
    targets = np.full((count, length), IGNORE, dtype=np.int64)
    targets[:, length - copied :] = tokens
    return inputs, targets


def compression(config: CompressionTask, count: int, train: bool, rng: np.random.Generator) -> Pair:
    """Random tokens and the last one."""
    inputs = rng.integers(0, config.vocabulary - 1, size=(count, config.length))
    inputs[:, -1] = config.vocabulary - 1
    return inputs, inputs.copy()


def memorization(config: MemorizationTask, count: int, train: bool, rng: np.random.Generator) -> Pair:
    """Keys of the map, each before the token that asks for its value."""
    insert = config.vocabulary - 1
    half = insert // 2
    table = half + numpy_generator("mad_memorization map", config.data_seed, VERSION).permutation(insert - half)[:half]
    inputs = np.full((count, config.length), insert, dtype=np.int64)
    targets = np.full((count, config.length), IGNORE, dtype=np.int64)
    inputs[:, 0::2] = rng.integers(0, half, size=(count, config.length // 2))
    targets[:, 1::2] = table[inputs[:, 0::2]]
    return inputs, targets
