"""Options against the factory's signature: its parameters name the valid options, their annotations the types."""

from __future__ import annotations

import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from chela_plugin.registry.spec import MixerSpec, Value, is_word

HOST_ARGUMENTS = ("dim", "causal", "depth", "layer_idx", "device", "dtype")
SIGNATURE = "factory(dim, *, causal, depth=None, layer_idx=None, device=None, dtype=None, **options)"

Factory = Callable[..., Any]


class OptionError(ValueError):
    """One option is wrong; `key` names it, None where the options as a whole are."""

    def __init__(self, key: str | None, message: str):
        self.key = key
        super().__init__(message)


def check_factory(factory: Factory) -> None:
    """Raise TypeError unless hosts can call `factory` as SIGNATURE says."""
    if not callable(factory):
        raise TypeError(f"a mixer factory is a callable {SIGNATURE}, got {factory!r}")
    parameters = inspect.signature(factory).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and "dim" in parameters:
        return
    lacking = [name for name in HOST_ARGUMENTS if name not in parameters]
    if lacking:
        raise TypeError(f"the factory takes no {', '.join(lacking)}; its signature must be {SIGNATURE}")


def check_options(name: str, factory: Factory, options: Mapping[str, Value]) -> dict[str, Value]:
    """The options as the factory wants them: an int widened to float, a word turned to MixerSpec, where annotated so.

    A factory with `**options` may carry an attribute `check_options(options: dict) -> None` that raises ValueError.
    Raises OptionError.
    """
    parameters = inspect.signature(factory).parameters
    named = {
        key: p
        for key, p in parameters.items()
        if key not in HOST_ARGUMENTS and p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
    }
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    checked = {}
    for key, value in options.items():
        if key in HOST_ARGUMENTS:
            raise OptionError(key, f"'{key}' is set by the host model; it is no option of a mixer string")
        if key not in named and not open_ended:
            valid = ", ".join(named) or "none"
            raise OptionError(key, f"{name} has no option '{key}'; valid options: {valid}")
        annotation = named[key].annotation if key in named else inspect.Parameter.empty
        checked[key] = check_value(name, factory, key, annotation, value)
    for key, p in named.items():
        if p.default is p.empty and key not in options:
            raise OptionError(None, f"{name} needs the option '{key}': {name}({key}={described(p.annotation)})")
    further = getattr(factory, "check_options", None)
    if further is not None:
        try:
            further(dict(checked))
        except ValueError as error:
            raise OptionError(None, f"{name}: {error}") from error
    return checked


def check_value(name: str, factory: Factory, key: str, annotation: Any, value: Value) -> Value:
    if annotation is inspect.Parameter.empty:
        return value
    from pydantic import ConfigDict, PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError

    kind = resolved(factory, key, annotation)
    if mentions(kind, MixerSpec) and not mentions(kind, str):
        value = as_specs(value)
    try:
        try:
            adapter = TypeAdapter(kind, config=ConfigDict(strict=True, arbitrary_types_allowed=True))
        except PydanticUserError:  # a dataclass or model brings its own configuration
            adapter = TypeAdapter(kind)
        result = adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        hint = f"; a tuple of one is written ({value},)" if "tuple" in first["type"] else ""
        raise OptionError(
            key, f"option '{key}' of {name} expects {described(annotation)}, got {value!r} ({first['msg']}){hint}"
        ) from None
    except PydanticSchemaGenerationError as error:
        raise OptionError(key, f"option '{key}' of {name} is annotated {described(annotation)}: {error}") from None
    return result if isinstance(result, int | float | str | tuple | MixerSpec | None) else value


def resolved(factory: Factory, key: str, annotation: Any) -> Any:
    """The annotation itself where the factory's module postpones them (`from __future__ import annotations`)."""
    if not isinstance(annotation, str):
        return annotation
    target: Any = inspect.unwrap(factory.func if isinstance(factory, functools.partial) else factory)
    names = getattr(target, "__globals__", None) or vars(sys.modules[target.__module__])
    holder = types.SimpleNamespace(__annotations__={key: annotation})
    try:
        return typing.get_type_hints(holder, globalns=names, localns={}, include_extras=True)[key]
    except Exception as error:  # whatever evaluating a stranger's annotation raises
        raise OptionError(key, f"the annotation {annotation!r} of option '{key}' can't be read: {error}") from error


def mentions(kind: Any, wanted: type) -> bool:
    return kind is wanted or any(mentions(part, wanted) for part in typing.get_args(kind))


def as_specs(value: Value) -> Value:
    """A word where a mixer is wanted is that mixer without options."""
    if isinstance(value, tuple):
        return tuple(as_specs(item) for item in value)
    return MixerSpec(value) if isinstance(value, str) and is_word(value) else value


def described(annotation: Any) -> str:
    if isinstance(annotation, str):
        return annotation
    if annotation is inspect.Parameter.empty:
        return "a value"
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
