"""Generated data in numbered chunks: made side by side, each file written at once, so that an interrupted run goes on.

A chunk is a pure function of (parameters, number), so it doesn't matter which process makes it, or when. Each is one
safetensors file under the cache; a damaged one is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from chela_plugin.harness.task_configs.base import DataError
from chela_plugin.harness.tasks import cache

Arrays = dict[str, np.ndarray]


def folder_of(module: str, version: int, parameters: Mapping[str, Any]) -> Path:
    """Where the chunks of one set of parameters lie."""
    text = json.dumps([module, version, dict(parameters)], sort_keys=True, separators=(",", ":"))
    return cache.folder() / f"{module}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def chunks(
    module: str,
    version: int,
    parameters: Mapping[str, Any],
    numbers: Iterable[int],
) -> Iterator[Arrays]:
    """Chunks by number, each once: read from the cache, or made by `chunk(parameters, number)` of a module beside this.

    Args:
        module: a module of this package.
        version: of that module's rules; another version is another folder.
        parameters: JSON values on which the chunks depend; 'examples' of them is how many examples a chunk holds.
        numbers: which chunks.

    Reports progress through `cache.report`. Raises DataError where the cache can't be written; what was finished stays.
    """
    folder = folder_of(module, version, parameters)
    numbers = list(numbers)
    found = {number: arrays for number in numbers if (arrays := _read(folder, number)) is not None}
    missing = [number for number in numbers if number not in found]
    if missing:
        _writable(folder)
        _make(module, parameters, missing, folder, len(numbers))
        for number in missing:
            arrays = _read(folder, number)
            if arrays is None:
                raise DataError(f"{_path(folder, number)} was written but can't be read back; is the disk sound?")
            found[number] = arrays
    return (found.pop(number) for number in numbers)  # a chunk that was used takes no memory


def _make(
    module: str,
    parameters: Mapping[str, Any],
    missing: list[int],
    folder: Path,
    wanted: int,
) -> None:
    each = parameters["examples"]
    there = wanted - len(missing)
    workers = min(_cpus(), len(missing))
    if workers == 1:
        for done, number in enumerate(missing):
            cache.report((there + done) * each, wanted * each)
            _write_one(module, parameters, number, folder)
        cache.report(wanted * each, wanted * each)
        return
    # Processes of their own, not multiprocessing: that would run the caller's main module again.
    children = []
    try:
        for first in range(workers):
            task = {"module": module, "parameters": parameters, "numbers": missing[first::workers], "folder": folder}
            command = [sys.executable, "-m", __name__, json.dumps(task, default=str)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "CHELA_AUTOLOAD": "0"}
            children.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            )
        while any(child.poll() is None for child in children):
            if any(child.poll() not in (None, 0) for child in children):
                break
            done = sum(_path(folder, number).exists() for number in missing)
            cache.report((there + done) * each, wanted * each)
            time.sleep(0.2)
        for child in children:
            if child.poll() not in (None, 0):
                assert child.stderr is not None
                raise DataError(child.stderr.read().strip().splitlines()[-1].removeprefix("DataError: "))
    finally:
        for child in children:
            if child.poll() is None:
                child.terminate()
            child.communicate()


def _cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.safetensors"


def _writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"the cache {folder} can't be made: {error.strerror}; set CHELA_CACHE to a folder that can be written"
        ) from None


def _write_one(module: str, parameters: Mapping[str, Any], number: int, folder: Path) -> None:
    from safetensors.numpy import save

    arrays = importlib.import_module(f"{__package__}.{module}").chunk(parameters, number)
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    content = save(arrays, metadata={"crc32": _crc(arrays)})
    name = None
    try:
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            name = file.name
            file.write(content)
        os.replace(name, _path(folder, number))
    except OSError as error:
        if name is not None:
            with contextlib.suppress(OSError):
                os.unlink(name)
        raise DataError(
            f"{_path(folder, number)} can't be written: {error.strerror}; what was finished is kept. "
            "Free some space, or set CHELA_CACHE to another folder, and start again"
        ) from None


def _read(folder: Path, number: int) -> Arrays | None:
    """A chunk, or None where it is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    path = _path(folder, number)
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
            return arrays if (file.metadata() or {}).get("crc32") == _crc(arrays) else None
    except (OSError, SafetensorError, ValueError):
        return None


def _crc(arrays: Arrays) -> str:
    value = 0
    for name in sorted(arrays):
        value = zlib.crc32(arrays[name].tobytes(), zlib.crc32(name.encode(), value))
    return f"{value:08x}"


def _work(task: Mapping[str, Any]) -> None:
    """What a child does: its chunks, until they are done or the parent is gone."""
    parent = os.getppid()
    for number in task["numbers"]:
        if os.getppid() != parent:
            return
        _write_one(task["module"], task["parameters"], number, Path(task["folder"]))


if __name__ == "__main__":
    try:
        _work(json.loads(sys.argv[1]))
    except DataError as failure:
        print(f"DataError: {failure}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
