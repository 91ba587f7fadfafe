"""Presets: short names for specs worth naming, one YAML file each in `chela_plugin.configs`, folder mixers/."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

from chela_plugin.registry.errors import MixerSpecError
from chela_plugin.registry.grammar import MAX_LENGTH, parse


@dataclass(frozen=True)
class Preset:
    """`spec` is what the name stands for, `base` the mixer in it, `summary` one line on why it has a name."""

    spec: str
    base: str
    summary: str


@lru_cache(maxsize=1)
def presets() -> dict[str, Preset]:
    """Presets by name, the file's stem."""
    folder = files("chela_plugin.configs") / "mixers"
    found = sorted((file for file in folder.iterdir() if file.name.endswith(".yaml")), key=lambda file: file.name)
    return {file.name.removesuffix(".yaml"): read_preset(file.name, file.read_text("utf-8")) for file in found}


def read_preset(file: str, text: str) -> Preset:
    """The preset that a YAML text holds: `spec`, one mixer in the grammar, and `summary`. Raises MixerSpecError."""
    import yaml

    form = f"the preset {file} must hold two strings, spec and summary"
    if len(text) > MAX_LENGTH:
        raise MixerSpecError(f"{form}, of at most {MAX_LENGTH} characters")
    try:
        entry = yaml.load(text, Loader=yaml.BaseLoader)  # strings, lists and mappings only
    except (yaml.YAMLError, RecursionError, TypeError) as error:  # TypeError: a mapping as a key
        raise MixerSpecError(f"{form}; it can't be read: {error}") from None
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("spec", "summary")):
        raise MixerSpecError(form)
    terms = parse(entry["spec"])
    if len(terms) > 1 or terms[0].count > 1:
        raise MixerSpecError(f"the preset {file} stands for one mixer, not for a pattern", entry["spec"], 0)
    return Preset(entry["spec"], terms[0].spec.name, entry["summary"])
