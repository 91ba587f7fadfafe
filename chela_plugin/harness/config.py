"""What an ablation file may say: pydantic models over plain YAML, with dotted overrides. Imports no torch."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

import yaml
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from chela_plugin.harness.task_configs import builtin, lra, sequences, synthetic
from chela_plugin.harness.task_configs.base import ConfigError, DataError, Strict, TaskConfig

__all__ = [
    "Ablation",
    "Backbone",
    "ConfigError",
    "DataError",
    "LanguageBackbone",
    "SequenceBackbone",
    "Strict",
    "Task",
    "TaskConfig",
    "Training",
    "VisionBackbone",
    "canonical_json",
    "digest",
    "identity",
    "is_override",
    "load_ablation",
    "load_task",
    "shipped",
]


if TYPE_CHECKING:
    Task = TaskConfig  # mypy can't follow a union that is made from lists
else:
    TASKS = builtin.TASKS + synthetic.TASKS + sequences.TASKS + lra.TASKS
    Task = Annotated[Union[TASKS], Field(discriminator="task")]  # noqa: UP007  # made from a tuple


class VisionBackbone(Strict):
    """`chela_vit` of these sizes, at the task's own image size."""

    kind: Literal["vision"]
    dim: int = Field(64, ge=8)
    depth: int = Field(4, ge=1)
    patch_size: int = Field(1, ge=1)
    mlp_hidden: int = Field(256, ge=1, description="of the baseline; the other mixers' is searched for")
    weight_init: Literal["", "reset"] = Field(
        "", description="of all but the mixers: timm's default (std 0.02, meant for widths from 192) or torch's own"
    )


class LanguageBackbone(Strict):
    """`ChelaForCausalLM` over the task's own vocabulary."""

    kind: Literal["language"]
    dim: int = Field(128, ge=8)
    depth: int = Field(2, ge=1)
    mlp_hidden: int = Field(341, ge=1, description="of the baseline; the other mixers' is searched for")


class SequenceBackbone(Strict):
    """Blocks of `ChelaForCausalLM` over tokens or signals, pooled to one answer a sequence."""

    kind: Literal["sequence"]
    dim: int = Field(128, ge=8)
    depth: int = Field(2, ge=1)
    mlp_hidden: int = Field(341, ge=1, description="of the baseline; the other mixers' is searched for")
    causal: bool = Field(False, description="whether a mixer sees only what came before")
    pooling: Literal["first", "last", "mean"] = Field("mean", description="of the tokens that are no padding")
    positions: Literal["none", "sinusoidal"] = Field("none", description="added to the embedding; no parameters")


Backbone = Annotated[VisionBackbone | LanguageBackbone | SequenceBackbone, Field(discriminator="kind")]


class Training(Strict):
    """The recipe, the same for every mixer: AdamW, linear warmup then cosine to a tenth, gradient norm clipped."""

    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.05, ge=0)
    gradient_clip: float = Field(1.0, gt=0)
    evaluate_every: int = Field(ge=1, description="steps between readings of the validation split")
    accelerator: Literal["cpu", "cuda", "auto"] = "auto"
    threads: int = Field(1, ge=1, description="CPU threads a run; runs side by side scale better than threads")
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    cuda_graph: bool = Field(True, description="replay steps on a GPU: the same launches, so no part of identity")

    @model_validator(mode="after")
    def _warmup_fits(self) -> Training:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be fewer than steps ({self.steps})")
        return self


