"""Long Range Arena's tasks (Tay et al., arXiv:2011.04006): three generated, three read from the user's copy."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from chela_plugin.harness.task_configs.base import TaskConfig


class ListOpsTask(TaskConfig):
    """Nested MIN, MAX, MED and SM of digits; the value is one of ten classes; accuracy."""

    backbone_kind: ClassVar[str] = "sequence"
    module: ClassVar[str] = "lra_listops"
    generated: ClassVar[bool] = True
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


class PathfinderTask(TaskConfig):
    """Whether two dots are on one dashed curve, LRA's hard split; accuracy."""

    backbone_kind: ClassVar[str] = "sequence"
    module: ClassVar[str] = "lra_pathfinder"
    generated: ClassVar[bool] = True
    task: Literal["pathfinder"]
    size: Literal[32, 128] = Field(32, description="pixels a side: Pathfinder-32, or Path-X")
    distractors: int = Field(5, ge=0, description="short curves besides the two long ones; LRA: 5 at 32, 8 at 128")
    examples: int = Field(200_000, ge=10, description="in all; 80 % train, 10 % validation, 10 % test")
    inputs: Literal["tokens", "signal"] = Field("tokens", description="grey levels as 256 tokens, or one channel")
    data_seed: int = Field(0, ge=0, description="of the data; equal for all runs")


class TextTask(TaskConfig):
    """Whether a film review is positive, from its bytes; accuracy."""

    backbone_kind: ClassVar[str] = "sequence"
    module: ClassVar[str] = "lra_text"
    task: Literal["lra_text"]
    path: str = Field("data/aclImdb_v1.tar.gz", description="the archive as published, or its folder aclImdb")
    max_length: int = Field(4096, ge=1, description="bytes of a review")


class RetrievalTask(TaskConfig):
    """Whether one of two papers cites the other, from their bytes; accuracy."""

    backbone_kind: ClassVar[str] = "sequence"
    module: ClassVar[str] = "lra_retrieval"
    task: Literal["lra_retrieval"]
    path: str = Field("data/lra_release/lra_release/tsv_data", description="folder of LRA's new_aan_pairs.*.tsv")
    max_length: int = Field(4000, ge=1, description="bytes of each text")


class ImageTask(TaskConfig):
    """CIFAR-10 in grey, pixel by pixel; accuracy."""

    backbone_kind: ClassVar[str] = "sequence"
    module: ClassVar[str] = "lra_image"
    task: Literal["lra_image"]
    path: str = Field("data/cifar-10-binary.tar.gz", description="the archive as published, or its folder")
    inputs: Literal["tokens", "signal"] = Field("tokens", description="grey levels as 256 tokens, or one channel")


TASKS: tuple[type[TaskConfig], ...] = (ListOpsTask, PathfinderTask, TextTask, RetrievalTask, ImageTask)
