"""ListOps as in Long Range Arena: nested operations on lists of digits, written out as tokens; classify by the result.

Rules (Tay et al., arXiv:2011.04006; google-research/long-range-arena, lra_benchmarks/data/listops.py; the operations
are those of Nangia & Bowman, arXiv:1804.06028):

- A node at depth 1 to max_depth - 1 is an operation with probability 1/4, else a digit; at max_depth always a digit.
  Digits 0 to 9, operations MIN, MAX, MED (median, rounded down), SM (sum modulo 10), and 2 to max_args arguments are
  uniform.
- Its length is one token for a digit, and two (the opening with the operation, the closing) besides its arguments for
  an operation. Trees with min_length < length < max_length are kept, both bounds excluded; 500 and 2,000 there.
- No tree stands twice; 96,000 to train, 2,000 to validate, 2,000 to test. Ten classes.

The original's files also hold parentheses around every partial application; its input pipeline removes them, so they
don't count and are not made here. The original numbers tokens by a set's order, so any numbering is as good: 0 is
padding, 1 to 10 the digits, 11 to 14 the operations in the order above, 15 the closing bracket. Not its random numbers:
the lists follow the same rules, but are others than the published file's.

Trees grow breadth first, many at once, in NumPy; a tree that is already too long is dropped at once. The 100,000 lists
take 18 s on two CPU cores (5,500 lists/s; `chela data listops`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from chela_plugin.harness.task_configs.base import DataError
from chela_plugin.harness.task_configs.lra import ListOpsTask
from chela_plugin.harness.tasks import Examples, Split
from chela_plugin.harness.tasks.lra_chunks import Arrays, chunks

VERSION = 1  # of the rules below: the same config with another version is other data
OPERATION_PROBABILITY = 0.25
MIN, MAX, MED, SM = range(4)
PADDING, DIGIT, OPERATION, CLOSE = 0, 1, 11, 15  # token ids; DIGIT and OPERATION are the first of theirs
TOKENS = 16
NAMES = ("", *map(str, range(10)), "[MIN", "[MAX", "[MED", "[SM", "]")  # of token ids, as the original writes them

CHUNK = 1000  # lists a file
ROOTS = 20_000  # trees grown side by side: about 30 MB of nodes
ATTEMPTS = 200  # times ROOTS trees without a single one of a fitting length: the bounds can't be met


def examples(config: ListOpsTask, split: Split) -> Examples:
    """Inputs `[N, max_length]` uint8 tokens, zeros behind the list; targets `[N]` the value of each list."""
    sizes = {"train": config.train_examples, "validation": config.validation_examples, "test": config.test_examples}
    total = sum(sizes.values())
    parameters = {
        "max_depth": config.max_depth,
        "max_args": config.max_args,
        "min_length": config.min_length,
        "max_length": config.max_length,
        "seed": config.data_seed,
        "examples": min(CHUNK, total),
    }
    lists, targets = _distinct(parameters, total)
    first = {"train": 0, "validation": sizes["train"], "test": sizes["train"] + sizes["validation"]}[split]
    rows = slice(first, first + sizes[split])
    inputs = np.zeros((sizes[split], config.max_length), np.uint8)
    for row, tokens in zip(inputs, lists[rows], strict=True):
        row[: len(tokens)] = tokens
    return Examples(
        torch.from_numpy(inputs),
        torch.from_numpy(targets[rows].astype(np.int64)),
        classes=10,
        metric="accuracy",
        vocabulary=TOKENS,
        padding=PADDING,
    )


def _distinct(parameters: dict[str, Any], total: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The first `total` lists, in the order of the chunks, that did not stand before."""
    lists: list[np.ndarray] = []
    targets: list[int] = []
    seen: set[bytes] = set()
    made = 0
    while len(lists) < total:
        # Of long lists none ever stands twice; of short ones many do, and further chunks are asked for.
        more = max(1, -(-(total - len(lists)) // parameters["examples"]))
        before = len(lists)
        for arrays in chunks("lra_listops", VERSION, parameters, range(made, made + more)):
            for tokens, target in zip(
                np.split(arrays["tokens"], np.cumsum(arrays["lengths"])[:-1]), arrays["targets"], strict=True
            ):
                key = tokens.tobytes()
                if key not in seen and len(lists) < total:
                    seen.add(key)
                    lists.append(tokens)
                    targets.append(target)
        made += more
        if (len(lists) - before) * 20 < min(total - before, more * parameters["examples"]):
            raise DataError(
                f"task listops: hardly a new list comes after {len(lists):,} of {total:,}; "
                "raise max_depth or max_length, or ask for fewer examples"
            )
    return lists, np.array(targets)


def chunk(parameters: Mapping[str, Any], number: int) -> Arrays:
    """`parameters['examples']` lists: `tokens` uint8 one behind the other, `lengths` int32, `targets` uint8."""
    rng = np.random.default_rng([parameters["seed"], number])
    parts: list[Arrays] = []
    count = failures = 0
    while count < parameters["examples"]:
        part = grow(
            rng,
            ROOTS,
            parameters["max_depth"],
            parameters["max_args"],
            parameters["min_length"],
            parameters["max_length"],
        )
        if len(part["lengths"]) == 0:
            failures += 1
            if failures == ATTEMPTS:
                raise DataError(
                    f"task listops: of {ATTEMPTS * ROOTS:,} trees of depth {parameters['max_depth']} none is longer "
                    f"than {parameters['min_length']} and shorter than {parameters['max_length']} tokens; "
                    "change the bounds"
                )
        parts.append(part)
        count += len(part["lengths"])
    lengths = np.concatenate([part["lengths"] for part in parts])[: parameters["examples"]]
    return {
        "tokens": np.concatenate([part["tokens"] for part in parts])[: lengths.sum()],
        "lengths": lengths,
        "targets": np.concatenate([part["targets"] for part in parts])[: parameters["examples"]],
    }


def grow(
    rng: np.random.Generator, roots: int, max_depth: int, max_args: int, min_length: int, max_length: int
) -> Arrays:
    """Grow `roots` trees and keep those of a fitting length.

    A level holds the nodes of one depth of all trees; the children of a node stand side by side, in their parents'
    order. Returns the arrays of `chunk`, for as many lists as were kept.
    """
    tree = np.arange(roots)
    length = np.zeros(roots, np.int64)
    levels: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # tree, whether an operation, arguments (0 for digits)
    for depth in range(1, max_depth + 1):
        operation = rng.random(len(tree)) <= OPERATION_PROBABILITY if depth < max_depth else np.zeros(len(tree), bool)
        arguments = np.where(operation, rng.integers(2, max_args + 1, len(tree)), 0)
        length += np.bincount(tree, np.where(operation, 2, 1), minlength=roots).astype(np.int64)
        levels.append((tree, operation, arguments))
        tree = np.repeat(tree, arguments)
        pending = length + np.bincount(tree, minlength=roots)  # each child is a token at least
        length[pending >= max_length] = max_length  # too long already; its remaining nodes are not grown
        keep = length < max_length
        tree = tree[keep[tree]]
        if len(tree) == 0:
            break
        levels = [(t[keep[t]], o[keep[t]], a[keep[t]]) for t, o, a in levels]
    kept = np.flatnonzero((length > min_length) & (length < max_length))
    fits = np.zeros(roots, bool)
    fits[kept] = True
    levels = [(t[fits[t]], o[fits[t]], a[fits[t]]) for t, o, a in levels]
    return _write_out(rng, levels, length[kept])


def _write_out(
    rng: np.random.Generator, levels: list[tuple[np.ndarray, np.ndarray, np.ndarray]], lengths: np.ndarray
) -> Arrays:
    """Fill in digits and operations, evaluate from the leaves up, and place tokens from the roots down."""
    contents = [np.where(o, rng.integers(0, 4, len(o)), rng.integers(0, 10, len(o))) for _, o, _ in levels]
    values = [content.copy() for content in contents]
    sizes = [np.ones(len(content), np.int64) for content in contents]
    for d in range(len(levels) - 2, -1, -1):
        _, operation, arguments = levels[d]
        nodes = np.flatnonzero(operation)
        if len(nodes) == 0:
            continue
        count = arguments[nodes]
        start = np.cumsum(count) - count
        sizes[d][nodes] = 2 + np.add.reduceat(sizes[d + 1], start)
        values[d][nodes] = _evaluate(contents[d][nodes], values[d + 1], start, count)
    tokens = np.zeros(lengths.sum(), np.uint8)
    position = np.cumsum(lengths) - lengths
    for d, (_, operation, arguments) in enumerate(levels):
        tokens[position] = np.where(operation, OPERATION, DIGIT) + contents[d]
        nodes = np.flatnonzero(operation)
        if len(nodes) == 0:
            break
        tokens[position[nodes] + sizes[d][nodes] - 1] = CLOSE
        count = arguments[nodes]
        before = np.cumsum(sizes[d + 1]) - sizes[d + 1]  # tokens of all nodes to the left on this level
        start = np.cumsum(count) - count
        position = before + np.repeat(position[nodes] + 1 - before[start], count)
    return {"tokens": tokens, "lengths": lengths.astype(np.int32), "targets": values[0].astype(np.uint8)}


def _evaluate(operations: np.ndarray, arguments: np.ndarray, start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """The value of each operation on its `count` arguments from `start` on; a median between two is rounded down."""
    ranked = arguments[np.lexsort((arguments, np.repeat(np.arange(len(count)), count)))]
    median = (ranked[start + (count - 1) // 2] + ranked[start + count // 2]) // 2
    total = np.add.reduceat(arguments, start) % 10
    return np.choose(operations, [ranked[start], ranked[start + count - 1], median, total])
