"""Document retrieval as in Long Range Arena: does one of two papers cite the other; 4,000 bytes of each.

Rules (Tay et al., arXiv:2011.04006; google-research/long-range-arena, lra_benchmarks/matching/input_pipeline.py): pairs
of papers of the ACL Anthology Network (Radev et al. 2013), the first `max_length` bytes of each, and whether they are
linked; the pairs, and which of them train (147,086), validate (18,090) and test (17,437), are LRA's. A model sees each
paper by itself and compares two vectors; the harness' sequence backbone does so for pairs.

Bytes are their own token ids and 0 is padding; a NUL byte becomes a space. Otherwise nothing differs.

The files are the three `new_aan_pairs.*.tsv` of LRA's release: no heading, five columns between tabs: label, two ids,
two texts; no quoting.
"""

from __future__ import annotations

from pathlib import Path

import torch

from chela_plugin.harness.task_configs.base import DataError
from chela_plugin.harness.task_configs.lra import RetrievalTask
from chela_plugin.harness.tasks import Examples, Split
from chela_plugin.harness.tasks.lra_text import PADDING, padded_bytes

FILES = {
    "train": "new_aan_pairs.train.tsv",
    "validation": "new_aan_pairs.eval.tsv",
    "test": "new_aan_pairs.test.tsv",
}
LABELS = {b"0": 0, b"0.0": 0, b"1": 1, b"1.0": 1}
WHERE = (
    "get https://storage.googleapis.com/long-range-arena/lra_release.gz (a tar archive, 7.7 GB), unpack it, "
    "and set the task's `path` to the folder lra_release/lra_release/tsv_data"
)


def examples(config: RetrievalTask, split: Split) -> Examples:
    """Inputs `[N, 2, max_length]` uint8 bytes, zeros behind the text; targets `[N]`: 1 where the papers are linked."""
    path = Path(config.path).expanduser() / FILES[split]
    labels: list[int] = []
    texts: list[bytes] = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                columns = line.rstrip(b"\r\n").split(b"\t")
                if len(columns) != 5 or columns[0] not in LABELS:
                    raise DataError(
                        f"task lra_retrieval: line {number} of {path} is no pair (a label 0 or 1, two ids, "
                        f"two texts, tabs between): the file is damaged or another one; {WHERE}"
                    )
                labels.append(LABELS[columns[0]])
                texts += (columns[3][: config.max_length], columns[4][: config.max_length])
    except OSError as error:
        raise DataError(f"task lra_retrieval: {path} can't be read ({error.strerror}); {WHERE}") from None
    if not labels:
        raise DataError(f"task lra_retrieval: {path} is empty; {WHERE}")
    inputs = padded_bytes(texts, len(texts), config.max_length).unflatten(0, (-1, 2))
    return Examples(inputs, torch.tensor(labels), classes=2, metric="accuracy", vocabulary=256, padding=PADDING)
