"""Real signals: images whole or pixel by pixel, spoken words sample by sample."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from chela_plugin.harness.task_configs.base import TaskConfig


class PixelsTask(TaskConfig):
    """Images read pixel by pixel, row after row; 10 classes, accuracy."""

    backbone_kind: ClassVar[str] = "sequence"
    module: ClassVar[str] = "pixels"
    packages: ClassVar[tuple[tuple[str, str], ...]] = (("sklearn", "harness"),)
    task: Literal["pixels"]
    source: Literal["digits", "idx"] = Field("digits", description="scikit-learn's, or files as MNIST ships them")
    path: str | None = Field(None, description="folder of the four idx files, .gz or not; for source: idx")
    validation_images: int = Field(5000, ge=1, description="of the idx training files, held out")
    split_seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _path_where_needed(self) -> PixelsTask:
        if (self.source == "idx") != (self.path is not None):
            raise ValueError("path goes with source: idx, and source: idx needs it")
        return self


class ImagesTask(TaskConfig):
    """Grey images from files as MNIST ships them, such as Fashion-MNIST's; 10 classes, accuracy."""

    backbone_kind: ClassVar[str] = "vision"
    module: ClassVar[str] = "images"
    task: Literal["images"]
    path: str = Field(description="folder of the four idx files, .gz or not")
    size: int = Field(32, ge=8, description="pixels a side, to which the images are resized")
    other_sizes: tuple[Annotated[int, Field(ge=8)], ...] = Field((), description="at which the test is read as well")
    max_shift: int = Field(2, ge=0, le=8, description="training images move by up to this many pixels, per axis")
    flip: bool = Field(True, description="half of the training images, left to right")
    validation_images: int = Field(5000, ge=1, description="of the training files, held out")
    split_seed: int = Field(0, ge=0)


class SpeechCommandsTask(TaskConfig):
    """Spoken words as raw audio, one second at 16 kHz; accuracy."""

    backbone_kind: ClassVar[str] = "sequence"
    module: ClassVar[str] = "speech_commands"
    task: Literal["speech_commands"]
    path: str = Field(description="the unpacked archive: a folder a word, validation_list.txt, testing_list.txt")
    words: tuple[str, ...] = Field((), description="the classes; none: every folder but _background_noise_")
    samples: int = Field(16_000, ge=1, description="a recording is cut or padded with silence to this length")


TASKS: tuple[type[TaskConfig], ...] = (PixelsTask, ImagesTask, SpeechCommandsTask)
