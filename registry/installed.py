"""Which mixers there are: entry points of installed distributions, presets, and what a program registers at run time.

Listing imports no mixer. What an entry point needs is read from its extras (`fla = "module:factory [lm]"`) and the
`Requires-Dist` lines of its distribution; its summary line is read from the docstring in the source file.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chela_plugin.registry.errors import MixerSpecError, MixerUnavailableError
from chela_plugin.registry.presets import presets
from chela_plugin.registry.signature import check_factory
from chela_plugin.registry.spec import NATIVE, is_word

GROUP = "chela_plugin.mixers"
RUN_TIME = "registered at run time"

Factory = Callable[..., Any]


@dataclass(frozen=True)
class Declaration:
    """One entry point: `name` of mixer, its distribution, `value` ('module:attribute'), the extras that it needs."""

    name: str
    distribution: importlib.metadata.Distribution
    value: str
    extras: tuple[str, ...]

    @property
    def source(self) -> str:
        return str(self.distribution.metadata["Name"])


@dataclass(frozen=True)
class MixerListing:
    """One row of `list_mixers()`.

    Attributes:
        name: what a mixer string says.
        distribution: who declares it, the name that pip knows, or 'registered at run time'.
        available: False where the mixer can't be loaded here. A factory may still refuse a device or `causal`.
        reason: why not, one line; '' where available.
        remedy: the command that mends it; '' where there is none.
        summary: first line of the factory's docstring, '' where it can't be read without importing.
        preset: the spec that a preset stands for, '' for a mixer proper.
    """

    name: str
    distribution: str
    available: bool
    reason: str
    remedy: str
    summary: str
    preset: str = ""


at_run_time: dict[str, Factory] = {}
loaded: dict[str, Factory] = {}  # by entry-point value
failed: dict[str, str] = {}  # by entry-point value, the reason that the last attempt met


def register_mixer(name: str, factory: Factory) -> None:
    """Make `factory` usable as the mixer `name` in this process, as an entry point does for every process.

    Registering a name again replaces it, so that a notebook cell may run twice. Raises MixerSpecError for a name that
    no string can spell or that is taken by an installed mixer, a preset or `native`; TypeError for a factory whose
    signature is not `factory(dim, *, causal, depth=None, layer_idx=None, device=None, dtype=None, **options)`.
    """
    if not is_word(name) or name == NATIVE:
        raise MixerSpecError(f"{name!r} can't name a mixer: expected one word of ASCII letters other than 'native'")
    if name in presets():
        raise MixerSpecError(f"'{name}' is a preset of chela-plugin already; choose another name")
    if name in declarations():
        raise MixerSpecError(f"'{name}' is already declared by {declarations()[name][0].source}; choose another name")
    check_factory(factory)
    at_run_time[name] = factory


def known_names() -> list[str]:
    """Every name that a mixer string may use, `native` left out."""
    return sorted({*declarations(), *at_run_time, *presets()})


def load(name: str) -> Factory:
    """The factory of a known mixer; its module is imported on first use. Raises MixerUnavailableError."""
    if name in at_run_time:
        return at_run_time[name]
    declared = declarations()[name]
    declaration = declared[0]
    if declaration.value in loaded and len(declared) == 1:
        return loaded[declaration.value]
    reason, remedy = why_unavailable(declared, retry=True)
    if reason:
        raise MixerUnavailableError(name, reason, remedy or None)
    module, _, attribute = declaration.value.partition(":")
    try:
        factory: Any = importlib.import_module(module)
        for part in attribute.split("."):
            factory = getattr(factory, part)
        check_factory(factory)
    except Exception as error:  # someone else's module: anything can come out of it, and it must name its owner
        failed[declaration.value] = f"{type(error).__name__} in {declaration.value}: {error}"
        raise MixerUnavailableError(
            name, f"{failed[declaration.value]} (declared by {declaration.source})", None
        ) from error
    failed.pop(declaration.value, None)
    loaded[declaration.value] = factory
    return factory


def list_mixers() -> list[MixerListing]:
    """Every known mixer, by name: who declares it, whether it can be loaded here, and the command that mends it.

    Imports no mixer, so it takes milliseconds and works where a mixer's package is missing or broken. A distribution
    whose entry points can't be read is listed under the distribution's own name.
    """
    rows = {
        name: MixerListing(name, RUN_TIME, True, "", "", first_line(factory.__doc__))
        for name, factory in at_run_time.items()
    }
    for name, declared in declarations().items():
        reason, remedy = why_unavailable(declared)
        owners = ", ".join(declaration.source for declaration in declared)
        rows[name] = MixerListing(name, owners, not reason, reason, remedy, summary(declared[0]))
    for name, preset in presets().items():
        base = rows.get(preset.base)
        rows[name] = MixerListing(
            name,
            "chela-plugin",
            base is not None and base.available,
            base.reason if base else f"it stands for {preset.spec}, and no mixer is named {preset.base}",
            base.remedy if base else "",
            preset.summary,
            preset.spec,
        )
    for distribution, reason in unreadable().items():
        rows.setdefault(distribution, MixerListing(distribution, distribution, False, reason, "", ""))
    return [rows[name] for name in sorted(rows)]


def declarations() -> dict[str, list[Declaration]]:
    """Entry points by name; a name with several owners is refused when it is used, not when it is listed."""
    return scan_path()[0]


def unreadable() -> dict[str, str]:
    """Distributions whose entry points can't be read, with the reason."""
    return scan_path()[1]


