# SPDX-License-Identifier: Apache-2.0
"""Configuration files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_settings(path: str | Path) -> dict[str, Any]:
    """The top-level table of a ``.toml`` or ``.json`` file."""
    path = Path(path)
    if path.suffix not in (".toml", ".json"):
        raise ValueError(f"{path}: a configuration file must end in .toml or .json")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such configuration file")
    text = path.read_text(encoding="utf-8")
    try:
        values = json.loads(text) if path.suffix == ".json" else _toml().loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: not valid {path.suffix[1:].upper()}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold a table of fields, got {type(values).__name__}")
    return values


def _toml() -> Any:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    return tomllib
