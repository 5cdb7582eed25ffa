# SPDX-License-Identifier: Apache-2.0
"""Tensors with a description, on disk: safetensors + JSON, written atomically, checked before anything is read.

A folder holds ``<name>.safetensors`` and ``<name>.json``. The JSON names the format, its version, the configuration and
every tensor's shape and dtype; both files carry the same `save` mark, so a pair of two different saves is recognised.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
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
    remove_scratch(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield scratch
        with open(scratch, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(scratch, path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        kept = "; what was there before is kept" if path.exists() else ""
        what = f"no room to write {path} ({error.strerror}){kept}; free some and try again"
        raise OSError(error.errno, what) from error
    finally:
        scratch.unlink(missing_ok=True)


def remove_scratch(path: Path) -> None:
    """Remove what processes that were killed while they wrote `path` have left; those of living ones stay."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        pid = left.name.split(".")[-2]
        if not pid.isdigit() or int(pid) == os.getpid() or not _alive(int(pid)):
            left.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` outlive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """`value` as JSON, atomically."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """One safetensors file, atomically; `about` goes into its header as JSON, with the sha256 of every tensor."""
    tensors = {name: value.detach().contiguous() for name, value in tensors.items()}
    sums = {name: _sha256(value) for name, value in tensors.items()}
    header = {"fusae": json.dumps({**about, "sha256": sums}, allow_nan=False)}
    with replacing(path) as scratch:
        try:
            safetensors.torch.save_file(tensors, scratch, header)
        except safetensors.SafetensorError as error:  # what a full disk raises there, without its number
            if "os error 28" in str(error) or "os error 27" in str(error) or "No space" in str(error):
                raise OSError(errno.ENOSPC, str(error)) from error
            raise


def _sha256(tensor: Tensor) -> str:
    flat = tensor.cpu().reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
    return hashlib.sha256(flat.numpy()).hexdigest()


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
    check_sums(path, file, header)
    return config, ((key, file.get_tensor(key)) for key in tensors)


def check_sums(path: Path, file: Any, about: Mapping[str, Any]) -> None:
    """Every tensor of an open safetensors file has the sha256 that `write_tensors` noted."""
    sums = about.get("sha256")
    if not isinstance(sums, dict):
        raise FormatError(f"{path}: field 'sha256' must be an object, got {type(sums).__name__}")
    for key in file.keys():  # noqa: SIM118  (safe_open is no mapping)
        if _sha256(file.get_tensor(key)) != sums.get(key):
            raise FormatError(f"{path}: {key} is damaged: its sha256 is not the one that was noted when it was written")


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
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "U8": "uint8",
}  # fmt: skip
