"""What a training file may say: one language model or one image model, its data, its recipe. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from chela_plugin.harness import config as files
from chela_plugin.harness.config import ConfigError, Strict

Share = Annotated[float, Field(gt=0, lt=1)]


class Machine(Strict):
    """Where a run takes place. Changes no result but for the order in which sums are taken."""

    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int | Literal["auto"] = Field(
        "auto", description="processes of this machine, one a device; auto: every GPU, or one CPU process"
    )
    strategy: Literal["auto", "ddp", "fsdp"] = Field(
        "auto", description="auto: one process or ddp; fsdp shards weights, gradients and AdamW's moments"
    )
    micro_batch_size: int | None = Field(
        None, ge=1, description="examples a process handles at once; by default its share of batch_size, undivided"
    )
    peak_tflops: float | None = Field(
        None, gt=0, description="of one device at this precision, for MFU, where its name is not known"
    )
    timeout_seconds: float = Field(600, gt=0, description="until a collective that a process does not join is given up")

    @model_validator(mode="after")
    def _some_device(self) -> Machine:
        if self.devices != "auto" and self.devices < 1:
            raise ValueError(f"devices is auto or at least 1, got {self.devices}")
        return self


class Checkpoints(Strict):
    """When the state of a run is saved, beside its end and Ctrl-C. No part of the run's identity."""

    steps: int | None = Field(None, ge=1, description="optimiser steps between two")
    seconds: float | None = Field(600, gt=0, description="seconds between two, whatever the steps")


class TextData(Strict):
    """A text file, or every file under a folder, as bytes: a vocabulary of 256.

    Files follow one another by path, with a zero byte behind each.
    """

    kind: Literal["text"]
    path: Path
    pattern: str = Field("**/*", description="which files of a folder, as pathlib's glob")
    split: Literal["file", "range"] = Field("range", description="validation: whole files, or the last of all bytes")
    validation_share: Share = 0.05


class TokenData(Strict):
    """Tokens made elsewhere: raw little-endian integers (.bin), or one integer tensor of a .safetensors file."""

    kind: Literal["tokens"]
    path: Path
    vocab_size: int = Field(ge=2)
    dtype: Literal["uint16", "uint32"] = Field("uint16", description="of a .bin file")
    tensor: str = Field("tokens", description="name in a .safetensors file")
    validation_path: Path | None = Field(None, description="by default the last tokens of `path` are kept for it")
    validation_share: Share = 0.01


class LanguageModel(Strict):
    """Any causal language model that transformers' AutoConfig knows, fla's families and ours included."""

    model_type: str = Field("chela", description="as transformers and fla name it: chela, gla, transformer, llama")
    config: dict[str, Any] = Field(default_factory=dict, description="the config class's own arguments")
    gradient_checkpointing: bool = False


class LanguageRecipe(Strict):
    """AdamW, linear warmup then a cosine to a tenth, gradients clipped by norm."""

    steps: int = Field(ge=1, description="updates")
    batch_size: int = Field(ge=1, description="sequences an update, all devices and micro-batches together")
    learning_rate: float = Field(gt=0)
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.1, ge=0)
    gradient_clip: float = Field(1.0, gt=0)
    evaluate_every: int = Field(ge=1, description="updates between readings of the validation split")
    validation_sequences: int = Field(256, ge=1, description="the first so many of the split")

    @model_validator(mode="after")
    def _warmup_fits(self) -> LanguageRecipe:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be fewer than steps ({self.steps})")
        return self


class ImageData(Strict):
    """A folder with train/ and validation/ (or val/), one folder a class; or MNIST's four idx files, gzipped or not."""

    kind: Literal["folder", "idx"]
    path: Path
    workers: int = Field(4, ge=0, description="loader processes a device")


class ImageModel(Strict):
    """A model of timm's registry; chela_vit_* take `mixer` among the arguments."""

    name: str
    arguments: dict[str, Any] = Field(default_factory=dict, description="of timm.create_model, num_classes excepted")


class Augmentation(Strict):
    """timm's create_loader and Mixup; the names are theirs."""

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (0.75, 4 / 3)
    hflip: float = Field(0.5, ge=0, le=1)
    color_jitter: float | None = Field(0.3, ge=0)
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    interpolation: str = "bicubic"
    re_prob: float = Field(0.25, ge=0, le=1)
    re_mode: Literal["const", "rand", "pixel"] = "pixel"
    num_aug_repeats: int = Field(0, ge=0, description="repeated augmentation; needs more than one device in timm")
    mixup: float = Field(0.8, ge=0)
    cutmix: float = Field(1.0, ge=0)
    smoothing: float = Field(0.1, ge=0, lt=1)