scanned: dict[tuple, tuple[dict[str, list[Declaration]], dict[str, str]]] = {}


def scan_path() -> tuple[dict[str, list[Declaration]], dict[str, str]]:
    """One walk over the installed distributions, repeated only after sys.path or a folder on it has changed.

    `importlib.metadata.entry_points` isn't used: it parses every distribution's file and raises for all when one is
    malformed.
    """
    state = tuple((folder, modified(folder)) for folder in sys.path)
    if state not in scanned:
        found: dict[str, list[Declaration]] = {}
        broken: dict[str, str] = {}
        seen: set[str] = set()
        for distribution in importlib.metadata.distributions():
            text = distribution.read_text("entry_points.txt")
            if not text or GROUP not in text:
                continue
            try:
                name = str(distribution.metadata["Name"])
                canonical = re.sub(r"[-_.]+", "-", name).lower()
                if canonical in seen:  # an older copy further down the path, which Python would not import either
                    continue
                seen.add(canonical)
                for point in distribution.entry_points:
                    if point.group == GROUP:
                        value, extras = split_value(point.value)
                        found.setdefault(point.name, []).append(Declaration(point.name, distribution, value, extras))
            except Exception as error:  # a stranger's malformed metadata must not take the others down
                broken[name] = f"its entry points can't be read: {type(error).__name__}: {error}"
        scanned.clear()
        scanned[state] = found, broken
    return scanned[state]


def modified(folder: str) -> int:
    try:
        return os.stat(folder or ".").st_mtime_ns
    except OSError:
        return 0


def split_value(value: str) -> tuple[str, tuple[str, ...]]:
    """'module:attribute [extra, extra]' to its two parts."""
    target, _, extras = value.partition("[")
    return target.replace(" ", ""), tuple(extra.strip() for extra in extras.strip(" ]").split(",") if extra.strip())


def why_unavailable(declared: list[Declaration], *, retry: bool = False) -> tuple[str, str]:
    """`(reason, remedy)`, both empty when nothing stands in the way; `retry` forgets what the last attempt met."""
    declaration = declared[0]
    if len(declared) > 1:
        owners = [other.source for other in declared]
        reason = f"declared by {' and by '.join(owners)}; one of them must go"
        return reason, f"pip uninstall {owners[-1]}"
    if not is_word(declaration.name) or declaration.name == NATIVE:
        return f"no mixer string can spell '{declaration.name}'; {declaration.source} must rename it", ""
    if not re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", declaration.value):
        return f"{declaration.source} declares '{declaration.value}', which is not module:factory", ""
    missing = missing_requirements(declaration)
    if missing:
        return f"needs {', '.join(missing)}", f"pip install '{declaration.source}[{','.join(declaration.extras)}]'"
    package = declaration.value.partition(":")[0].partition(".")[0]
    if package not in sys.modules and importlib.util.find_spec(package) is None:
        return f"{declaration.source} points at {package}, which can't be imported", ""
    return ("" if retry else failed.get(declaration.value, "")), ""


def missing_requirements(declaration: Declaration) -> list[str]:
    """What the entry point's extras ask for and this environment lacks: 'transformers>=5.17 (not installed)'."""
    if not declaration.extras:
        return []
    from packaging.requirements import Requirement  # only where an extra is declared

    missing = []
    for requirement in map(Requirement, declaration.distribution.requires or []):
        marker = requirement.marker
        if marker is None or not any(marker.evaluate({"extra": extra}) for extra in declaration.extras):
            continue
        wanted = f"{requirement.name}{requirement.specifier}"
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"{wanted} (not installed)")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            missing.append(f"{wanted} (found {version})")
    return missing


def summary(declaration: Declaration) -> str:
    """First docstring line of the factory, from its source file, so that nothing is imported."""
    module, _, attribute = declaration.value.partition(":")
    if declaration.value in loaded:
        return first_line(loaded[declaration.value].__doc__)
    try:
        package, *rest = module.split(".")
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            return ""
        path = Path(found.origin)
        if rest:
            path = path.parent.joinpath(*rest)
            path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == attribute:
                return first_line(ast.get_docstring(node))
    except (OSError, ValueError, SyntaxError, ImportError):
        return ""  # no source to read: a listing without a summary is still a listing
    return ""


def first_line(docstring: str | None) -> str:
    return (docstring or "").strip().partition("\n")[0].strip()
