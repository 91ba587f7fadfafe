"""Presets: short names for specs worth naming, one YAML file each in `chela_plugin.configs`, folder mixers/."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files


@dataclass(frozen=True)
class Preset:
    """`spec` is what the name stands for, `base` the mixer in it, `summary` one line on why it has a name."""

    spec: str
    base: str
    summary: str


@lru_cache(maxsize=1)
def presets() -> dict[str, Preset]:
    """Presets by name, the file's stem."""
    import yaml

    found = {}
    for file in sorted((files("chela_plugin.configs") / "mixers").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".yaml"):
            entry = yaml.safe_load(file.read_text(encoding="utf-8"))
            spec = entry["spec"]
            found[file.name.removesuffix(".yaml")] = Preset(
                spec, re.split(r"\W", spec, maxsplit=1)[0], entry["summary"]
            )
    return found
