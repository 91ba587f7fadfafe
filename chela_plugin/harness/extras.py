"""Optional packages: where one is missing, the error shows the pip line that installs it."""

from __future__ import annotations

import importlib.util


class MissingPackage(ImportError):
    """A package of an optional extra is not installed; the message shows the pip line."""


def need(package: str, extra: str) -> None:
    """Raise MissingPackage unless `package` can be imported. Imports nothing itself."""
    if importlib.util.find_spec(package) is None:
        raise MissingPackage(f"{package} is not installed; run: pip install 'chela-plugin[{extra}]'")
