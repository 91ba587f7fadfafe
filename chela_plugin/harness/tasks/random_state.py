"""Random numbers for generated data: a numpy generator whose stream depends on its key alone."""

from __future__ import annotations

import hashlib

import numpy as np


def numpy_generator(*key: int | str) -> np.random.Generator:
    """PCG64 from the SHA-256 of the key."""
    return np.random.Generator(
        np.random.PCG64(int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest(), "big"))
    )
