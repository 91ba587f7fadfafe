"""Multi-query associative recall: key-value pairs first, then each key once more, and its value is asked for.

Rules and settings as in zoology (Arora et al., arXiv:2312.04927; HazyResearch/zoology at d88d6f5: zoology/data/
multiquery_ar.py and experiments/paper_configs/arxiv24_based_figure2/configs.py): token 0 is empty, keys are 1 to
V/2 - 1 and values V/2 to V - 1, both drawn without repetition; a key's query stands at an even place behind the pairs,
drawn without repetition with weights proportional to rank^(power - 1); the target at a query is the key's value, no
other place has a target. Empty places are then filled with tokens drawn from the whole vocabulary.

Zoology has a training and a test set; here a validation split of the test set's settings is apart from both. A training
batch holds one setting, as zoology's do. Its draws come from numpy's legacy generator, ours don't: equal in
distribution, not number by number.
"""

from __future__ import annotations

import numpy as np
import torch

from chela_plugin.harness.task_configs.synthetic import MQARSetting, MQARTask
from chela_plugin.harness.tasks import IGNORE, Examples, Split, cache
from chela_plugin.harness.tasks.random_state import numpy_generator

VERSION = 1
CHUNK = 4096  # examples drawn at a time


def examples(config: MQARTask, split: Split) -> Examples:
    """Inputs and targets `[N, T]` int16, T the longest setting's length; padding is token 0 behind shorter ones."""
    return cache.cached(config, split, VERSION, lambda: _mixture(config, split))


def _mixture(config: MQARTask, split: Split) -> Examples:
    settings: tuple[MQARSetting, ...] = getattr(config, split)
    total, longest = sum(s.examples for s in settings), max(s.length for s in settings)
    inputs = np.zeros((total, longest), dtype=np.int16)
    targets = np.full((total, longest), IGNORE, dtype=np.int16)
    part = np.repeat(np.arange(len(settings), dtype=np.int16), [s.examples for s in settings])
    done = 0
    for number, setting in enumerate(settings):
        rng = numpy_generator("mqar", config.data_seed, split, number, VERSION)
        for start in range(0, setting.examples, CHUNK):
            count = min(CHUNK, setting.examples - start)
            rows = slice(done, done + count)
            inputs[rows, : setting.length], targets[rows, : setting.length] = sequences(
                config, setting.length, setting.pairs, count, rng
            )
            done += count
            cache.report(done, total)
    names = tuple(f"{s.length} tokens, {s.pairs} pairs" for s in settings)
    of = torch.from_numpy(part)
    return Examples(
        torch.from_numpy(inputs),
        torch.from_numpy(targets),
        classes=config.vocabulary,
        metric="accuracy",
        padding=0 if min(s.length for s in settings) < longest else None,
        buckets=of if split == "train" else None,
        slices=names,
        slice_of=of,
    )


def sequences(
    config: MQARTask, length: int, pairs: int, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """`count` sequences of one setting: inputs and targets `[count, length]`."""
    keys = 1 + distinct(config.vocabulary // 2 - 1, pairs, count, rng)
    values = config.vocabulary // 2 + distinct(config.vocabulary // 2, pairs, count, rng)
    inputs = np.zeros((count, length), dtype=np.int64)
    targets = np.full((count, length), IGNORE, dtype=np.int64)
    inputs[:, 0 : 2 * pairs : 2], inputs[:, 1 : 2 * pairs : 2] = keys, values
    space = (length - 2 * pairs) // 2
    weights = np.arange(1, space + 1) ** (config.gap_power - 1.0)
    # The largest of log-weights with Gumbel noise, in falling order, are draws one by one without replacement.
    noisy = np.log(weights) + rng.gumbel(size=(count, space))
    places = 2 * pairs + 2 * np.argsort(-noisy, axis=1)[:, :pairs]
    np.put_along_axis(inputs, places, keys, axis=1)
    np.put_along_axis(targets, places, values, axis=1)
    if config.random_fill:
        fill = rng.integers(0, config.vocabulary, size=inputs.shape)
        inputs = np.where(inputs == 0, fill, inputs)
    return inputs, targets


def distinct(size: int, wanted: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """`[count, wanted]` numbers below `size`, no two equal in a row, every ordered choice equally likely.

    Floyd's sampling for a set (Bentley & Floyd, CACM 30(9), 1987), then a shuffle: `wanted` steps at any `size`.
    """
    chosen = np.empty((count, wanted), dtype=np.int64)
    for i, top in enumerate(range(size - wanted, size)):
        drawn = rng.integers(0, top + 1, size=count)
        taken = (chosen[:, :i] == drawn[:, None]).any(axis=1)
        chosen[:, i] = np.where(taken, top, drawn)
    return rng.permuted(chosen, axis=1)
