"""What a mixer string means: `MixerSpec` (one mixer) and `Pattern` (a mixer for every block of a model)."""

from __future__ import annotations

import keyword
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Union

from chela_plugin.registry import grammar
from chela_plugin.registry.errors import MixerSpecError

Value = Union[int, float, bool, str, None, tuple, "MixerSpec"]

NATIVE = "native"  # the host model's own mixer


class MixerSpec:
    """One mixer: a name and its options. Immutable; two specs are equal when their canonical strings are.

    `str(spec)` is canonical (options in alphabetical order, a lone `mixer` option without its key) and parses back to
    an equal spec. A word and a spec without options are spelt alike; the factory's annotation decides which is meant.

    Args:
        name: an ASCII identifier.
        options: key to int (64 bits), float (finite), bool, None, str, tuple of these, or MixerSpec.

    Raises MixerSpecError for a name, key or value that no mixer string can spell.
    """

    name: str
    options: Mapping[str, Value]

    def __init__(self, name: str, options: Mapping[str, Value] | None = None):
        if not is_word(name):
            raise MixerSpecError(f"a mixer's name is one word of ASCII letters, digits and _, got {name!r}")
        for key in options or {}:
            if not is_word(key):
                raise MixerSpecError(f"an option of {name} is one word of ASCII letters, digits and _, got {key!r}")
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "options", MappingProxyType(dict(sorted((options or {}).items()))))
        grammar.scan(str(self))  # the bounds on length and nesting

    @classmethod
    def parse(cls, text: str, *, check: bool = True) -> MixerSpec:
        """The spec that `text` spells.

        With `check`, the name must be known (a preset is replaced by what it stands for) and the options must fit the
        factory's signature, for which the mixer's module is imported. Without, only the grammar is looked at.

        Raises:
            MixerSpecError: not in the grammar, a pattern of several mixers, an unknown or wrongly typed option.
            UnknownMixerError: nobody declares the name.
            MixerUnavailableError: the mixer is declared but its package or extra is missing.
        """
        terms = grammar.parse(text)
        if len(terms) > 1 or terms[0].count > 1:
            raise MixerSpecError("expected one mixer, found a pattern of several", text, 0)
        return read(terms[0].spec, text, check)

    @cached_property
    def text(self) -> str:
        """The canonical string."""
        if not self.options:
            return self.name
        inner = self.options.get(grammar.DEFAULT_KEY)
        positional = isinstance(inner, MixerSpec) or (isinstance(inner, str) and is_word(inner))
        parts = [spell(inner)] if positional else []
        parts += [f"{k}={spell(v)}" for k, v in self.options.items() if not (positional and k == grammar.DEFAULT_KEY)]
        return f"{self.name}({', '.join(parts)})"

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"MixerSpec.parse({self.text!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MixerSpec) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __setattr__(self, key: str, value: object) -> None:
        raise AttributeError(f"a MixerSpec is immutable; build another one to change {key}")

    def __delattr__(self, key: str) -> None:
        raise AttributeError(f"a MixerSpec is immutable; build another one to leave out {key}")

    def __reduce__(self):
        return MixerSpec, (self.name, dict(self.options))


@dataclass(frozen=True)
class Pattern:
    """Mixers for the blocks of a model, in block order: `(count, spec)` terms, repeated until the depth is filled."""

    terms: tuple[tuple[int, MixerSpec], ...]

    def expand(self, depth: int) -> list[MixerSpec]:
        """One spec a block; the last repetition is cut where the depth ends. Raises ValueError unless depth >= 1."""
        if not isinstance(depth, int) or isinstance(depth, bool) or depth < 1:
            raise ValueError(f"depth is a whole number of blocks, at least 1, got {depth!r}")
        specs: list[MixerSpec] = []
        while len(specs) < depth:
            for count, spec in self.terms:
                specs += [spec] * min(count, depth - len(specs))
        return specs

    def __str__(self) -> str:
        return " + ".join(str(spec) if count == 1 else f"{count}*{spec}" for count, spec in self.terms)


def parse_pattern(text: str, *, check: bool = True) -> Pattern:
    """The pattern that `text` spells, `3*chela + attention`; one mixer alone is a pattern too.

    `native` stands for the host model's own mixer. `check` and errors as for `MixerSpec.parse`.
    """
    return Pattern(tuple((term.count, read(term.spec, text, check)) for term in grammar.parse(text)))


def read(node: grammar.SpecNode, text: str, check: bool) -> MixerSpec:
    if check:
        from chela_plugin.registry.resolve import resolve  # needs MixerSpec: a cycle at import

        return resolve(node, text)
    return MixerSpec(node.name, {option.key: plain(option.value) for option in node.options})


def plain(node: grammar.ValueNode) -> Value:
    """The value as the grammar alone understands it."""
    if isinstance(node.value, grammar.SpecNode):
        return MixerSpec(node.value.name, {option.key: plain(option.value) for option in node.value.options})
    return tuple(plain(item) for item in node.value) if isinstance(node.value, tuple) else node.value


def is_word(text: object) -> bool:
    return isinstance(text, str) and text.isascii() and text.isidentifier() and not keyword.iskeyword(text)


def spell(value: Value) -> str:
    """A value as a mixer string spells it."""
    if isinstance(value, MixerSpec):
        return str(value)
    if value is None or type(value) is bool:
        return repr(value)
    if type(value) is int and abs(value) <= grammar.MAX_INT:
        return repr(value)
    if type(value) is float and math.isfinite(value):
        return repr(value)
    if type(value) is str:
        return value if is_word(value) else repr(value)
    if type(value) is tuple:
        return f"({', '.join(spell(item) for item in value)}{',' if len(value) == 1 else ''})"
    raise MixerSpecError(
        f"an option is a finite number, True, False, None, a str, a tuple of these or a MixerSpec, got {value!r}"
    )
