# SPDX-License-Identifier: Apache-2.0
"""Documents from files, a train / held-out split that depends on nothing but the document, and token chunks."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Literal

from . import arrow

_PLAIN = (".csv", ".jsonl", ".txt")
_SUFFIXES = (*_PLAIN, *(f"{suffix}.gz" for suffix in _PLAIN), *arrow.SUFFIXES)
_KINDS = f"{', '.join(_PLAIN)} (or these with .gz), {', '.join(arrow.SUFFIXES)}"


def iter_documents(path: str | Path, column: str = "text", split: str | None = None) -> Iterator[str]:
    """Documents of a file, a folder or a data set, in their order, one at a time; blank ones are left out.

    Args:
        path: a ``.csv`` or ``.jsonl`` file (one document a row, in `column`), a ``.txt`` file (one document), each also
            as ``.gz``; a ``.parquet`` or ``.arrow`` file; a ``.zip`` of text files; a folder of such files (in the
            order of their names; hidden ones are passed over); or a Hugging Face data set on disk, as ``save_to_disk``
            writes it or from the cache. UTF-8.
        column: the column (csv, Parquet, Arrow) or key (jsonl) that holds the text.
        split: which split of a data set. In a folder of files: those in a folder of that name, and those named
            ``train.jsonl``, ``train-00000-of-00002.parquet`` and the like. None: all there is, where that is one split
            or a folder of files.

    Raises `FileNotFoundError`, `ModuleNotFoundError` without pyarrow where it is needed, or `ValueError` for another
    kind of file, a missing column or split, a damaged file, or one without any text. Errors name the file; they come
    when it is read.
    """
    rows, found = 0, False
    for rows, document in enumerate(_iter_texts(Path(path), column, split), 1):  # noqa: B007
        if document and document.strip():
            found = True
            yield document
    if not found:
        raise ValueError(f"path: {path} holds no text: {rows} rows (column {column!r}), all of them blank")


def _iter_texts(path: Path, column: str, split: str | None) -> Iterator[str | None]:
    if path.is_dir() and arrow.is_dataset(path):
        yield from arrow.iter_dataset(path, column, split)
    elif path.is_dir():
        for file in _files_of(path, split):
            yield from _iter_file(file, column)
    elif not path.exists():
        raise FileNotFoundError(f"path: no file or folder at {path}")
    elif split is not None:
        raise ValueError(f"split: {path} is one file, which has no splits, got {split!r}; leave it out")
    elif path.suffix == ".zip":
        yield from _iter_zip(path, column)
    elif path.name.endswith(_SUFFIXES):
        yield from _iter_file(path, column)
    else:
        raise ValueError(f"path: {path} must end in {_KINDS} or .zip, or be a folder")


def _files_of(folder: Path, split: str | None) -> list[Path]:
    files = {file.relative_to(folder): file for file in folder.rglob("*") if file.name.endswith(_SUFFIXES)}
    files = {name: file for name, file in files.items() if file.is_file() and not _is_hidden(name.parts)}
    if not files:
        raise ValueError(f"path: no {_KINDS} file in {folder}")
    if split is not None:
        of_split = re.compile(rf"{re.escape(split)}([-_.].*)?")
        chosen = {n: f for n, f in files.items() if split in n.parts[:-1] or of_split.fullmatch(n.name)}
        if not chosen:
            raise ValueError(f"split: no file of {folder} is of the split {split!r}; it has {_some(files)}")
        files = chosen
    return [files[name] for name in sorted(files)]


def _is_hidden(parts: tuple[str, ...]) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in parts)


def _some(names: Iterable[Any]) -> str:
    listed = sorted(map(str, names))
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")


def _iter_file(path: Path, column: str) -> Iterator[str | None]:
    if path.suffix in arrow.SUFFIXES:
        yield from arrow.iter_file(path, column)
    else:
        with open(path, "rb") as file:
            yield from _parse(file, str(path), column)


def _iter_zip(path: Path, column: str) -> Iterator[str | None]:
    suffixes = tuple(suffix for suffix in _SUFFIXES if suffix not in arrow.SUFFIXES)
    try:
        with zipfile.ZipFile(path) as archive:
            every = archive.namelist()
            names = sorted(n for n in every if n.endswith(suffixes) and not _is_hidden(Path(n).parts))
            if not names:
                raise ValueError(f"path: no {', '.join(suffixes)} file in {path}; it has {_some(every) or 'nothing'}")
            for name in names:
                with archive.open(name) as file:
                    yield from _parse(file, f"{path}/{name}", column)
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise ValueError(f"path: {path} is no zip file or is damaged ({error})") from error
    except (RuntimeError, NotImplementedError) as error:  # a password, or a rare compression
        raise ValueError(f"path: {path} cannot be unpacked ({error})") from error


def _parse(file: IO[bytes], name: str, column: str) -> Iterator[str | None]:
    kind = Path(name.removesuffix(".gz")).suffix
    source = gzip.GzipFile(fileobj=file) if name.endswith(".gz") else file
    text = io.TextIOWrapper(source, encoding="utf-8-sig", newline="")  # type: ignore[arg-type]
    try:
        if kind == ".txt":
            yield text.read()
        elif kind == ".jsonl":
            yield from _parse_jsonl(text, name, column)
        else:
            csv.field_size_limit(1 << 30)  # the default, 128 KiB, is shorter than some articles
            reader = csv.DictReader(text)
            if column not in (reader.fieldnames or ()):
                raise ValueError(f"column: {name} has no column {column!r}; it has {reader.fieldnames}")
            for row in reader:
                yield row[column]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"path: {name} is damaged or not UTF-8 text ({error})") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        if source is file:
            raise
        raise ValueError(f"path: {name} is no gzip file, truncated or damaged ({error})") from error
    finally:
        text.detach()  # who opened the file closes it


def _parse_jsonl(lines: Iterable[str], name: str, column: str) -> Iterator[str | None]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"path: line {number} of {name} is damaged ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"path: line {number} of {name} must be an object, got a {type(row).__name__}")
        if column not in row:
            raise ValueError(f"column: line {number} of {name} has no key {column!r}; it has {list(row)}")
        if not isinstance(row[column], str | None):
            raise ValueError(
                f"column: {column!r} in line {number} of {name} must be a string, got a {type(row[column]).__name__}"
            )
        yield row[column]


def _digest(document: str) -> bytes:
    return hashlib.sha1(document.encode("utf-8", "surrogatepass")).digest()


def _number(digest: bytes) -> int:
    """The first 8 bytes of a sha1, as a number below 2⁶⁴."""
    return int.from_bytes(digest[:8], "big")


def is_held_out(document: str, share: float = 0.05) -> bool:
    """Whether a document belongs to the held-out part: sha1 of its UTF-8 bytes, read as a fraction of 1, is below
    `share`.

    It depends on the document alone, so a text keeps its side when a corpus grows, and two copies land on the same
    side.
    """
    return _number(_digest(document)) < share * 2**64


def split_documents(documents: Iterable[str], held_out_share: float = 0.05) -> tuple[list[str], list[str]]:
    """``(train, held_out)``: exact duplicates removed, each part in the order of the documents' sha1.

    That order is a shuffle that needs no seed, so the first documents of a part are a fair sample of it.
    """
    _check_share(held_out_share)
    unique = {_digest(document): document for document in documents}
    parts: tuple[list[str], list[str]] = ([], [])
    for digest in sorted(unique):
        parts[is_held_out(unique[digest], held_out_share)].append(unique[digest])
    return parts


def iter_part(
    documents: Iterable[str], part: Literal["train", "held_out"], held_out_share: float = 0.05
) -> Iterator[str]:
    """The documents of one part of `split_documents`, as a stream: in their own order, exact duplicates left out.

    For texts that do not fit into memory: only 8 bytes of each document's sha1 are kept (about 100 bytes of memory a
    document).
    """
    if part not in ("train", "held_out"):
        raise ValueError(f"part must be 'train' or 'held_out', got {part!r}")
    _check_share(held_out_share)
    return _iter_part(documents, part == "held_out", held_out_share)


def _iter_part(documents: Iterable[str], held_out: bool, share: float) -> Iterator[str]:
    seen: set[int] = set()
    for document in documents:
        number = _number(_digest(document))
        if (number < share * 2**64) == held_out and number not in seen:
            seen.add(number)
            yield document


def _check_share(held_out_share: float) -> None:
    if not 0.0 <= held_out_share <= 1.0:
        raise ValueError(f"held_out_share must lie in 0..1, got {held_out_share}")
