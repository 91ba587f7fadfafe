"""chela-plugin: one string decides which token mixer sits in every block. Importing this file imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chela_plugin.autoload import register
    from chela_plugin.registry import (
        MixerListing,
        MixerSpec,
        MixerSpecError,
        MixerUnavailableError,
        Pattern,
        UnknownMixerError,
        create_mixer,
        list_mixers,
        parse_pattern,
        register_mixer,
    )
    from chela_plugin.swap import swap_mixers

    __version__: str

# Loaded on first use: a start of Python that imports torch imports this file too (autoload.py).
HOMES = {
    "MixerListing": "chela_plugin.registry",
    "MixerSpec": "chela_plugin.registry",
    "MixerSpecError": "chela_plugin.registry",
    "MixerUnavailableError": "chela_plugin.registry",
    "Pattern": "chela_plugin.registry",
    "UnknownMixerError": "chela_plugin.registry",
    "create_mixer": "chela_plugin.registry",
    "list_mixers": "chela_plugin.registry",
    "parse_pattern": "chela_plugin.registry",
    "register": "chela_plugin.autoload",
    "register_mixer": "chela_plugin.registry",
    "swap_mixers": "chela_plugin.swap",
}

__all__ = [
    "MixerListing",
    "MixerSpec",
    "MixerSpecError",
    "MixerUnavailableError",
    "Pattern",
    "UnknownMixerError",
    "__version__",
    "create_mixer",
    "list_mixers",
    "parse_pattern",
    "register",
    "register_mixer",
    "swap_mixers",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value = version("chela-plugin")
    elif name in HOMES:
        from importlib import import_module

        value = getattr(import_module(HOMES[name]), name)
    else:
        raise AttributeError(f"module 'chela_plugin' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
