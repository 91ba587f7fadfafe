"""The saved state of a run: safetensors and JSON, written whole or not at all, equal for every strategy.

    run.json                            the run's config; the same command goes on, another config is refused
    metrics.jsonl                       one JSON object a line
    checkpoints/step-N/model.safetensors, optimizer.safetensors, each with its checksum; where the run stands is in both
    config.json, model.safetensors ...  the finished model, as transformers or timm save it
    tensorboard/, lock

A checkpoint is written to a hidden folder and renamed; the one before goes when the new one is in its place. Under FSDP
it is gathered: rank 0 writes whole tensors, so a run may go on with another strategy or number of devices. That needs
the weights and both moments in rank 0's main memory, 12 bytes a parameter in fp32, and 8 more while they are written.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chela_plugin.harness.config import ConfigError, canonical_json
from chela_plugin.harness.results import ResultsError, load_tensors, save_tensors, sync_folder, write_atomically

Tensors = dict[str, Tensor]
FILES = ("model.safetensors", "optimizer.safetensors")  # of one checkpoint


def whole(tensor: Tensor, keep: bool) -> Tensor | None:
    """The full tensor in main memory, where it is to be kept; a collective call for a sharded one."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().cpu().contiguous() if keep else None


def model_tensors(model: nn.Module, keep: bool) -> Tensors:
    """A model's state dict, gathered; empty where `keep` is false. Every process calls it."""
    gathered = {name: whole(tensor, keep) for name, tensor in model.state_dict().items()}
    return {name: tensor for name, tensor in gathered.items() if tensor is not None}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, keep: bool) -> Tensors:
    """The optimiser's state by '<parameter>//<name>', gathered. Every process calls it."""
    out: Tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            gathered = whole(torch.as_tensor(value), keep)
            if gathered is not None:
                out[f"{name}//{key}"] = gathered
    return out


def load_model(model: nn.Module, tensors: Tensors) -> None:
    """Fill a model, sharded or not, from whole tensors."""
    state = model.state_dict()
    if state.keys() != tensors.keys():
        raise ConfigError("the checkpoint's weights are not those of this model; give another --out")
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(_placed(tensors[name], tensor))


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Fill an optimiser's state, sharded like its parameters, from whole tensors."""
    parameters = dict(model.named_parameters())
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("//")
        parameter = parameters[name]
        value = tensor
        if tensor.ndim:  # a counter stays in main memory, where AdamW keeps it
            value = _placed(tensor, parameter).to(parameter.device)
        optimizer.state[parameter][key] = value


def _placed(full: Tensor, like: Tensor) -> Tensor:
    """`full`, distributed as `like` is. Every process holds the same `full`, so nothing is sent."""
    if not hasattr(like, "placements"):
        return full
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = like
    return distribute_tensor(full.to(like.device), sharded.device_mesh, sharded.placements, src_data_rank=None)


class RunFolder:
    """One run's folder. Use as a context manager in the process that writes: it holds the lock."""

    def __init__(self, path: Path, config: dict[str, Any]):
        self.path, self.config = path, config  # the config is the run's identity
        self.checkpoints = path / "checkpoints"

    def check(self) -> None:
        """Raise ConfigError where the folder holds another run, or something else. Changes nothing."""
        known = self.path / "run.json"
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file; give --out a folder")
        if not known.exists():
            strangers = sorted(p.name for p in self.path.iterdir() if p.name != "lock") if self.path.is_dir() else []
            if strangers:
                raise ConfigError(
                    f"{self.path} is no run's folder (it holds {strangers[0]!r} and no run.json); give another --out"
                )
            return
        try:
            before = json.loads(known.read_bytes())["config"]
            if not isinstance(before, dict):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{known} was not written by chela train; give another --out") from None
        if canonical_json(before) != canonical_json(self.config):
            keys = sorted(_differing(before, self.config))
            raise ConfigError(
                f"{self.path} holds a run with another config (different: {', '.join(keys)}); give another --out, or "
                "go on with the config that it was started with"
            )

    def __enter__(self) -> RunFolder:
        from filelock import FileLock, Timeout

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.path / "lock")
            self._lock.acquire(timeout=5)  # the processes of a run that was killed just now may need a moment to go
        except Timeout:
            raise ConfigError(f"another process trains in {self.path}; wait for it, or give another --out") from None
        except OSError as error:
            raise ConfigError(f"cannot write to {self.path}: {error.strerror}; give another --out") from None
        try:
            self.check()
            if not (self.path / "run.json").exists():
                content = json.dumps({"config": self.config}, indent=1) + "\n"
                write_atomically(self.path / "run.json", content.encode())
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def newest(self) -> Path | None:
        """The last complete checkpoint."""
        found = [p for p in self.checkpoints.glob("step-*") if p.is_dir()]
        return max(found, key=lambda p: int(p.name.removeprefix("step-")), default=None)

    def load(self) -> tuple[Tensors, Tensors, dict[str, Any]] | None:
        """Weights, optimiser state, and where the run stands, of the last checkpoint; None before the first."""
        path = self.newest()
        if path is None:
            return None
        try:
            weights, moments = (load_tensors(path / name) for name in FILES)
        except ResultsError as error:
            raise _damaged(path, str(error)) from None
        if weights is None or moments is None:
            raise _damaged(path, "a file is missing")
        (model, state), (optimizer, stood) = weights, moments
        if state != stood:
            raise _damaged(path, "its two files are of different moments")
        return model, optimizer, state

    def save(self, step: int, model: Tensors, optimizer: Tensors, state: dict[str, Any]) -> None:
        """Write a checkpoint, then remove the ones before it."""
        final = self.checkpoints / f"step-{step}"
        if final.exists():
            return
        hidden = self.checkpoints / f".step-{step}.part"
        try:
            for leftover in self.checkpoints.glob(".step-*.part"):
                shutil.rmtree(leftover)
            hidden.mkdir(parents=True)
            for name, tensors in zip(FILES, (model, optimizer), strict=True):
                save_tensors(hidden / name, tensors, state)
            os.replace(hidden, final)
            sync_folder(self.checkpoints)
        except (OSError, ResultsError) as error:
            reason = error.__cause__ if isinstance(error, ResultsError) else error
            raise ConfigError(
                f"cannot write {final}: {getattr(reason, 'strerror', None) or error}; the checkpoint before it is kept"
            ) from error
        for older in self.checkpoints.glob("step-*"):
            if older != final:
                shutil.rmtree(older)


def _damaged(path: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"checkpoint {path} is damaged ({reason}); restore it, or remove that folder to start from the one before it "
        "or anew"
    )


def _differing(one: dict[str, Any], other: dict[str, Any], prefix: str = "") -> set[str]:
    out: set[str] = set()
    for key in one.keys() | other.keys():
        a, b = one.get(key), other.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            out |= _differing(a, b, f"{prefix}{key}.")
        elif a != b:
            out.add(f"{prefix}{key}")
    return out
