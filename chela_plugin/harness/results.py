"""The results folder. Every write is atomic or an append that a torn end can't damage; one process at a time.

    manifest.json               the folder's format and the full config of each ablation in it
    results.jsonl               one JSON object a line; the source of every table (see `Record`)
    cells/<id>/run.safetensors  a run under way: weights, best weights, optimiser, and where it stands
    cells/<id>/best.safetensors the chosen weights of a finished run
    tensorboard/                scalars
    lock                        held by the process that writes

No pickle anywhere: tensors are safetensors, the rest is JSON.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from chela_plugin.harness.config import canonical_json

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "chela-plugin results"
VERSION = 1

# A record is a JSON object with 'record' one of:
#   'run'   one (task, mixer, learning rate, seed): validation, history, conditions; or 'status': 'failed' and a reason
#   'test'  the one reading of the test split for (task, mixer, seed), at the learning rate that validation chose
Record = dict[str, Any]


class ResultsError(ValueError):
    """A results folder that can't be used; the message says why and what to do."""


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` as a whole: after a crash at any point it holds the old bytes or the new ones."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> ResultsError:
    """The error for a file that the system refused to write."""
    return ResultsError(
        f"cannot write {path}: {error.strerror or error}. Finished runs are kept; mend it and start again"
    )


def sync_folder(path: Path) -> None:
    """Make a rename in `path` durable; a system that can't open folders (Windows) does so by itself."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except (PermissionError, IsADirectoryError):
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_records(path: Path) -> tuple[list[Record], int]:
    """The records of a `results.jsonl` and how many of its bytes are good.

    A last line that was not finished (a kill in the middle of the write) is left out of both. Raises ResultsError for
    damage that no interrupted write can leave.
    """
    if not path.exists():
        return [], 0
    records: list[Record] = []
    good = 0
    for number, line in enumerate(io.BytesIO(path.read_bytes()), start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not {"record", "cell"} <= record.keys() or not line.endswith(b"\n"):
                raise ValueError
        except (ValueError, RecursionError):
            if not line.endswith(b"\n"):
                break
            raise ResultsError(
                f"{path}, line {number}: not a record of this harness; restore the file or give another --out"
            ) from None
        records.append(record)
        good += len(line)
    return records, good


def open_for_reading(folder: Path) -> tuple[dict[str, Any], list[Record]]:
    """Manifest and records of a results folder. Raises ResultsError where it is none of ours."""
    manifest = _manifest(folder)
    if manifest is None:
        raise ResultsError(f"{folder} is no results folder: it has no manifest.json. Make one with: chela ablate FILE")
    return manifest, read_records(folder / "results.jsonl")[0]


def _manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / "manifest.json"
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["format"] != FORMAT:
            raise ValueError
        version = int(manifest["version"])
        if not isinstance(manifest["ablations"], dict):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ResultsError(f"{path} was not written by this harness; give another --out") from None
    if version != VERSION:
        raise ResultsError(
            f"{folder} holds results of format version {version}, this is version {VERSION}; "
            "use the chela-plugin version that wrote it, or give another --out"
        )
    return manifest


class ResultsFolder:
    """The folder, open for writing. Use as a context manager: it holds the lock.

    Raises ResultsError if another process holds it, if it is not a results folder, or if an ablation of the same name
    but another config is in it.
    """

    def __init__(self, path: Path, ablations: dict[str, dict[str, Any]]):
        self.path = path
        self.ablations = ablations
        self.records: list[Record] = []
        self.torn = False

    def __enter__(self) -> ResultsFolder:
        # A dependency of torch; the lock falls with the process, even by kill -9.
        from filelock import FileLock, Timeout

        if self.path.exists() and not self.path.is_dir():
            raise ResultsError(f"{self.path} is a file; give --out a folder")
        if self.path.is_dir() and not (self.path / "manifest.json").exists():
            strangers = sorted(p.name for p in self.path.iterdir() if p.name != "lock" and not p.name.endswith(".part"))
            if strangers:
                raise ResultsError(
                    f"{self.path} is no results folder (it holds {strangers[0]!r} and no manifest.json); "
                    "give --out a new or empty folder"
                )
        self._lock = FileLock(self.path / "lock")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ResultsError(
                f"another process is writing to {self.path}; wait for it, or give another --out"
            ) from None
        except OSError as error:
            raise ResultsError(f"cannot write to {self.path}: {error.strerror}; give another --out") from None
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None):
        self._lock.release()

    def _open(self) -> None:
        for leftover in self.path.glob("**/.*.part"):  # of a process that was killed before its rename
            leftover.unlink(missing_ok=True)
        manifest = _manifest(self.path) or {"format": FORMAT, "version": VERSION, "ablations": {}}
        for name, config in self.ablations.items():
            known = manifest["ablations"].get(name)
            if known is not None and canonical_json(known) != canonical_json(config):
                keys = sorted(k for k in {*known, *config} if known.get(k) != config.get(k))
                raise ResultsError(
                    f"{self.path} holds the ablation {name!r} with another config (different: {', '.join(keys)}); "
                    "give another --out, or go on with the config that it was started with"
                )
        manifest["ablations"].update(self.ablations)
        write_atomically(self.path / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
        log = self.path / "results.jsonl"
        self.records, good = read_records(log)
        if log.exists() and log.stat().st_size > good:
            self.torn = True
            os.truncate(log, good)

    def append(self, record: Record) -> None:
        """Add one record, on disk before this returns. A failed write (a full disk) leaves the file as it was."""
        log = self.path / "results.jsonl"
        line = (canonical_json(record) + "\n").encode()
        before = log.stat().st_size if log.exists() else 0
        try:
            with open(log, "ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with suppress(OSError):  # what can't be cut off now is a torn line, which the next start cuts off
                os.truncate(log, before)
            raise unwritable(log, error) from error
        self.records.append(record)

    def drop_checkpoint(self, cell_id: str) -> None:
        """Remove what an ended run doesn't need any more; its best weights stay."""
        (self.path / "cells" / cell_id / "run.safetensors").unlink(missing_ok=True)


def save_tensors(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write tensors and a JSON-able state as one safetensors file, atomically, with a SHA-256 of all of it inside."""
    from safetensors.torch import save

    apart = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if place in seen else tensor  # the format has no tensors that share memory
        seen.add(place)
    text = canonical_json(state)
    # format: what transformers asks of a file of weights
    metadata = {"format": "pt", "state": text, "sha256": _checksum(apart, text)}
    write_atomically(path, save(apart, metadata=metadata))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What `save_tensors` wrote, or None where there is no such file.

    Raises ResultsError for a file that is damaged, were it by one bit, or that another program wrote. No interrupted
    write leaves such a file.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            text, checksum = metadata["state"], metadata["sha256"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping: it can't be iterated
        if _checksum(tensors, text) != checksum:
            raise ValueError("its checksum differs")
        return tensors, json.loads(text)
    except KeyError as error:
        reason = f"it has no {error}, which this harness writes"
    except (OSError, SafetensorError, ValueError) as error:
        reason = str(error)
    raise ResultsError(f"{path} is damaged or of another program ({reason}); restore it, or remove it to start over")


def _checksum(tensors: dict[str, Tensor], state: str) -> str:
    """SHA-256 of names, dtypes, shapes and values, and of the state's text."""
    import torch

    total = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"\0{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
