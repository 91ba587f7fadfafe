"""Starts a run: in this process for one device, else in one process a device, under torch's elastic agent.

The agent notices a process that dies, ends the others and says which it was. Under torchrun (several machines) or
another launcher that sets its variables, the processes are there already and none is started. After Ctrl-C the agent
gives the processes 30 s to save; a checkpoint that takes longer is lost, and the one before it stands.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from chela_plugin.harness.config import ConfigError
from chela_plugin.harness.extras import need
from chela_plugin.harness.train.checkpoint import RunFolder
from chela_plugin.harness.train.config import ImageRun, Run, identity
from chela_plugin.harness.training import Diverged, Interrupted

STOPPED = "chela-train-stopped"  # what a process answers that saved and stopped


class TrainingFailed(RuntimeError):
    """A run ended before its time; the message says why, and that the same command goes on."""


def start(run: Run, out: Path, console: Console) -> int | None:
    """Train, or go on. Returns None at the end, or the signal that stopped it after all was saved.

    Raises ConfigError, MissingPackage, TrainingFailed.
    """
    for package in ("lightning", "tensorboard"):
        need(package, "harness")
    import torch
    from torch.distributed import is_torchelastic_launched

    machine = run.machine
    cuda = torch.cuda.is_available()
    if machine.accelerator == "cuda" and not cuda:
        raise ConfigError("machine.accelerator is cuda, and torch sees no CUDA device; use auto or cpu")
    use_cuda = cuda and machine.accelerator != "cpu"
    there = torch.cuda.device_count() if use_cuda else 1
    devices = there if machine.devices == "auto" else machine.devices
    if use_cuda and devices > there:
        raise ConfigError(f"machine.devices is {devices}, torch sees {there} CUDA device(s)")
    RunFolder(out, identity(run)).check()
    if (out / "result.json").exists():
        return None
    if is_torchelastic_launched():
        return _only_stop(_process(run, str(out), int(os.environ["LOCAL_WORLD_SIZE"]), console))
    if devices == 1 and machine.strategy != "fsdp":
        return _only_stop(_process(run, str(out), 1, console))
    return _launch(run, out, devices)


def _only_stop(answer: str | None) -> int | None:
    return signal.SIGINT if answer == STOPPED else None


def _launch(run: Run, out: Path, devices: int) -> int | None:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # A fork server imports once and forks for each process; it never touches a GPU, so its children may.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    if method == "forkserver":
        part = "images" if isinstance(run, ImageRun) else "language"
        multiprocessing.get_context(method).set_forkserver_preload(
            [
                "lightning.fabric",
                "torch.utils.tensorboard",
                f"chela_plugin.harness.train.{part}",
                "chela_plugin.lm.model",
            ]
        )
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        run_id="chela-train",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.2,
        start_method=method,
    )
    try:
        answers = elastic_launch(config, entrypoint=_process)(run, str(out), devices, None, os.getpid())
    except SignalException as stopped:
        return int(stopped.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise TrainingFailed(_failure(rank, failure, out)) from None
    return _only_stop(answers[0])


def _failure(rank: int, failure: Any, out: Path) -> str:
    """One sentence about the process that failed first."""
    code = failure.exitcode
    message = failure.message.get("message", "") if isinstance(failure.message, dict) else str(failure.message)
    known = message.partition(": ")
    if known[0] in ("ConfigError", "ResultsError", "Diverged", "MissingPackage"):
        return known[2]
    if code < 0:
        why = f"was killed by signal {-code}" + (", perhaps for want of memory" if code == -signal.SIGKILL else "")
    else:
        why = f"failed: {message or f'exit code {code}'}"
    return (
        f"process {rank} of the run {why}. The others were ended; what was saved is in {out}, and the same command "
        "goes on from there"
    )


def _process(
    run: Run, out: str, local_world: int, console: Console | None = None, launcher: int | None = None
) -> str | None:
    """Life of one process of a run; STOPPED where it was asked to stop. It saves and ends when `launcher` is gone."""
    import torch
    from lightning.fabric import Fabric

    from chela_plugin.harness import environment
    from chela_plugin.harness.train.flops import peak_flops
    from chela_plugin.harness.train.loop import train
    from chela_plugin.harness.train.show import display_for
    from chela_plugin.harness.workers import stop_on_signals

    alone = console is not None and local_world == 1
    asked: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        asked.append(number)  # more than one may come: the terminal's own, and the agent's

    if not alone:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, remember)
    if launcher is not None:
        threading.Thread(target=_follow, args=(launcher, asked), daemon=True).start()
    use_cuda = torch.cuda.is_available() and run.machine.accelerator != "cpu"
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    fabric = Fabric(
        accelerator="cuda" if use_cuda else "cpu",
        devices=local_world,
        num_nodes=nodes,
        strategy=_strategy(run, world),
        precision=run.precision,
    )
    with _quiet():
        fabric.launch()
    if run.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # time for nothing
    work: Any
    if isinstance(run, ImageRun):
        from chela_plugin.harness.train.images import ImageWork

        work = ImageWork(run, fabric)
    else:
        from chela_plugin.harness.train.language import LanguageWork

        work = LanguageWork(run, fabric)
    folder = RunFolder(Path(out), identity(run))
    main = fabric.global_rank == 0
    peak = peak_flops(environment.device_name(fabric.device), run.precision, run.machine.peak_tflops)
    display = display_for(console or Console(highlight=False), work.steps, work.unit)
    stop_signals = stop_on_signals() if alone else nullcontext()
    with folder if main else nullcontext(), display if main else nullcontext(), stop_signals as stop:
        fabric.barrier()  # the folder is this run's before anyone reads it
        if main:
            display.line(
                f"{work.parameters:,} parameters, {work.units_per_step:,} {work.unit} a step on {fabric.world_size} x "
                f"{environment.device_name(fabric.device)}; {work.flop_model} = {work.flops_per_unit:.3g} FLOP "
                f"a {work.unit.removesuffix('s')}" + ("" if peak else "; MFU unknown: set machine.peak_tflops")
            )
        try:
            train(work, run, folder, fabric, display, lambda: bool(asked) or bool(stop and stop.signal), peak)
        except Interrupted:
            if console is None:
                os._exit(0)  # all is on disk; an answer would wait for the agent, which waits for this process to end
            return STOPPED
        except Diverged as error:
            raise (TrainingFailed(str(error)) if alone else error) from None
        hidden = folder.path / ".model.part"
        found = work.finish(hidden)
        if main:
            for file in sorted(hidden.iterdir(), key=lambda f: f.suffix == ".json"):  # weights first, then the config
                os.replace(file, folder.path / file.name)
            hidden.rmdir()
            _result(folder, run, work, fabric, found)
    return None


def _follow(launcher: int, asked: list[int]) -> None:
    """Ask for a stop once the launcher was killed, since nobody else would; end what can't stop by itself."""
    while Path(f"/proc/{launcher}").exists() or not Path("/proc").exists():
        time.sleep(1)
    asked.append(signal.SIGTERM)
    time.sleep(30)
    os._exit(1)