class Ablation(Strict):
    """tasks x mixers x learning rates x seeds on one backbone."""

    tasks: list[Task] = Field(min_length=1)
    mixers: list[str] = Field(min_length=1)
    baseline: str = Field(description="the mixer whose parameter count the others match and are compared with")
    backbone: Backbone
    training: Training
    learning_rates: list[Annotated[float, Field(gt=0)]] = Field(min_length=1)
    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    parameter_tolerance: float = Field(0.02, gt=0, lt=1)
    checkpoint_seconds: float = Field(30.0, ge=0, description="between checkpoints of a run; no part of its identity")

    @model_validator(mode="after")
    def _cells_differ(self) -> Ablation:
        grid: tuple[tuple[str, list[Any]], ...] = (
            ("mixers", self.mixers),
            ("seeds", self.seeds),
            ("learning_rates", self.learning_rates),
            ("tasks", [task.task for task in self.tasks]),
        )
        for key, values in grid:
            twice = sorted({str(v) for v in values if values.count(v) > 1})
            if twice:
                raise ValueError(f"{key} holds {', '.join(twice)} more than once: two cells would collide")
        if self.baseline not in self.mixers:
            raise ValueError(f"baseline {self.baseline!r} is not one of the mixers: {', '.join(self.mixers)}")
        for task in self.tasks:
            if self.backbone.kind not in task.backbone_kind.split():
                wanted = task.backbone_kind.replace(" ", " or ")
                raise ValueError(
                    f"task {task.task!r} needs backbone.kind: {wanted}, the file says {self.backbone.kind}"
                )
        return self


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces. Two equal configs have equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """The first 16 hex digits of the SHA-256 of `canonical_json(value)`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


def identity(ablation: Ablation) -> dict[str, Any]:
    """All of an ablation that its results depend on."""
    return ablation.model_dump(mode="json", exclude={"checkpoint_seconds": True, "training": {"cuda_graph"}})


def shipped(folder: Literal["ablations", "tasks"]) -> dict[str, Path]:
    """Name -> path of the YAML files that come with the package."""
    files = resources.files("chela_plugin.configs").joinpath(folder)
    with resources.as_file(files) as path:
        return {file.stem: file for file in sorted(Path(path).glob("*.yaml"))}


def load_ablation(source: str | Path, overrides: Iterable[str] = ()) -> tuple[str, Ablation]:
    """Read an ablation.

    Args:
        source: path of a YAML file, or the bare name of a shipped one ('digits').
        overrides: 'dotted.key=value' with a YAML value; list items by number ('tasks.0.max_shift=0').

    Returns the ablation's name (the file's stem) and its config. Raises ConfigError.
    """
    path = _find(str(source), "ablations")
    data = _read(path)
    for _ in range(2):  # twice: an override may name tasks, and another a key of a task that was given by name
        for override in overrides:
            _override(data, override)
        tasks = data.get("tasks")
        if isinstance(tasks, list):
            data["tasks"] = [_read(_find(task, "tasks")) if isinstance(task, str) else task for task in tasks]
        overrides = [text for text in overrides if not text.startswith("tasks=")]
    try:
        return path.stem, Ablation.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{path}:\n" + "\n".join(f"  {_explain(e)}" for e in error.errors())) from None


def load_task(source: str | Path, overrides: Iterable[str] = ()) -> TaskConfig:
    """Read one task: a YAML file or the bare name of a shipped one ('bytes'), with overrides as in `load_ablation`.

    Raises ConfigError.
    """
    path = _find(str(source), "tasks")
    data = _read(path)
    for override in overrides:
        _override(data, override)
    try:
        return TypeAdapter(Task).validate_python(data)
    except ValidationError as error:
        raise ConfigError(f"{path}:\n" + "\n".join(f"  {_explain(e)}" for e in error.errors())) from None


def is_override(text: str) -> bool:
    """Whether a command-line word is 'dotted.key=value' and not a file."""
    return re.match(r"[A-Za-z_]\w*(\.\w+)*=", text) is not None


def _find(name: str, folder: Literal["ablations", "tasks"]) -> Path:
    known = shipped(folder)
    if name in known:
        return known[name]
    path = Path(name)
    try:
        if path.is_file():
            return path
    except (OSError, ValueError):  # no name that a file could have: too long, or with a null character
        pass
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"shipped {folder}: {', '.join(known) or 'none'}"
    raise ConfigError(f"{_shown(name)} is no file and no shipped name; {hint}")


MAX_CONFIG_BYTES = 65_536  # PyYAML reads about 100 KB a second, and an ablation is 2
MAX_CONFIG_VALUES = 10_000  # with every alias written out
MAX_CONFIG_INT = 2**63 - 1
MAX_CONFIG_NESTING = 100  # levels; PyYAML's time grows with their square


class _ConfigLoader(yaml.SafeLoader):
    """Plain data within bounds, and no key twice: PyYAML keeps the last of two equal keys in silence.

    Aliases count as what they stand for. Ten anchors of ten aliases each are ten billion values once something
    walks over them, if only to show them in an error.
    """

    def fetch_flow_collection_start(self, token_class: type) -> None:
        self._check_nesting()
        super().fetch_flow_collection_start(token_class)

    def add_indent(self, column: int) -> bool:
        self._check_nesting()
        return super().add_indent(column)

    def _check_nesting(self) -> None:
        if self.flow_level + len(self.indents) >= MAX_CONFIG_NESTING:
            reason = f"it nests too deep, more than {MAX_CONFIG_NESTING} levels"
            raise yaml.scanner.ScannerError(None, None, reason, self.get_mark())

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            self._count(node, {})
        return node

    def _count(self, node: yaml.Node, known: dict[int, int]) -> int:
        if id(node) in known:
            size = known[id(node)]  # 0 while the node's own parts are counted
            if not size:
                raise yaml.composer.ComposerError(None, None, "an alias of what it is a part of", node.start_mark)
            return size
        known[id(node)] = 0
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        size = 1
        for part in parts:
            size += sum(self._count(n, known) for n in (part if isinstance(part, tuple) else (part,)))
        if size > MAX_CONFIG_VALUES:
            raise yaml.composer.ComposerError(None, None, f"more than {MAX_CONFIG_VALUES:,} values", node.start_mark)
        known[id(node)] = size
        return size

    def construct_bounded_int(self, node: yaml.ScalarNode) -> int:
        value = self.construct_yaml_int(node)
        if abs(value) > MAX_CONFIG_INT:
            raise yaml.constructor.ConstructorError(None, None, "a whole number has at most 64 bits", node.start_mark)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.add(key if isinstance(key, str) else id(key_node))
        return super().construct_mapping(node, deep)


_ConfigLoader.add_constructor("tag:yaml.org,2002:int", _ConfigLoader.construct_bounded_int)


def _load(text: str) -> Any:
    """The data of a YAML text. Raises ValueError with the reason and the place."""
    try:
        return yaml.load(text, Loader=_ConfigLoader)
    except RecursionError:
        raise ValueError("it nests too deep") from None
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        # What PyYAML's constructors let through for `!!bool 3`, `2001-99-99` or 5,000 digits.
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from None
    if len(content) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path} is no configuration: it is longer than {MAX_CONFIG_BYTES:,} bytes")
    try:
        data = _load(content.decode())
    except ValueError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values, found {type(data).__name__}")
    return data


def _override(data: dict[str, Any], text: str) -> None:
    key, _, value = text.partition("=")
    *parents, last = key.split(".")
    try:
        parsed = _load(value)
    except ValueError as error:
        raise ConfigError(f"override {text!r}: the value is not valid YAML: {error}") from None
    place: Any = data
    for i, part in enumerate(parents):
        if isinstance(place, str):
            return  # a task that is still a name; it is read next, and the override applied again
        try:
            place = place[int(part)] if isinstance(place, list) else place[part]
        except (KeyError, IndexError, ValueError, TypeError):
            known = ", ".join(place) if isinstance(place, dict) else f"0 to {len(place) - 1}" if place else "nothing"
            raise ConfigError(f"override {text!r}: no {'.'.join(parents[: i + 1])!r}; there is {known}") from None
    if isinstance(place, str):
        return
    if isinstance(place, dict):
        place[last] = parsed
    elif isinstance(place, list) and last.isdigit() and int(last) < len(place):
        place[int(last)] = parsed
    else:
        raise ConfigError(f"override {text!r}: {'.'.join(parents)!r} has no {last!r}")


def _explain(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    given = "" if error["type"] in ("value_error", "missing") else f" (got {_shown(error['input'])})"
    return f"{where}: {message}{given}" if where else message + given


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
