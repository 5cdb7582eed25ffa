# SPDX-License-Identifier: Apache-2.0
"""Documents from files, a train / held-out split that depends on nothing but the document, and token chunks."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from .tokens import TokenChunks

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SUFFIXES = (".csv", ".jsonl", ".txt")


def iter_documents(path: str | Path, column: str = "text") -> Iterator[str]:
    """Documents of a file, in its order; blank ones are left out.

    Args:
        path: a ``.csv`` or ``.jsonl`` file (one document a row, in `column`), a ``.txt`` file (one document), or a
            ``.zip`` or a folder of such files (in the order of their names). UTF-8.
        column: the column (csv) or key (jsonl) that holds the text.

    Raises `FileNotFoundError`, or `ValueError` for another kind of file, a missing column or a damaged zip.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in _SUFFIXES)
        if not files:
            raise ValueError(f"path: no {', '.join(_SUFFIXES)} file in {path}")
        for file in files:
            yield from iter_documents(file, column)
    elif not path.exists():
        raise FileNotFoundError(f"path: no file or folder at {path}")
    elif path.suffix == ".zip":
        yield from _iter_zip(path, column)
    elif path.suffix in _SUFFIXES:
        with open(path, "rb") as file:
            yield from _parse(file, str(path), column)
    else:
        raise ValueError(f"path: {path} must end in {', '.join(_SUFFIXES)} or .zip, or be a folder")


def _iter_zip(path: Path, column: str) -> Iterator[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(name for name in archive.namelist() if name.endswith(_SUFFIXES))
            if not names:
                raise ValueError(f"path: no {', '.join(_SUFFIXES)} file in {path}")
            for name in names:
                with archive.open(name) as file:
                    yield from _parse(file, f"{path}/{name}", column)
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"path: {path} is no zip file or is damaged ({error})") from error


def _parse(file: IO[bytes], name: str, column: str) -> Iterator[str]:
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    try:
        if name.endswith(".txt"):
            rows = iter([text.read()])
        elif name.endswith(".jsonl"):
            rows = (json.loads(line)[column] for line in text if line.strip())
        else:
            csv.field_size_limit(1 << 30)  # the default, 128 KiB, is shorter than some articles
            reader = csv.DictReader(text)
            if column not in (reader.fieldnames or ()):
                raise ValueError(f"column: {name} has no column {column!r}; it has {reader.fieldnames}")
            rows = (row[column] for row in reader)
        for document in rows:
            if document and document.strip():
                yield document
    except KeyError as error:
        raise ValueError(f"column: a line of {name} has no key {error}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise ValueError(f"path: {name} is damaged or not UTF-8 text ({error})") from error


def _digest(document: str) -> bytes:
    return hashlib.sha1(document.encode("utf-8", "surrogatepass")).digest()


def is_held_out(document: str, share: float = 0.05) -> bool:
    """Whether a document belongs to the held-out part: sha1 of its UTF-8 bytes, read as a fraction of 1, is below
    `share`.

    It depends on the document alone, so a text keeps its side when a corpus grows, and two copies land on the same
    side.
    """
    return int.from_bytes(_digest(document)[:8], "big") < share * 2**64


def split_documents(documents: Iterable[str], held_out_share: float = 0.05) -> tuple[list[str], list[str]]:
    """``(train, held_out)``: exact duplicates removed, each part in the order of the documents' sha1.

    That order is a shuffle that needs no seed, so the first documents of a part are a fair sample of it.
    """
    if not 0.0 <= held_out_share <= 1.0:
        raise ValueError(f"held_out_share must lie in 0..1, got {held_out_share}")
    unique = {_digest(document): document for document in documents}
    parts: tuple[list[str], list[str]] = ([], [])
    for digest in sorted(unique):
        parts[is_held_out(unique[digest], held_out_share)].append(unique[digest])
    return parts


def tokenize(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    ctx: int = 128,
    separator: str | None = "<|endoftext|>",
    limit: int | None = None,
) -> TokenChunks:
    """`TokenChunks` ``[chunks, ctx]``, uint16 where the vocabulary fits, else int32.

    Each document is cut into pieces of ``ctx - 1`` tokens and `separator` is put before each, so position 0 of every
    chunk is the same token: models use the first position as an attention sink, and it is dropped later. A chunk never
    mixes two documents; what is left at a document's end (less than a piece) is not used. With ``separator=None``
    pieces are `ctx` long.

    Args:
        limit: stop after so many chunks.

    Raises `ValueError` for ``ctx < 2``, a separator that is no token of the vocabulary, or text too short for one
    chunk.
    """
    if ctx < 2:
        raise ValueError(f"ctx must be at least 2, got {ctx}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 or None, got {limit}")
    head: list[int] = []
    if separator is not None:
        token = tokenizer.token_to_id(separator)
        if token is None:
            raise ValueError(f"separator: {separator!r} is no token of this vocabulary; pass one that is, or None")
        head = [token]
    piece = ctx - len(head)
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.int32
    chunks: list[np.ndarray] = []
    for block in _blocks(documents, 64):
        for encoding in tokenizer.encode_batch(block, add_special_tokens=False):
            ids = encoding.ids
            for start in range(0, len(ids) - piece + 1, piece):
                chunks.append(np.asarray(head + ids[start : start + piece], dtype=dtype))
        if limit is not None and len(chunks) >= limit:
            break
    if not chunks:
        raise ValueError(f"documents: none of them has the {piece} tokens that one chunk of ctx {ctx} needs")
    return TokenChunks(np.stack(chunks[:limit]), np.full(len(chunks[:limit]), ctx, np.int32), 0, tuple(head))


def _blocks(documents: Iterable[str], size: int) -> Iterator[list[str]]:
    block: list[str] = []
    for document in documents:
        block.append(document)
        if len(block) == size:
            yield block
            block = []
    if block:
        yield block