def _result(folder: RunFolder, run: Run, work: Any, fabric: Any, found: dict[str, Any]) -> None:
    """result.json: the last reading of the validation split, where and with what."""
    import json

    import torch

    from chela_plugin.harness import environment
    from chela_plugin.harness.backbones import paths
    from chela_plugin.harness.results import write_atomically

    metrics: dict[str, Any] = {}
    rates: list[float] = []
    for line in (folder.path / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        metrics |= values
        rates += [v for k, v in values.items() if k.endswith("_per_second")]
    with fabric.autocast():  # some kernels take 16-bit inputs only
        path = paths(work.model, fabric.device)
    result = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": environment.versions(),
        "revision": environment.revision(),
        "device": environment.device_name(fabric.device),
        "devices": fabric.world_size,
        "path": path,
        "parameters": work.parameters,
        "flops": {"formula": work.flop_model, f"per_{work.unit.removesuffix('s')}": work.flops_per_unit},
        f"{work.unit}_per_second_median": sorted(rates)[len(rates) // 2] if rates else None,
        "peak_bytes": torch.cuda.max_memory_allocated() if fabric.device.type == "cuda" else None,
        "config": run.model_dump(mode="json"),
    }
    result |= {k: v for k, v in metrics.items() if k != "step"} | found
    write_atomically(folder.path / "result.json", (json.dumps(result, indent=1) + "\n").encode())


def _strategy(run: Run, world: int) -> Any:
    """What Fabric takes as its strategy."""
    timeout = timedelta(seconds=run.machine.timeout_seconds)
    if not isinstance(run, ImageRun) and run.machine.strategy == "fsdp":
        from chela_plugin.harness.train import language
        from chela_plugin.harness.train.tokens import streams

        return language.strategy(run, streams(run.data, run.context)[2], world)
    if world > 1:
        from lightning.fabric.strategies import DDPStrategy

        return DDPStrategy(timeout=timeout)
    return "auto"


class _quiet:
    """Fabric's banner of the process group would stand in the middle of our lines."""

    def __enter__(self) -> None:
        import logging

        self.loggers = [logging.getLogger(n) for n in ("lightning.fabric", "lightning.pytorch")]
        self.levels = [logger.level for logger in self.loggers]
        for logger in self.loggers:
            logger.setLevel(logging.WARNING)

    def __exit__(self, *exception: object) -> None:
        for logger, level in zip(self.loggers, self.levels, strict=True):
            logger.setLevel(level)
