"""Generated data, kept on disk under the hash of what made it.

An entry's name is the SHA-256 of the task's config, the split and the generator's version, so nothing stale is ever
read. Entries carry a checksum and are written atomically; one that is damaged is made again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from chela_plugin.harness.config import canonical_json
from chela_plugin.harness.results import ResultsError, load_tensors, save_tensors
from chela_plugin.harness.task_configs.base import TaskConfig
from chela_plugin.harness.tasks import Examples, Split

Progress = Callable[[int, int], None]  # examples done, examples in all

_listener: ContextVar[Progress | None] = ContextVar("progress of generation", default=None)


@contextmanager
def reporting(listener: Progress) -> Iterator[None]:
    """Inside, `report` calls `listener(done, total)`."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def report(done: int, total: int) -> None:
    """Tell whoever listens how many of an entry's examples are made."""
    listener = _listener.get()
    if listener is not None:
        listener(done, total)


def folder() -> Path:
    """`CHELA_CACHE`, or `~/.cache/chela-plugin`."""
    return Path(os.environ.get("CHELA_CACHE") or Path.home() / ".cache" / "chela-plugin")


def entry(config: TaskConfig, split: Split, version: int) -> Path:
    """Where a split lies once it is made. `version` is the generator's: raise it when its output changes."""
    key = canonical_json([config.model_dump(mode="json"), split, version])
    return folder() / f"{config.task}-{split}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"


def cached(config: TaskConfig, split: Split, version: int, make: Callable[[], Examples]) -> Examples:
    """The entry's examples, or `make()` and keep what it returns.

    Raises ResultsError where the entry can't be written (a full disk): older entries stay as they are.
    """
    path = entry(config, split, version)
    found = _load(path)
    if found is not None:
        return found
    data = make()
    tensors = {name: value for name, value in vars(data).items() if hasattr(value, "numpy")}
    about: dict[str, Any] = {name: value for name, value in vars(data).items() if name not in tensors}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, tensors, about | {"slices": list(data.slices)})
    except (ResultsError, OSError) as error:
        raise ResultsError(f"{error}. The environment variable CHELA_CACHE names another folder") from None
    return data


def _load(path: Path) -> Examples | None:
    try:
        saved = load_tensors(path)
    except ResultsError:  # damaged: it is only a copy of what can be made again
        return None
    if saved is None:
        return None
    tensors, about = saved
    try:
        fields: dict[str, Any] = {**tensors, **about, "slices": tuple(about["slices"])}
        return Examples(**fields)
    except (TypeError, KeyError):  # of another version of Examples
        return None
