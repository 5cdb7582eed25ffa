# SPDX-License-Identifier: Apache-2.0
"""Named tensors of a file that others wrote: safetensors, ``torch.save`` or ``numpy.savez``. Nothing in it is executed.

What a file claims about itself is checked before memory is taken for it, and every tensor before it is used.
"""

from __future__ import annotations

import ast
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from .._checks import FLOATS
from .native import FormatError

_SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NPY = {"<f8": torch.float64, "<f4": torch.float32, "<f2": torch.float16}
_PICKLE = 64 * 2**20  # bytes; a checkpoint's pickle holds names and shapes
_PART = 2**22  # values looked at together


class Tensors:
    """The tensors of a file, by name. Shapes and dtypes are known; none is read before it is taken.

    Attributes:
        path: of the file.
        plain: what a ``torch.save`` file holds beside tensors.
    """

    def __init__(
        self,
        path: Path,
        specs: Mapping[str, tuple[list[int], Any]],
        read: Callable[[str], Tensor],
        plain: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.plain = path, dict(plain or {})
        self._specs, self._read, self._taken = dict(specs), read, set()

    def __contains__(self, name: str) -> bool:
        return name in self._specs

    @property
    def names(self) -> set[str]:
        return set(self._specs)

    def shape(self, name: str, ndim: int) -> list[int]:
        """Of a tensor of `ndim` dimensions that must be there."""
        self._known(name)
        shape = list(self._specs[name][0])
        if len(shape) != ndim:
            raise self.error(name, f"must have {ndim} dimensions, got shape {shape}")
        return shape

    def take(self, name: str, *shape: int, infinite: bool = False) -> Tensor:
        """A tensor of this shape and of a floating dtype, all of it finite (but for +inf, with `infinite`)."""
        self._known(name)
        found, dtype = self._specs[name]
        if list(found) != list(shape):
            hint = " (transposed?)" if len(shape) == 2 and list(found) == [shape[1], shape[0]] else ""
            raise self.error(name, f"must have shape {list(shape)}, got {list(found)}{hint}")
        if dtype not in FLOATS:
            raise self.error(name, f"must be of float32, bfloat16, float16 or float64, got {str(dtype)}")
        tensor = self._get(name)
        self._finite(name, tensor, infinite)
        return tensor

    def number(self, name: str) -> float | int:
        """The value of a tensor of one element, of any dtype."""
        self._known(name)
        found, _ = self._specs[name]
        if any(size != 1 for size in found):
            raise self.error(name, f"must be a single number, got shape {list(found)}")
        value = self._get(name)
        if value.is_complex() or value.dtype == torch.bool or not bool(torch.isfinite(value.double()).all()):
            raise self.error(name, f"must be a finite number, got {value}")
        return value.item()

    def vector(self, name: str) -> list[int]:
        """A short list of whole numbers."""
        (count,) = self.shape(name, 1)
        if self._specs[name][1] not in (torch.int64, torch.int32) or count > 2**16:
            raise self.error(name, f"must be a list of whole numbers, got {count} of {self._specs[name][1]}")
        return self._get(name).tolist()

    def drop(self, *names: str) -> None:
        """These may be there, and are of no use here."""
        self._taken.update(names)

    def end(self) -> None:
        """All that is there was taken or dropped."""
        for name in self._specs:
            if name not in self._taken:
                raise self.error(name, "is not one that this format has; what it does to the result is not known")

    def error(self, name: str, what: str) -> FormatError:
        return FormatError(f"{self.path}: tensor {name!r} {what}")

    def _known(self, name: str) -> None:
        if name not in self._specs:
            there = ", ".join(map(repr, sorted(self._specs)[:20])) or "none"
            raise FormatError(f"{self.path}: tensor {name!r} is missing; there are {there}")

    def _get(self, name: str) -> Tensor:
        self._taken.add(name)
        try:
            return self._read(name)
        except FormatError:
            raise
        except (safetensors.SafetensorError, ValueError, RuntimeError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise self.error(name, f"cannot be read ({error})") from error

    def _finite(self, name: str, tensor: Tensor, infinite: bool) -> None:
        rows = tensor.reshape(1) if tensor.ndim == 0 else tensor
        step = max(1, _PART // max(1, rows[:1].numel()))
        for start in range(0, len(rows) if rows.numel() else 0, step):
            part = rows[start : start + step]
            low, high = torch.aminmax(part)  # one pass, and NaN where there is one
            if bool(torch.isfinite(low)) and (bool(torch.isfinite(high)) or (infinite and high == torch.inf)):
                continue
            bad = ~torch.isfinite(part) & ~((part == torch.inf) & infinite)
            first = bad.nonzero()[0]
            at = [int(first[0]) + start, *map(int, first[1:])]
            raise self.error(name, f"holds values that are not finite, the first at {at}: {float(part[tuple(first)])}")


def open_tensors(path: Path, wanted: str, inside: str | None = None) -> Tensors:
    """The tensors of a ``.safetensors``, ``.npz`` or ``torch.save`` file, none of them read yet.

    Safetensors and pickled files are mapped into memory: a tensor that is used as it lies there is not copied.

    Args:
        path: what it is follows from its name.
        wanted: what it should have been, for `FileNotFoundError`.
        inside: key under which a ``torch.save`` file has its state dictionary.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; expected {wanted}")
    if path.stat().st_size == 0:
        raise FormatError(f"{path}: the file is empty")
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix == ".npz":
        return _open_npz(path)
    return _open_pickle(path, inside)


def _open_safetensors(path: Path) -> Tensors:
    try:
        file = safetensors.safe_open(path, "pt")
        specs = {}
        for name in file.keys():  # noqa: SIM118  (safe_open is no mapping)
            part = file.get_slice(name)
            specs[name] = (list(part.get_shape()), _SAFETENSORS.get(part.get_dtype(), part.get_dtype()))
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise FormatError(f"{path}: truncated, damaged or no safetensors file ({error})") from error
    return Tensors(path, specs, file.get_tensor)


def _open_pickle(path: Path, inside: str | None) -> Tensors:
    zipped = path.open("rb").read(4) == b"PK\x03\x04"
    if zipped:
        _check_archive(path, compressed=False)
    elif path.stat().st_size > 2**40:
        raise FormatError(f"{path}: too large for a file of the old kind of torch.save")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True if zipped else None)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise FormatError(
            f"{path}: not read, because it is damaged or holds more than tensors and plain values, and such a file can "
            f"run code ({reason})"
        ) from error
    except Exception as error:  # an unpickler that is fed nonsense can raise anything
        raise FormatError(f"{path}: truncated, damaged or not written by torch.save ({error})") from error
    if inside is not None and isinstance(loaded, dict) and inside in loaded:
        loaded = loaded[inside]
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise FormatError(f"{path}: must hold a dictionary of tensors by name, got {type(loaded).__name__}")
    tensors = {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
    plain = {name: value for name, value in loaded.items() if name not in tensors}
    for name, value in tensors.items():
        _check_plain(path, name, value)
    tensors = {name: value.detach() for name, value in tensors.items()}
    return Tensors(path, {n: (list(v.shape), v.dtype) for n, v in tensors.items()}, tensors.__getitem__, plain)


def _check_plain(path: Path, name: str, value: Tensor) -> None:
    """A dense tensor on the CPU that has memory for all of its elements."""
    kind = next(
        (
            kind
            for kind, yes in (
                ("a sparse tensor", value.layout != torch.strided),
                ("a quantised tensor", value.is_quantized),
                (f"a tensor on the device {value.device}", value.device.type != "cpu"),
                (f"a {type(value).__name__}", type(value) not in (Tensor, torch.nn.Parameter)),
            )
            if yes
        ),
        None,
    )
    if kind is not None:
        raise FormatError(f"{path}: tensor {name!r} must be a plain dense one, got {kind}")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise FormatError(
            f"{path}: tensor {name!r} claims shape {list(value.shape)} but has only "
            f"{value.untyped_storage().nbytes()} bytes of memory (it repeats them)"
        )


def _check_archive(path: Path, compressed: bool) -> list[zipfile.ZipInfo]:
    """The entries of a zip file, none of which unpacks to much more than it takes."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, RuntimeError, NotImplementedError) as error:
        raise FormatError(f"{path}: truncated or damaged ({error})") from error
    size = path.stat().st_size
    allowed = 20 * size + 2**20 if compressed else size
    if len({entry.filename for entry in entries}) != len(entries):
        raise FormatError(f"{path}: an entry of the archive is there twice")
    if sum(entry.file_size for entry in entries) > allowed:
        raise FormatError(
            f"{path}: {size} bytes claim to unpack to {sum(entry.file_size for entry in entries)}; refused"
        )
    if not compressed:
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED:
                raise FormatError(f"{path}: entry {entry.filename!r} is compressed, which torch.save never does")
            if entry.filename.endswith(".pkl") and entry.file_size > _PICKLE:
                raise FormatError(f"{path}: entry {entry.filename!r} has {entry.file_size} bytes; refused")
    return entries


def _open_npz(path: Path) -> Tensors:
    specs = {}
    for entry in _check_archive(path, compressed=True):
        if not entry.filename.endswith(".npy"):
            raise FormatError(f"{path}: entry {entry.filename!r} is no array")
        specs[entry.filename[:-4]] = _npy_header(path, entry)

    def read(name: str) -> Tensor:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
            return torch.from_numpy(np.lib.format.read_array(file, allow_pickle=False))

    return Tensors(path, specs, read)


def _npy_header(path: Path, entry: zipfile.ZipInfo) -> tuple[list[int], Any]:
    """Shape and dtype that an array claims, which must be those of its bytes."""
    name = entry.filename[:-4]
    try:
        with zipfile.ZipFile(path) as archive, archive.open(entry) as file:
            magic = file.read(8)
            if magic[:6] != b"\x93NUMPY" or magic[6] not in (1, 2, 3):
                raise ValueError("no array of numpy")
            length = int.from_bytes(file.read(2 if magic[6] == 1 else 4), "little")
            if length > 2**16:
                raise ValueError(f"a header of {length} bytes")
            header = ast.literal_eval(file.read(length).decode("latin1"))
            start = file.tell()
        shape, descr = list(header["shape"]), header["descr"]
        if not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"shape {shape}")
    except (ValueError, SyntaxError, KeyError, TypeError, OSError, EOFError, RuntimeError, RecursionError, MemoryError,
            zipfile.BadZipFile, NotImplementedError) as error:  # fmt: skip
        raise FormatError(f"{path}: array {name!r} is truncated or damaged ({error})") from error
    if not isinstance(descr, str) or "O" in descr:
        raise FormatError(f"{path}: array {name!r} holds Python objects ({descr}), which can run code; refused")
    dtype = _NPY.get(descr, descr)
    if dtype in FLOATS:
        held, count = entry.file_size - start, 1
        for size in shape:
            count *= size
        if count * dtype.itemsize != held:
            raise FormatError(f"{path}: array {name!r} claims shape {shape} of {dtype} but holds {held} bytes")
    return shape, dtype
