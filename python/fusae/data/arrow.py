# SPDX-License-Identifier: Apache-2.0
"""Text columns of Parquet files, Arrow files and Hugging Face data sets on disk, read batch by batch with pyarrow.

A data set on disk is what ``save_to_disk`` of the library `datasets` writes (of one split, or of several), or a folder
of its cache. The library itself is not needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SUFFIXES = (".arrow", ".parquet")
_INFO, _STATE, _DICT = "dataset_info.json", "state.json", "dataset_dict.json"
_ROWS = 1024  # that are Python strings at a time
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def is_dataset(path: Path) -> bool:
    """Whether the folder `path` is a data set on disk (or the folder of one of its splits)."""
    return (path / _DICT).exists() or (path / _STATE).exists() or (path / _INFO).exists() and any(path.glob("*.arrow"))


def iter_dataset(path: Path, column: str, split: str | None) -> Iterator[str | None]:
    """The texts in `column` of a data set on disk; raises `ValueError` for a split or a column that it does not have,
    and for damaged or missing files."""
    if (path / _DICT).exists():
        split = _choose(path, split, list(_field(path / _DICT, "splits")))
        if not (path / split / _STATE).exists():
            raise ValueError(f"path: {path / split} is missing or holds no {_STATE}, which {path / _DICT} lists")
        path, split = path / split, None
    if (path / _STATE).exists():
        names = _saved(path, split)
    else:
        names = _cached(path, _choose(path, split, list(_field(path / _INFO, "splits"))))
    for name in names:
        if not (path / name).exists():
            raise ValueError(f"path: {path / name} is missing; the data set {path} has {len(names)} such files")
    for name in names:
        yield from iter_file(path / name, column)


def _saved(path: Path, split: str | None) -> list[str]:
    state = _json(path / _STATE)
    own = state.get("_split")
    if split is not None and split != own:
        has = f"is the split {own!r}" if own else "has no splits"
        raise ValueError(f"split: {path} {has}, got {split!r}; leave it out")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise ValueError(f"path: {path} keeps its order in a file of indices; save it again after flatten_indices()")
    return [entry["filename"] for entry in _field(path / _STATE, "_data_files")]


def _cached(path: Path, split: str) -> list[str]:
    pattern = re.compile(rf"(?!cache-).+-{re.escape(split)}(?:-\d{{5}}-of-(\d{{5}}))?\.arrow")
    names = sorted(file.name for file in path.glob("*.arrow") if pattern.fullmatch(file.name))
    wanted = {int(pattern.fullmatch(name)[1] or 1) for name in names}
    if wanted != {len(names)}:
        raise ValueError(f"path: {path} has {len(names)} Arrow files of the split {split!r}, not all or not of one set")
    return names


def _choose(path: Path, split: str | None, splits: list[str]) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    if split not in splits:
        asked = "choose one" if split is None else f"got {split!r}"
        raise ValueError(f"split: {path} has the splits {', '.join(splits) or '(none)'}; {asked}")
    return split


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"path: {path} is missing or damaged ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"path: {path} is damaged (it holds no JSON object)")
    return content


def _field(path: Path, name: str) -> Any:
    value = _json(path).get(name)
    if not value:
        raise ValueError(f"path: {path} says nothing of {name!r}, so what the data set holds is not known")
    return value


def iter_file(path: Path, column: str) -> Iterator[str | None]:
    """The texts in `column` of a Parquet file or an Arrow file (stream or file format)."""
    with _reading(path) as pyarrow:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
                _check_column(pyarrow, path, file.schema_arrow, column)
                for batch in file.iter_batches(_ROWS, columns=[column]):
                    yield from batch.column(0).to_pylist()
            return
        with pyarrow.memory_map(str(path)) as source:
            start = source.read(6)
            if start != b"ARROW1":
                # A stream that was cut between two batches reads like a shorter one: its end is marked.
                source.seek(max(0, source.size() - len(_END_OF_STREAM)))
                if source.read() != _END_OF_STREAM:
                    raise ValueError(f"path: {path} is truncated or no Arrow file (its end is not marked)")
            source.seek(0)
            reader = pyarrow.ipc.open_file(source) if start == b"ARROW1" else pyarrow.ipc.open_stream(source)
            _check_column(pyarrow, path, reader.schema, column)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if start == b"ARROW1" else reader
            for batch in batches:
                texts = batch.column(column)
                for first in range(0, len(texts), _ROWS):
                    yield from texts.slice(first, _ROWS).to_pylist()


def _check_column(pyarrow: Any, path: Path, schema: Any, column: str) -> None:
    if schema.names.count(column) != 1:
        raise ValueError(f"column: {path} has no column {column!r}; it has {schema.names}")
    kind = schema.field(column).type
    text = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    tests = ("is_string", "is_large_string", "is_string_view")
    if not any(getattr(pyarrow.types, test, lambda _: False)(text) for test in tests):
        texts = [field.name for field in schema if pyarrow.types.is_string(field.type)]
        raise ValueError(f"column: {column!r} of {path} holds {kind}, not text; columns of text: {texts}")


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    try:
        import pyarrow
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"reading {path} needs 'pyarrow': pip install 'fusae[text]'", name="pyarrow"
        ) from None
    try:
        yield pyarrow
    except (pyarrow.ArrowException, OSError) as error:
        first = str(error).splitlines()[:1] or [type(error).__name__]
        raise ValueError(f"path: {path} is damaged, truncated or of another format ({first[0]})") from error
