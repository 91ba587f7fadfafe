"""Long Range Arena's tasks (Tay et al., arXiv:2011.04006): three generated, three read from the user's copy."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from chela_plugin.harness.task_configs.base import TaskConfig


class ListOpsTask(TaskConfig):
    """Nested MIN, MAX, MED and SM of digits; the value is one of ten classes; accuracy."""

    backbone_kind: ClassVar[str] = "sequence"
    module: ClassVar[str] = "lra_listops"
    task: Literal["listops"]
    max_depth: int = Field(10, ge=2)
    max_args: int = Field(10, ge=2)
    min_length: int = Field(500, ge=0, description="tokens; lists are longer than this")
    max_length: int = Field(2000, ge=2, description="tokens; lists are shorter than this")
    train_examples: int = Field(96_000, ge=1)
    validation_examples: int = Field(2_000, ge=1)
    test_examples: int = Field(2_000, ge=1)
    data_seed: int = Field(0, ge=0, description="of the data; equal for all runs")

    @model_validator(mode="after")
    def _lengths_differ(self) -> ListOpsTask:
        if self.min_length + 1 >= self.max_length:
            raise ValueError(f"no list is longer than min_length ({self.min_length}) and shorter than max_length")
        return self


TASKS: tuple[type[TaskConfig], ...] = (ListOpsTask,)
