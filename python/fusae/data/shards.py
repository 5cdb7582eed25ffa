# SPDX-License-Identifier: Apache-2.0
"""Arrays that grow on disk as shards: ``rows-00000.npy``, ``rows-00001.npy``, …, each with its sha256.

Every array of a folder is cut at the same rows. A shard is written as ``rows-00000.npy.part`` and renamed when it is
full, so a file without ``.part`` is a whole one. `ShardWriter.sync` makes what was appended safe on disk and says, in
plain values, where the arrays end; `ShardWriter.resume` goes on from there, whatever was written after.
"""

from __future__ import annotations

import errno
import hashlib
import io
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

# Columns and dtype of each array, by the stem of its files.
Layout = dict[str, tuple[int, np.dtype]]

_PART = ".part"
_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def shard_name(stem: str, shard: int) -> str:
    return f"{stem}-{shard:05d}.npy"


def shard_sizes(rows: int, shard_rows: int) -> list[int]:
    """Rows of each shard: all full but the last."""
    return [min(shard_rows, rows - start) for start in range(0, rows, shard_rows)]


def npy_header(rows: int, columns: int, dtype: np.dtype) -> bytes:
    """numpy pads the header so that the first axis can grow: its length does not depend on `rows`."""
    out = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows, columns)}
    np.lib.format.write_array_header_1_0(out, header)
    return out.getvalue()


def npy_size(rows: int, columns: int, dtype: np.dtype) -> int:
    return len(npy_header(rows, columns, dtype)) + rows * columns * dtype.itemsize


def file_sha256(path: Path) -> str:
    return _digest(path).hexdigest()


def _digest(path: Path, header: bytes = b"", size: int | None = None) -> Any:
    """The running sha256 of a file's first `size` bytes, with `header` in place of as many at its beginning."""
    digest, left = hashlib.sha256(header), (path.stat().st_size if size is None else size) - len(header)
    with open(path, "rb") as file:
        file.seek(len(header))
        while left > 0 and (block := file.read(min(left, 1 << 22))):
            digest.update(block)
            left -= len(block)
    return digest


def _check_begun(
    path: Path,
    inside: int,
    shard_rows: int,
    columns: int,
    dtype: np.dtype,
    sums: dict[str, str],
    what_to_do: str,
) -> tuple[Path, Any]:
    """Where the begun shard that is to become `path` lies, and the running sha256 of its first `inside` rows."""
    part = path.with_name(path.name + _PART)
    # A run that was killed after the last sync may have filled this shard and given it its name.
    at = next((p for p in (part, path) if p.exists()), None)
    if at is None:
        raise ValueError(f"path: {part} is missing; {what_to_do}")
    size, found = npy_size(inside, columns, dtype), at.stat().st_size
    if found < size:
        raise ValueError(
            f"path: {at} is truncated: it has {found:,} bytes, the {inside} rows that its description names take "
            f"{size:,}; {what_to_do}"
        )
    # The header says nothing that is not known, and finish() rewrites it in place: it is put back, not compared.
    digest = _digest(at, npy_header(shard_rows, columns, dtype), size)
    if digest.hexdigest() != sums.get(part.name):
        raise ValueError(f"path: {at} is damaged (its sha256 is not the one in its description); {what_to_do}")
    return at, digest


def check_sha256(path: Path, sums: dict[str, str], what_to_do: str) -> None:
    """Raises `ValueError` if the content of the shard `path` is not the one `sums` has under its name."""
    found = file_sha256(path)
    if found == sums.get(path.name):
        return
    other = next((name for name, value in sums.items() if value == found), None)
    why = f"it has the content of {other} (swapped or copied over?)" if other else "it is damaged or was changed"
    raise ValueError(
        f"path: {path} has sha256 {found[:16]}…, its description says {str(sums.get(path.name))[:16]}…: {why}; "
        f"{what_to_do}"
    )


def check_shard(path: Path, rows: int, columns: int, dtype: np.dtype, what_to_do: str) -> None:
    """Raises `ValueError` if `path` is not there or is no ``[rows, columns]`` array of `dtype`, by size and header."""
    wanted = f"{rows} rows of {columns} {dtype} values"
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = file.read(len(npy_header(rows, columns, dtype)))
    except FileNotFoundError:
        raise ValueError(f"path: {path} is missing; {what_to_do}") from None
    expected = npy_size(rows, columns, dtype)
    if size < expected:
        raise ValueError(f"path: {path} is truncated: it has {size:,} bytes, {wanted} take {expected:,}; {what_to_do}")
    if header != npy_header(rows, columns, dtype) or size != expected:
        raise ValueError(
            f"path: {path} holds something else than the {wanted} that its description names ({size:,} bytes for "
            f"{expected:,}); {what_to_do}"
        )


class Mapped:
    """A checked shard, memory-mapped: `array` is ``[rows, columns]``, read-only."""

    def __init__(self, path: Path, rows: int, columns: int, dtype: np.dtype) -> None:
        try:
            with open(path, "rb") as file:
                self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            raise OSError(
                error.errno,
                f"path: {path} cannot be opened, this process has too many open files; raise the limit (ulimit -n) or "
                "collect with a larger shard_rows",
            ) from error
        self._offset = len(npy_header(rows, columns, dtype))
        self.array = np.frombuffer(self._memory, dtype, offset=self._offset).reshape(rows, columns)

    def advise(self, advice: int, start: int, stop: int) -> None:
        """`madvise` for the pages of rows ``start:stop``."""
        row = self.array.strides[0]
        first = (self._offset + start * row) // mmap.PAGESIZE * mmap.PAGESIZE
        self._memory.madvise(advice, first, self._offset + stop * row - first)


