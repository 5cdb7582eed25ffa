# SPDX-License-Identifier: Apache-2.0
"""Small text files that come with weights: JSON and YAML objects, read with a limit, every field checked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .. import _fields
from ..nn.config import DTYPES
from .native import FormatError

_LARGEST = {".json": 4 * 2**20, ".yaml": 2**18}  # bytes; a configuration has a few thousand
_REQUIRED: Any = object()


class Fields:
    """An object of plain values; every error names the file and the field."""

    def __init__(self, path: Path, values: Any, inside: str = "") -> None:
        if not isinstance(values, Mapping):
            what = f"field '{inside[:-1]}' must be" if inside else "must hold"
            raise FormatError(f"{path}: {what} an object, got {type(values).__name__}")
        self.path, self.values, self._inside = path, dict(values), inside

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def section(self, name: str, default: Any = _REQUIRED) -> Fields:
        return Fields(self.path, self._get(name, default), f"{self._inside}{name}.")

    def whole(self, name: str, default: Any = _REQUIRED, low: int = 1, high: int | None = 2**31 - 1) -> int:
        """A whole number; one that is written as a float (``32.0``) too."""
        value = self._get(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        return self._checked(name, lambda where: _fields.whole(where, value, low, high))

    def number(self, name: str, default: Any = _REQUIRED, above: bool = False) -> float:
        value = self._get(name, default)
        return float(self._checked(name, lambda where: _fields.number(where, value, above=above)))

    def flag(self, name: str, default: Any = _REQUIRED) -> bool:
        value = self._get(name, default)
        return self._checked(name, lambda where: _fields.flag(where, value))

    def text(self, name: str, default: Any = _REQUIRED) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self.error(name, f"must be text, got {type(value).__name__}")
        return value

    def choice(self, name: str, options: tuple[str, ...], default: Any = _REQUIRED) -> str:
        value = self._get(name, default)
        return self._checked(name, lambda where: _fields.choice(where, value, options))

    def dtype(self, name: str = "dtype", default: Any = _REQUIRED) -> torch.dtype:
        """Of 'float32' or 'torch.float32' and their like."""
        value = self._get(name, default)
        known = DTYPES.get(value.removeprefix("torch.")) if isinstance(value, str) else None
        if known is None:
            raise self.error(name, f"must be one of {', '.join(map(repr, DTYPES))}, got {value!r}")
        return known

    def error(self, name: str, what: str) -> FormatError:
        return FormatError(f"{self.path}: field '{self._inside}{name}' {what}")

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise self.error(name, f"is missing; there are {_listed(self.values)}")
        return default

    def _checked(self, name: str, check: Callable[[str], Any]) -> Any:
        try:
            return check(f"'{self._inside}{name}'")
        except (TypeError, ValueError) as error:
            raise FormatError(f"{self.path}: field {error}") from error


def read_fields(path: Path, wanted: str) -> Fields:
    """The object in a ``.json`` or ``.yaml`` file.

    Raises `FileNotFoundError` naming `wanted`, or `FormatError`: too large, no text, no object, a key twice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; expected {wanted}")
    size, largest = path.stat().st_size, _LARGEST[path.suffix]
    if size > largest:
        raise FormatError(f"{path}: {size} bytes are too many for a configuration (at most {largest})")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return Fields(path, json.loads(text, object_pairs_hook=_once))
        return Fields(path, _yaml(text))
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise FormatError(f"{path}: truncated, damaged or no {kind} ({error})") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return values


def _yaml(text: str) -> Any:
    yaml = import_yaml()
    try:
        if any(isinstance(token, yaml.tokens.AliasToken) for token in yaml.scan(text, yaml.SafeLoader)):
            raise ValueError("aliases are not read")  # a few of them can stand for a thousand million entries
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error).replace("\n", " ")) from error


def import_yaml() -> Any:
    """The module ``yaml``, which the configuration of circuit-tracer needs."""
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("config.yaml needs PyYAML: pip install 'fusae[formats]'", name="yaml") from error
    return yaml


def _listed(names: Any) -> str:
    names = [repr(name) for name in names]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "") or "none"
