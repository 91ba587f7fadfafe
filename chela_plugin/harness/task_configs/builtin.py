"""Tasks on data that every installation has: scikit-learn's digits, Python's own library as text."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from chela_plugin.harness.task_configs.base import TaskConfig


class DigitsTask(TaskConfig):
    """scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, 10 classes; accuracy."""

    backbone_kind: ClassVar[str] = "vision"
    module: ClassVar[str] = "digits"
    packages: ClassVar[tuple[tuple[str, str], ...]] = (("sklearn", "harness"),)
    task: Literal["digits"]
    max_shift: int = Field(1, ge=0, le=3, description="training images move by up to this many pixels, per axis")
    split_seed: int = Field(0, ge=0, description="of the stratified 60/20/20 split; equal for all runs")


class BytesTask(TaskConfig):
    """Text as bytes, by default the running Python's own standard library; bits per byte. No file is in two splits."""

    backbone_kind: ClassVar[str] = "language"
    module: ClassVar[str] = "byte_text"
    task: Literal["bytes"]
    path: str | None = Field(None, description="a text file, or a folder all of whose files are read")
    context: int = Field(256, ge=8, description="bytes a sequence")
    train_bytes: int = Field(2_000_000, ge=1)
    validation_bytes: int = Field(65_536, ge=1)
    test_bytes: int = Field(131_072, ge=1)


TASKS: tuple[type[TaskConfig], ...] = (DigitsTask, BytesTask)
