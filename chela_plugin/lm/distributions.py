"""Which installed package a model's mixers come from, kept in its config: whoever loads it elsewhere is told what to
install."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from chela_plugin.registry import MixerSpec, Pattern, UnknownMixerError, parse_pattern
from chela_plugin.registry.installed import declarations, known_names

OURS = "chela-plugin"
NOWHERE = ""  # registered by the program itself, with register_mixer


def distributions(pattern: Pattern) -> dict[str, str]:
    """Mixer name to distribution, for the mixers of `pattern` that are not ours."""
    declared = declarations()
    sources = {
        name: declared[name][0].source if name in declared else NOWHERE
        for _, spec in pattern.terms
        for name in names(spec)
        if name != "native"
    }
    return {name: source for name, source in sorted(sources.items()) if source != OURS}


def parse_saved(text: str, saved: Mapping[str, str] | None) -> Pattern:
    """`parse_pattern(text)`, where `saved` is what `distributions` said when the string was saved.

    Raises as `parse_pattern`; the error about a mixer that is not installed here says what to install.
    """
    try:
        return parse_pattern(text)
    except UnknownMixerError as error:
        missing = {name for _, spec in parse_pattern(text, check=False).terms for name in names(spec)}
        remedies = [remedy(name, (saved or {})[name]) for name in sorted(missing - {*known_names()} & {*(saved or {})})]
        if not remedies:
            raise
        message = "\n".join(f"{line}; its weights would be lost without it" for line in remedies)
        raise UnknownMixerError(message, error.text, error.column) from error


def remedy(name: str, source: str) -> str:
    if source == NOWHERE:
        return f"mixer '{name}' was made known with register_mixer by the program that saved this model: do so here too"
    return f"mixer '{name}' comes with the distribution {source}, which is not installed: pip install {source}"


def names(value: Any) -> Iterator[str]:
    """Names of all mixers in a spec, those in its options included."""
    if isinstance(value, MixerSpec):
        yield value.name
        for option in value.options.values():
            yield from names(option)
    elif isinstance(value, tuple):
        for item in value:
            yield from names(item)
