"""Makes `timm.create_model('chela_vit_small')` work with no import of ours: a post-import hook on each host library.

`import torch` calls `install` through the entry-point group `torch.backends`, which exists for device backends and is
used off-label here. `install` puts one finder on `sys.meta_path` and does nothing else: standard library only, no
exception ever (one here would break `import torch` for everyone), nothing at all when CHELA_AUTOLOAD=0.

When a host's module has been executed, the finder's loader imports our module for it. There is one trap: a host may be
half loaded at that moment (`from transformers import AutoConfig` imports torch from the middle of transformers), and
importing ours would then meet a library that lacks half of its names. So ours waits until none of the host's modules,
nor torch, is still being executed. The import system clears `__spec__._initializing` at the end of each; a module
under way is given a spec that wakes us when that happens.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# The host's module that, once executed, lets ours register: our modules, in order.
HOSTS = {
    "timm.models": ("chela_plugin.vision", "chela_plugin.attn_layer"),
    "transformers.models.auto": ("chela_plugin.lm",),
    "fla.models": ("chela_plugin.lm.fla_models",),
}

waiting: set[str] = set()  # hosts' modules that are loaded while something they depend on is not


def install() -> None:
    """Entry point of `torch.backends`."""
    try:
        if os.environ.get("CHELA_AUTOLOAD") == "0" or any(isinstance(f, HostFinder) for f in sys.meta_path):
            return
        sys.meta_path.insert(0, HostFinder())
        waiting.update(host for host in HOSTS if host in sys.modules)
        wake()
    except Exception as error:
        warn(f"chela_plugin's import hook could not be installed ({type(error).__name__}: {error})")


def register() -> tuple[str, ...]:
    """Register our models with every installed host, by hand; safe to call after the hook did it.

    Returns the names of our modules that did so. A host that isn't installed is left out; any other error is raised.
    """
    from importlib.util import find_spec

    done = []
    for host, ours in HOSTS.items():
        if find_spec(host.partition(".")[0]) is not None:
            import_module(host)
            for name in ours:
                import_module(name)
                done.append(name)
    return tuple(done)


class HostFinder:
    """Finds hosts' modules as everyone else would, and has their loaders call back after execution."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in HOSTS:
            return None
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                        spec.loader = CallingLoader(spec.loader)  # type: ignore[assignment]  # delegates the rest
                    return spec
        return None


class CallingLoader:
    """A loader that is another one, and looks for waiting hosts once the module has been executed."""

    def __init__(self, loader: Any):
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module keeps its own loader, for inspect, pickle, importlib.resources and whoever else asks.
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        waiting.add(module.__name__)
        wake()


class WatchedSpec(ModuleSpec):
    """The spec of a module under way; becomes an ordinary spec, and wakes us, when the module is complete."""

    @property
    def _initializing(self) -> bool:
        return self.__dict__["_initializing"]

    @_initializing.setter
    def _initializing(self, value: bool) -> None:
        self.__dict__["_initializing"] = value
        if not value:
            self.__class__ = ModuleSpec  # type: ignore[assignment]  # same layout: this class only adds a property
            wake()


def wake() -> None:
    """Import ours for each waiting host that is complete; never raises."""
    for host in list(waiting):
        try:
            specs = under_way(host)
            for spec in specs:
                if type(spec) is ModuleSpec:
                    spec.__class__ = WatchedSpec  # type: ignore[assignment]
            if specs:
                continue
            waiting.discard(host)
            for name in HOSTS[host]:
                import_module(name)
        except Exception as error:
            waiting.discard(host)
            warn(
                f"chela_plugin could not register with {host.partition('.')[0]} ({type(error).__name__}: {error}). "
                "`chela_plugin.register()` shows the whole error; CHELA_AUTOLOAD=0 turns this off."
            )


def under_way(host: str) -> list[ModuleSpec]:
    """Specs of what must still be executed: torch, and the host's modules other than `host` and its parents."""
    root = host.partition(".")[0] + "."
    specs: list[ModuleSpec] = []
    for name, module in list(sys.modules.items()):
        if name == "torch" or (name.startswith(root) and not f"{host}.".startswith(f"{name}.")):
            spec: Any = getattr(module, "__spec__", None)
            if getattr(spec, "_initializing", False):
                specs.append(spec)
    return specs


def warn(message: str) -> None:
    import warnings

    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except RuntimeWarning:  # warnings are errors here, and this one must not become the user's ImportError
        print(f"warning: {message}", file=sys.stderr)
