# SPDX-License-Identifier: Apache-2.0
"""Tensors with a description, on disk: safetensors + JSON, written atomically, checked before anything is read.

A folder holds ``<name>.safetensors`` and ``<name>.json``. The JSON names the format, its version, the configuration and
every tensor's shape and dtype; both files carry the same `save` mark, so a pair of two different saves is recognised.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor


class FormatError(ValueError):
    """A file is truncated, damaged, foreign or of another version. The message names the file and the field."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A scratch path beside `path`; it takes the place of `path` when the block ends, and vanishes if it raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield scratch
        with open(scratch, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`value` as JSON, atomically."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """One safetensors file, atomically; `about` goes into its header as JSON."""
    header = {"fusae": json.dumps(about, allow_nan=False)}
    with replacing(path) as scratch:
        safetensors.torch.save_file({k: v.detach().contiguous() for k, v in tensors.items()}, scratch, header)


def open_tensors(path: Path, wanted: str) -> tuple[Any, dict[str, Any]]:
    """An open safetensors file (no tensor read yet) and what `write_tensors` was given as `about`.

    Raises `FileNotFoundError` naming `wanted`, or `FormatError` for a truncated or foreign file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; expected {wanted}")
    try:
        file = safetensors.safe_open(path, "pt")
        about = json.loads((file.metadata() or {}).get("fusae", "null"))
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise FormatError(f"{path}: truncated, damaged or no safetensors file ({error})") from error
    if not isinstance(about, dict):
        raise FormatError(f"{path}: its header has no entry 'fusae', so it was not written by fusae; expected {wanted}")
    return file, about


def read_json(path: Path, wanted: str) -> dict[str, Any]:
    """A JSON object. Raises `FileNotFoundError` naming `wanted`, or `FormatError`."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; expected {wanted}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{path}: truncated or no JSON ({error})") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path}: must hold an object, got {type(value).__name__}")
    return value


def check_version(where: Path, about: Mapping[str, Any], name: str, version: int) -> None:
    """`about` names this format, in a version that this code reads."""
    if about.get("format") != name:
        raise FormatError(f"{where}: field 'format' must be {name!r}, got {about.get('format')!r}")
    if about.get("version") != version:
        raise FormatError(
            f"{where}: field 'version' must be {version}, got {about.get('version')!r}; "
            "this release of fusae does not read it"
        )


def save_pair(folder: Path, stem: str, name: str, version: int, config: dict, tensors: dict[str, Tensor]) -> None:
    """Write ``<stem>.safetensors`` and ``<stem>.json`` into `folder`."""
    import fusae

    about = {"format": name, "version": version, "save": secrets.token_hex(8)}
    described = _described({key: (list(value.shape), value.dtype) for key, value in tensors.items()})
    write_tensors(folder / f"{stem}.safetensors", tensors, about)
    write_json(folder / f"{stem}.json", {**about, "fusae": fusae.__version__, "config": config, "weights": described})


def load_pair(
    folder: Path,
    stem: str,
    name: str,
    version: int,
    expected: Callable[[Any], tuple[Any, dict[str, tuple[list[int], torch.dtype]]]],
) -> tuple[Any, Iterator[tuple[str, Tensor]]]:
    """Read what `save_pair` wrote.

    `expected` turns the stored configuration into a checked one and into the shapes and dtypes that follow from it; its
    TypeError or ValueError is raised as a `FormatError` that names the file. Both files are checked against it in full
    before a tensor is read; the tensors then come one at a time.
    """
    json_path, path = folder / f"{stem}.json", folder / f"{stem}.safetensors"
    about = read_json(json_path, f"a folder written by {name}.save")
    check_version(json_path, about, name, version)
    try:
        config, tensors = expected(about.get("config"))
    except (TypeError, ValueError) as error:
        raise FormatError(f"{json_path}: field 'config': {error}") from error
    stored = about.get("weights")
    if not isinstance(stored, dict):
        raise FormatError(f"{json_path}: field 'weights' must be an object, got {type(stored).__name__}")
    _same(json_path, "weights", _described(tensors), stored)
    file, header = open_tensors(path, f"the weights that {json_path.name} describes")
    check_version(path, header, name, version)
    if header.get("save") != about.get("save"):
        raise FormatError(f"{path}: its mark 'save' is not that of {json_path.name}: the two are of different saves")
    check_tensors(path, file, tensors)
    return config, ((key, file.get_tensor(key)) for key in tensors)


def check_tensors(path: Path, file: Any, tensors: Mapping[str, tuple[list[int], torch.dtype]]) -> None:
    """An open safetensors file holds exactly these tensors; none is read."""
    found = {}
    for key in file.keys():  # noqa: SIM118  (safe_open is no mapping)
        part = file.get_slice(key)
        found[key] = {"shape": list(part.get_shape()), "dtype": _DTYPES.get(part.get_dtype(), part.get_dtype())}
    _same(path, "tensors", _described(tensors), found)


def _described(tensors: Mapping[str, tuple[list[int], torch.dtype]]) -> dict[str, dict[str, Any]]:
    return {key: {"shape": list(shape), "dtype": str(dtype)[6:]} for key, (shape, dtype) in tensors.items()}


def _same(where: Path, field: str, wanted: dict, got: dict) -> None:
    for key, value in wanted.items():
        if key not in got:
            raise FormatError(f"{where}: {field} lacks {key!r}; it has {', '.join(map(repr, got)) or 'none'}")
        if got[key] != value:
            raise FormatError(f"{where}: {field}.{key} must be {_show(value)}, got {_show(got[key])}")
    for key in got:
        if key not in wanted:
            raise FormatError(f"{where}: {field} has {key!r}, which the configuration does not call for")


def _show(described: Any) -> str:
    if not isinstance(described, dict) or not {"shape", "dtype"} <= set(described):
        return repr(described)
    return f"{described['dtype']} {described['shape']}"


_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "U8": "uint8",
}  # fmt: skip
