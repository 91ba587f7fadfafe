"""What all sections of a harness file share: unknown keys are errors, and a task says where its data comes from."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator


class ConfigError(ValueError):
    """An ablation or task file that can't be used; the message names the file, the key and the remedy."""


class DataError(ConfigError):
    """Data that a task reads is missing or damaged; the message says what to get from where, and where to put it."""


class Strict(BaseModel):
    """A section of the file. An unknown key is an error that names the nearest known one."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for key in data:
                if key not in cls.model_fields:
                    near = difflib.get_close_matches(str(key), cls.model_fields, n=1)
                    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(cls.model_fields)}"
                    raise ValueError(f"unknown key {key!r}; {hint}")
        return data


class TaskConfig(Strict):
    """A task. Its class says on which kind of backbone it runs, and which module makes its tensors.

    backbone_kind: 'vision', 'language' or 'sequence'; several with a space between.
    module: dotted name under `chela_plugin.harness.tasks`.
    packages: (package, extra) pairs that must be installed for it.
    generated: whether its examples are made by rule and kept in the cache.
    """

    backbone_kind: ClassVar[str]
    module: ClassVar[str]
    packages: ClassVar[tuple[tuple[str, str], ...]] = ()
    generated: ClassVar[bool] = False
    task: str