class ShardWriter:
    """Appends rows to the arrays of `layout`, in shards of `shard_rows` rows.

    Attributes:
        rows: appended so far.
        sha256: of each whole shard, by its name.
        torn: an `append` was cut short, or `finish` begun: the files are not what `sync` would say of them.
    """

    def __init__(self, folder: Path, layout: Layout, shard_rows: int) -> None:
        self.folder, self.layout, self.shard_rows = folder, layout, shard_rows
        self.rows = 0
        self.torn = False
        self.sha256: dict[str, str] = {}
        self._open: dict[str, tuple[io.BufferedWriter, Any]] = {}

    def append(self, arrays: dict[str, np.ndarray]) -> None:
        """Rows of every array of the layout; C-contiguous, of its dtype."""
        total = len(next(iter(arrays.values())))
        start, self.torn = 0, True
        while start < total:
            inside = self.rows % self.shard_rows
            count = min(total - start, self.shard_rows - inside)
            if not self._open:
                self._begin()
            for stem, (file, digest) in self._open.items():
                part = arrays[stem][start : start + count].view(np.uint8).data
                with full_disk_named(self.folder, file.name):
                    file.write(part)
                digest.update(part)
            self.rows += count
            start += count
            if inside + count == self.shard_rows:
                self._end()
        self.torn = False

    def sync(self) -> dict[str, Any]:
        """Wait until all is on disk. Returns ``{"rows", "sha256"}``: of whole shards and of the beginning of others."""
        for file, _ in self._open.values():
            with full_disk_named(self.folder, file.name):
                file.flush()
                os.fsync(file.fileno())
        sync_folder(self.folder)
        begun = {Path(file.name).name: digest.hexdigest() for file, digest in self._open.values()}
        return {"rows": self.rows, "sha256": {**self.sha256, **begun}}

    def finish(self) -> None:
        """Give the last shard its number of rows and its name. To be called once, after `sync`, as the last."""
        if not self._open:
            return
        self.torn = True
        inside = self.rows % self.shard_rows
        for stem, (file, _) in self._open.items():
            with full_disk_named(self.folder, file.name):
                file.seek(0)
                file.write(npy_header(inside, *self.layout[stem]))
                file.flush()
            self._open[stem] = (file, _digest(Path(file.name)))
        self._end()
        sync_folder(self.folder)

    def close(self) -> None:
        """Close the files as they are."""
        for file, _ in self._open.values():
            with suppress(OSError):  # what could not be written is beyond the last sync, and was reported
                file.close()
        self._open = {}

    @classmethod
    def resume(
        cls, folder: Path, layout: Layout, shard_rows: int, state: dict[str, Any], what_to_do: str
    ) -> ShardWriter:
        """A writer at `state`, which `sync` gave. What was written after that is cut off.

        Raises `ValueError`, before anything is changed, if a file before that place is missing, truncated or damaged.
        """
        writer = cls(folder, layout, shard_rows)
        writer.rows = state["rows"]
        whole, inside = divmod(writer.rows, shard_rows)
        sums = state["sha256"]
        kept = [shard_name(stem, shard) for shard in range(whole) for stem in layout]
        for shard in range(whole):
            for stem, (columns, dtype) in layout.items():
                check_shard(folder / shard_name(stem, shard), shard_rows, columns, dtype, what_to_do)
        for name in kept:
            check_sha256(folder / name, sums, what_to_do)
        begun = {
            stem: _check_begun(folder / shard_name(stem, whole), inside, shard_rows, *layout[stem], sums, what_to_do)
            for stem in (layout if inside else ())
        }
        writer.sha256 = {name: sums[name] for name in kept}
        stay = {*kept, *(at.name for at, _ in begun.values())}
        for path in shard_files(folder, layout):
            if path.name not in stay:
                path.unlink()
        for stem, (at, digest) in begun.items():
            part, size = folder / (shard_name(stem, whole) + _PART), npy_size(inside, *layout[stem])
            os.replace(at, part)
            file = open(part, "r+b")  # noqa: SIM115 - stays open
            file.write(npy_header(shard_rows, *layout[stem]))
            file.truncate(size)
            file.seek(size)
            writer._open[stem] = (file, digest)
        return writer

    def _begin(self) -> None:
        for stem, (columns, dtype) in self.layout.items():
            path = self.folder / (shard_name(stem, self.rows // self.shard_rows) + _PART)
            header = npy_header(self.shard_rows, columns, dtype)
            with full_disk_named(self.folder, path):
                file = open(path, "w+b")  # noqa: SIM115 - stays open
                self._open[stem] = (file, hashlib.sha256(header))
                file.write(header)

    def _end(self) -> None:
        for file, digest in self._open.values():
            with full_disk_named(self.folder, file.name):
                file.flush()
                os.fsync(file.fileno())
            file.close()
            path = Path(file.name)
            os.replace(path, path.with_suffix(""))
            self.sha256[path.with_suffix("").name] = digest.hexdigest()
        self._open = {}


def shard_files(folder: Path, stems: Any) -> Iterator[Path]:
    """Every shard of these arrays in the folder, whole or not."""
    for stem in stems:
        yield from sorted(folder.glob(f"{stem}-[0-9]*.npy"))
        yield from sorted(folder.glob(f"{stem}-[0-9]*.npy{_PART}"))


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def full_disk_named(folder: Path, file: str | Path) -> Iterator[None]:
    """A full disk is reported with what to do; other errors pass as they are."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise OSError(
            error.errno,
            f"path: no room to write {file} ({os.strerror(error.errno)}). What was saved before is safe in {folder}: "
            "free some space and run collect again with the same inputs to go on from there",
        ) from error
