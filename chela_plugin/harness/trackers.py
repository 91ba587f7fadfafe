"""Where a run's curves go while it trains: TensorBoard always, other trackers through their own packages when asked.

The JSON lines stay the source of every table; a tracker is for looking on.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chela_plugin.harness.config import ConfigError, digest
from chela_plugin.harness.extras import MissingPackage
from chela_plugin.harness.grid import Cell
from chela_plugin.harness.results import unwritable

TRACKERS = ("wandb", "trackio")
PROJECT = "chela"


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError for a name that is none of TRACKERS, MissingPackage with the pip line."""
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"--track {name!r} is not known; choose from {', '.join(TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise MissingPackage(f"--track {name}: {name} is not installed; run: pip install {name}")


class Curves:
    """One run's scalars, sent to TensorBoard and to the trackers asked for. Use as a context manager.

    Raises ResultsError where TensorBoard's file can't be written (a full disk), ConfigError where a tracker can't
    start (nobody is logged in). A tracker that fails later is dropped with a warning: no run is lost for a picture.
    """

    def __init__(self, folder: Path, cell: Cell, config: dict[str, Any], trackers: Sequence[str]):
        self.folder, self.cell, self.config, self.trackers = folder, cell, config, trackers
        self.runs: dict[str, Any] = {}

    def __enter__(self) -> Curves:
        from torch.utils.tensorboard import SummaryWriter

        path = self.folder / "tensorboard" / self.cell.ablation / self.cell.task / self.cell.id
        try:
            self.board = SummaryWriter(str(path))
            self.board.add_text("run", str(self.cell))
        except OSError as error:
            raise unwritable(path, error) from error
        for name in self.trackers:
            try:
                self.runs[name] = self._start(name)
            except Exception as error:
                self._close()
                raise ConfigError(
                    f"{name} could not start ({type(error).__name__}: {error}); mend it, or leave out --track {name}"
                ) from error
        return self

    def _start(self, name: str) -> Any:
        """A run of the tracker; the same cell goes on in the same one."""
        package = importlib.import_module(name)
        run: dict[str, Any] = {"project": PROJECT, "group": f"{self.cell.ablation}/{self.cell.task}", "resume": "allow"}
        run |= {"config": {**vars(self.cell), "ablation_config": self.config}}
        # Cells of two folders may be equal; their curves are not one run.
        key = f"{self.cell.id}-{digest(str(self.folder.resolve()))[:6]}"
        if name == "wandb":  # told apart by id, shown by name
            return package.init(**run, id=key, name=str(self.cell), dir=str(self.folder))
        return package.init(**run, name=f"{self.cell} | {key}")  # trackio tells runs apart by name

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Values after `step` steps."""
        try:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
        except OSError as error:  # raised late: TensorBoard writes in a thread of its own
            raise unwritable(Path(self.board.log_dir), error) from error
        for name in list(self.runs):
            try:
                self.runs[name].log(values, step=step)
            except Exception as error:
                del self.runs[name]
                warnings.warn(f"{name} fails ({type(error).__name__}: {error}); this run goes on without", stacklevel=2)

    def __exit__(self, *_: object) -> None:
        try:
            self._close()
        except OSError as error:
            raise unwritable(Path(self.board.log_dir), error) from error

    def _close(self) -> None:
        for name, run in self.runs.items():
            try:
                run.finish()
            except Exception as error:
                warnings.warn(f"{name} could not finish ({type(error).__name__}: {error})", stacklevel=2)
        self.board.close()
