# SPDX-License-Identifier: Apache-2.0
"""The folder of activations while it grows: its description always names a prefix that is safely on disk."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .activations import AGAIN, FORMAT, META, Activations, read_meta
from .kept import REASONS
from .shards import ShardWriter, full_disk_named, shard_files, sync_folder
from .storage import POSITIONS, ROWS, SCALES, StorageLoss, decode, encode, layout_of


@dataclasses.dataclass(frozen=True)
class _Cursor:
    """What was appended: whole batches."""

    batches: int = 0
    chunks: int = 0
    rows: int = 0
    dropped: tuple[int, ...] = (0,) * len(REASONS)
    norm_limits: tuple[float, ...] | None = None


class Writer:
    """Appends rows to the folder `path`, placed where its content ends; a context manager.

    On opening, what a run that was killed wrote beyond the cursor is cut off. On leaving the cursor is saved, whatever
    the reason, unless the files could not be written. One process at a time: the folder is locked.

    Args:
        order: the chunks of each batch of `batch_size`, in the order in which they are to be appended.

    Attributes:
        complete: all is there; nothing is to be appended.

    Raises `ValueError` if the folder holds something else or damaged shards and `overwrite` is false; nothing is
    changed then.
    """

    def __init__(
        self,
        path: Path,
        inputs: dict[str, Any],
        source: str,
        batch_size: int,
        order: list[np.ndarray],
        overwrite: bool,
    ) -> None:
        self.path, self.inputs, self.source, self.batch_size, self._order = path, inputs, source, batch_size, order
        self._at = _Cursor()
        self._sites: list[dict[str, Any]] = []
        self._shard_rows = 0
        self._shards: ShardWriter | None = None
        self._loss: StorageLoss | None = None
        self._overwrite = overwrite
        self.complete = False

    def __enter__(self) -> Writer:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            self._claim()
            self._open()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        try:
            # After an OSError the files may lack what the cursor counts; a torn append ends in the middle of rows.
            whole = self._shards is not None and not self._shards.torn and self._shards.rows == self._at.rows
            if whole and not self.complete and not isinstance(error, OSError):
                self.save()
        finally:
            if self._shards is not None:
                self._shards.close()
            os.close(self._lock)

    @property
    def begun(self) -> bool:
        """Whether widths and files are known."""
        return self._shards is not None

    @property
    def batches(self) -> int:
        """Batches appended so far."""
        return self._at.batches

    @property
    def widths(self) -> list[int]:
        return [site["width"] for site in self._sites]

    @property
    def norm_limits(self) -> tuple[float, ...] | None:
        return self._at.norm_limits

    def begin(self, sites: list[dict[str, Any]], shard_rows: int) -> None:
        """Empty the folder of other activations and describe the new ones."""
        self._sites, self._shard_rows = sites, shard_rows
        old = list(shard_files(self.path, (ROWS, SCALES, POSITIONS)))
        if (self.path / META).exists():
            (self.path / META).unlink()
            old += [self.path / "rows.npy", self.path / "positions.npy"]  # of format 1
        for file in old:
            file.unlink(missing_ok=True)
        self._shards = ShardWriter(self.path, layout_of(self.inputs["dtype"], self.widths), shard_rows)
        self._loss = StorageLoss(sum(self.widths))
        self.save()

    def append(
        self, x: Tensor, positions: np.ndarray, chunks: int, dropped: dict[str, int], limits: list[float] | None
    ) -> None:
        """The kept rows ``[n, d]`` fp32 of one batch of `chunks` chunks, with their positions ``[n, 2]`` int32."""
        assert self._shards is not None and self._loss is not None
        dtype = self.inputs["dtype"]
        arrays = encode(x, dtype, self.widths)
        self._shards.append({**arrays, POSITIONS: np.ascontiguousarray(positions)})
        self._loss.add(x, decode(arrays[ROWS], arrays.get(SCALES), dtype, self.widths))
        was = self._at
        # One assignment: wherever Ctrl-C strikes, the cursor names whole batches or is seen not to.
        self._at = _Cursor(
            was.batches + 1,
            was.chunks + chunks,
            was.rows + len(x),
            tuple(count + dropped[reason] for count, reason in zip(was.dropped, REASONS, strict=True)),
            None if limits is None else tuple(limits),
        )

    def save(self) -> None:
        """Make all that was appended safe, then name it in the description."""
        assert self._shards is not None
        self._describe(self._shards.sync()["sha256"])

    def finish(self) -> None:
        """Name the last shard, and say that all is there."""
        assert self._shards is not None
        if self._at.rows == 0:
            raise ValueError(
                f"skip_positions and the other options leave no row at all (dropped: {self._dropped()}); check the "
                "model and the chunks"
            )
        assert self._at.batches == len(self._order)
        self.save()
        self._shards.finish()
        self.complete = True
        self._describe(self._shards.sha256)

    def _claim(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"path: another process is collecting into {self.path}; wait for it or choose another folder"
            ) from None

    def _open(self) -> None:
        if not (self.path / META).exists():
            strays = [file.name for file in shard_files(self.path, (ROWS, SCALES, POSITIONS))]
            if strays and not self._overwrite:
                raise ValueError(
                    f"path: {self.path} holds {strays[0]} but no {META} that says what it is; put that back, choose "
                    "another folder or pass overwrite=True"
                )
            return
        try:
            meta = read_meta(self.path)
            self._check_same(meta)
            if meta["complete"]:
                Activations(self.path)
                self.complete = True
            else:
                self._continue(meta)
        except ValueError:
            if not self._overwrite:
                raise

    def _check_same(self, meta: dict[str, Any]) -> None:
        inputs = self.inputs
        other = [name for name, value in inputs.items() if meta["inputs"].get(name) != value]
        if other:
            was = ", ".join(f"{name} {meta['inputs'].get(name)!r} (now {inputs[name]!r})" for name in other)
            raise ValueError(
                f"path: {self.path} holds activations of other inputs: {was}. Choose another folder or pass "
                "overwrite=True."
            )
        if not meta["complete"] and meta["cursor"].get("batch_size") != self.batch_size:
            raise ValueError(
                f"batch_size: {self.path} was begun with batches of {meta['cursor'].get('batch_size')} chunks, got "
                f"{self.batch_size}; go on with the same, or begin anew with overwrite=True"
            )

    def _continue(self, meta: dict[str, Any]) -> None:
        cursor, shard_rows = meta["cursor"], meta["storage"]["shard_rows"]
        widths = [site["width"] for site in meta["sites"]]
        loss, limits = StorageLoss(meta["d"]), meta["norm_limit"]
        try:
            loss.load_state_dict(cursor["loss"])
            dropped = tuple(int(meta["dropped"][reason]) for reason in REASONS)
            at = _Cursor(
                int(cursor["batches"]),
                int(cursor["chunks"]),
                meta["rows"],
                dropped,
                None if limits is None else tuple(limits),
            )
            if at.chunks != sum(map(len, self._order[: at.batches])) or not 0 <= at.batches <= len(self._order):
                raise ValueError(f"batch {at.batches} of {len(self._order)} cannot be after {at.chunks} chunks")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"path: {self.path / META} is damaged (its cursor: {error}); {AGAIN}") from error
        layout = layout_of(self.inputs["dtype"], widths)
        state = {"rows": meta["rows"], "sha256": meta["sha256"]}
        self._shards = ShardWriter.resume(self.path, layout, shard_rows, state, AGAIN)
        self._sites, self._shard_rows, self._loss, self._at = meta["sites"], shard_rows, loss, at

    def _dropped(self) -> dict[str, int]:
        return dict(zip(REASONS, self._at.dropped, strict=True))

    def _describe(self, sums: dict[str, str]) -> None:
        assert self._loss is not None
        cursor = {"batches": self._at.batches, "chunks": self._at.chunks, "batch_size": self.batch_size}
        if not self.complete:
            cursor["loss"] = self._loss.state_dict()
        meta = {
            "format": FORMAT,
            "complete": self.complete,
            "cursor": cursor,
            "rows": self._at.rows,
            "d": sum(self.widths),
            "sites": self._sites,
            "storage": {"dtype": self.inputs["dtype"], "fvu": self._loss.fvu, "shard_rows": self._shard_rows},
            "norm_limit": self._at.norm_limits,
            "dropped": self._dropped(),
            "sha256": dict(sorted(sums.items())),
            "inputs": {**self.inputs, "source": self.source},
        }
        partial = self.path / f".{META}.part"
        try:
            with full_disk_named(self.path, self.path / META):
                with open(partial, "w", encoding="utf-8") as file:
                    json.dump(meta, file, indent=1)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(partial, self.path / META)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        sync_folder(self.path)