class ImageRecipe(Strict):
    """timm's optimiser and scheduler factories, EMA and losses."""

    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1, description="images an update, all devices and micro-batches together")
    optimizer: str = "adamw"
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(0.05, ge=0)
    scheduler: str = "cosine"
    warmup_epochs: int = Field(5, ge=0)
    warmup_learning_rate: float = Field(1e-6, ge=0)
    min_learning_rate: float = Field(1e-5, ge=0)
    gradient_clip: float | None = Field(None, gt=0)
    ema_decay: float | None = Field(None, gt=0, lt=1, description="the averaged weights are the ones that are saved")
    evaluate_every: int = Field(1, ge=1, description="epochs between readings of the validation split")
    crop_pct: float = Field(0.875, gt=0, le=1)
    eval_sizes: list[Annotated[int, Field(ge=1)]] = Field(
        default_factory=list, description="image sizes at which the finished model is tested too"
    )

    @model_validator(mode="after")
    def _warmup_fits(self) -> ImageRecipe:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs ({self.warmup_epochs}) must be fewer than epochs ({self.epochs})")
        return self


class _Run(Strict):
    seed: int = Field(0, ge=0)
    precision: Literal["32-true", "bf16-mixed", "bf16-true"] = "32-true"
    deterministic: bool = Field(True, description="only deterministic algorithms, where torch has one")
    log_every: int = Field(10, ge=1, description="steps between two lines of metrics, and looks at the stop signal")
    machine: Machine = Field(default_factory=lambda: Machine.model_validate({}))
    checkpoints: Checkpoints = Field(default_factory=lambda: Checkpoints.model_validate({}))


class LanguageRun(_Run):
    """One language model, from text or tokens."""

    task: Literal["language"]
    data: Annotated[TextData | TokenData, Field(discriminator="kind")]
    context: int = Field(ge=8, description="tokens a sequence; the stream is cut into them, one behind the other")
    model: LanguageModel = Field(default_factory=lambda: LanguageModel.model_validate({}))
    training: LanguageRecipe


class ImageRun(_Run):
    """One image classifier."""

    task: Literal["images"]
    data: ImageData
    model: ImageModel
    augmentation: Augmentation = Field(default_factory=lambda: Augmentation.model_validate({}))
    training: ImageRecipe

    @model_validator(mode="after")
    def _ddp(self) -> ImageRun:
        if self.machine.strategy == "fsdp":
            raise ValueError("machine.strategy fsdp is for language models; image models train with ddp")
        return self


Run = LanguageRun | ImageRun


def shipped() -> dict[str, Path]:
    """Name -> path of the training files that come with the package."""
    with resources.as_file(resources.files("chela_plugin.configs").joinpath("train")) as path:
        return {file.stem: file for file in sorted(Path(path).glob("*.yaml"))}


def load_run(source: str | Path, overrides: Iterable[str] = ()) -> tuple[str, Run]:
    """Read a training file.

    Args:
        source: path of a YAML file, or the bare name of a shipped one ('bytes_small').
        overrides: 'dotted.key=value' with a YAML value ('training.steps=100', 'model.config.mixer=gla').

    Returns the file's stem and its config. Raises ConfigError.
    """
    known = shipped()
    path = known.get(str(source), Path(source))
    if not path.is_file():
        raise ConfigError(f"{str(source)!r} is no file and no shipped name; shipped: {', '.join(known)}")
    data = files._read(path)
    for override in overrides:
        # A section of the file's defaults may be left out of it; an override names it all the same.
        parent = override.partition("=")[0].split(".")[0]
        if parent in ("machine", "checkpoints", "augmentation", "model"):
            data.setdefault(parent, {})
        if override.startswith(("model.config.", "model.arguments.")) and isinstance(data["model"], dict):
            data["model"].setdefault(override.split(".")[1], {})
        files._override(data, override)
    kinds: dict[Any, type[LanguageRun] | type[ImageRun]] = {"language": LanguageRun, "images": ImageRun}
    if not isinstance(data.get("task"), str) or data["task"] not in kinds:
        raise ConfigError(f"{path}: task is language or images, got {files._shown(data.get('task'))}")
    try:
        return path.stem, TypeAdapter(kinds[data["task"]]).validate_python(data)
    except ValidationError as error:
        raise ConfigError(f"{path}:\n" + "\n".join(f"  {files._explain(e)}" for e in error.errors())) from None


def identity(run: Run) -> dict[str, Any]:
    """All of a run that its results depend on, but for the order of sums."""
    return run.model_dump(mode="json", exclude={"machine", "checkpoints", "log_every"})
