"""The JSON file of a benchmark: written as a whole after every case, so that a run that is cut off keeps its rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from chela_plugin.harness.config import ConfigError
from chela_plugin.harness.results import write_atomically

FORMAT = "chela-plugin bench"


def write(path: Path, record: dict[str, Any]) -> None:
    """One row a line: a diff shows which ones changed."""
    body = []
    for key, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            rows = ",\n  ".join(json.dumps(row) for row in value)
            body.append(f" {json.dumps(key)}: [\n  {rows}\n ]")
        else:
            body.append(f" {json.dumps(key)}: {json.dumps(value)}")
    write_atomically(path, ("{\n" + ",\n".join(body) + "\n}\n").encode())


def read(path: Path) -> dict[str, Any]:
    """Raises ConfigError where the file is none of ours."""
    try:
        record = json.loads(path.read_bytes())
        if record["format"] != FORMAT or not isinstance(record["results"], list):
            raise ValueError
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; make one with: chela bench layers --out {path}") from None
    except (ValueError, KeyError, TypeError, OSError):
        raise ConfigError(f"{path} was not written by `chela bench`") from None
    return record
