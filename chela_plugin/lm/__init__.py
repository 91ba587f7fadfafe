"""The plain-PyTorch language model; importing this package registers it with transformers' Auto classes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import chela_plugin.lm.auto  # noqa: F401  # for its registrations
from chela_plugin.lm.config import ChelaConfig

if TYPE_CHECKING:
    from chela_plugin.lm.cache import ChelaCache
    from chela_plugin.lm.model import ChelaForCausalLM, ChelaModel

# Imported on first use, because it takes seconds (auto.py).
HOMES = {
    "ChelaCache": "chela_plugin.lm.cache",
    "ChelaForCausalLM": "chela_plugin.lm.model",
    "ChelaModel": "chela_plugin.lm.model",
}

__all__ = ["ChelaCache", "ChelaConfig", "ChelaForCausalLM", "ChelaModel"]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)
