"""Pytest plugin that points timm's own tests/test_models.py, unchanged, at our models: `make timm-suite`.

timm's test file asks `timm.list_models` which models to run, by patterns and modules. While tests are collected this
plugin answers with ours alone, and makes ours ViTs wherever a list of timm's names ViTs. It deselects nothing: tests
that name a model themselves run on that model.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import timm

import chela_plugin

PATTERNS = {"vit_*": ["chela_vit*"]}  # what timm calls non-standard: features that are tokens, not maps
MODULES = {"vision_transformer": ["chela_vit", "chela_former"]}  # with forward_intermediates

chela_plugin.register()
every_model = timm.list_models
collecting = True  # a test that asks while it runs wants to know about all models


def as_list(value: str | Iterable[str]) -> list[str]:
    return [value] if isinstance(value, str) and value else list(value)


def with_ours(value: str | Iterable[str], added: dict[str, list[str]]) -> list[str]:
    names = as_list(value)
    return names + [ours for theirs, more in added.items() if theirs in names for ours in more]


def our_models(
    filter: str | Iterable[str] = "",
    module: str | Iterable[str] = "",
    pretrained: bool = False,
    exclude_filters: str | Iterable[str] = "",
    **options: bool,
) -> list[str]:
    """`timm.list_models`, while collecting ours only."""
    listed = every_model(
        with_ours(filter, PATTERNS),
        with_ours(module, MODULES),
        pretrained=pretrained,
        exclude_filters=with_ours(exclude_filters, PATTERNS),
        **options,
    )
    return [name for name in listed if name.startswith("chela_") or not collecting]


timm.list_models = our_models  # type: ignore[assignment]  # same calls, looser signature
timm.list_pretrained = lambda *_arguments, **_options: []  # we have no pretrained weights


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a test file of another version than the installed timm."""
    version = Path(config.rootpath, "timm", "version.py")
    if not version.is_file() or f"'{timm.__version__}'" not in version.read_text():
        raise pytest.UsageError(
            f"{config.rootpath} is not timm {timm.__version__}, the version that is installed: check out the tag "
            f"v{timm.__version__}, or unpack its source distribution"
        )


def pytest_collection_finish() -> None:
    global collecting
    collecting = False
