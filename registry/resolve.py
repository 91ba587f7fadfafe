"""From a parsed string to a checked `MixerSpec`: the name is known, a preset unfolded, every option fits."""

from __future__ import annotations

import difflib
from dataclasses import replace

from chela_plugin.registry import grammar
from chela_plugin.registry.errors import MixerSpecError, UnknownMixerError
from chela_plugin.registry.installed import known_names, load
from chela_plugin.registry.presets import presets
from chela_plugin.registry.signature import OptionError, check_options
from chela_plugin.registry.spec import NATIVE, MixerSpec, Value


def resolve(node: grammar.SpecNode, text: str) -> MixerSpec:
    """The checked spec of `node`, which was parsed from `text`; errors as `MixerSpec.parse` lists them."""
    if node.name == NATIVE:
        if node.options:
            raise MixerSpecError("'native' is the host model's own mixer and takes no options", text, node.column)
        return MixerSpec(NATIVE)
    return resolve_mixer(node, text)


def resolve_mixer(node: grammar.SpecNode, text: str) -> MixerSpec:
    node = unfold(node)
    names = known_names()
    if node.name not in names:
        raise UnknownMixerError(unknown(node.name, names), text, node.column)
    factory = load(node.name)
    columns = {option.key: option.column for option in node.options}
    options = {option.key: resolve_value(option.value, text) for option in node.options}
    try:
        checked = check_options(node.name, factory, options)
    except OptionError as error:
        column = node.column if error.key is None else columns[error.key]
        raise MixerSpecError(str(error), text, column) from error.__cause__
    for key, value in checked.items():
        if value is not options[key]:  # words that the annotation turned to mixers are checked as mixers
            checked[key] = recheck(value, text, columns[key])
    return MixerSpec(node.name, checked)


def resolve_value(node: grammar.ValueNode, text: str) -> Value:
    if isinstance(node.value, grammar.SpecNode):
        return resolve_mixer(node.value, text)
    return tuple(resolve_value(item, text) for item in node.value) if isinstance(node.value, tuple) else node.value


def recheck(value: Value, text: str, column: int) -> Value:
    if isinstance(value, tuple):
        return tuple(recheck(item, text, column) for item in value)
    if isinstance(value, MixerSpec) and not value.options:
        return resolve_mixer(grammar.SpecNode(value.name, (), column), text)
    return value


def unfold(node: grammar.SpecNode) -> grammar.SpecNode:
    """A preset's name replaced by what it stands for; options written after the name win over the preset's own."""
    preset = presets().get(node.name)
    if preset is None:
        return node
    base = grammar.parse(preset.spec)[0].spec
    written = {option.key for option in node.options}
    # Columns of the preset's own file would point into another string.
    own = tuple(replace(option, column=node.column) for option in base.options if option.key not in written)
    return grammar.SpecNode(base.name, own + node.options, node.column)


def unknown(name: str, names: list[str]) -> str:
    if name == NATIVE:
        return "'native' is the host model's own mixer; it stands in a pattern only"
    near = [known for known in names if known.lower() == name.lower()]
    near = near or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean '{near[0]}'?" if near else "."
    listed = ", ".join(names) if names else "none; reinstall chela-plugin, its package metadata is missing"
    return f"unknown mixer '{name}'{hint} Known: {listed}"
