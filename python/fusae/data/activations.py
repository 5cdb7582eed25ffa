# SPDX-License-Identifier: Apache-2.0
"""Activations on disk: a memory-mapped array of rows, where each came from, and shuffled batches of them.

A folder holds three files:

====================  =============================================================================================
``rows.npy``          ``[rows, d]`` float16 or float32
``positions.npy``     ``[rows, 2]`` int32: chunk and position of each row; sorted
``activations.json``  what they are of: inputs (with sha256), counts, what was dropped, sha256 of the two arrays
====================  =============================================================================================

`fusae.data.collect` writes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FORMAT = "fusae-activations-1"
META, ROWS, POSITIONS = "activations.json", "rows.npy", "positions.npy"
_AGAIN = "collect it again with overwrite=True"


class Activations:
    """Rows ``[rows, d]`` captured from a model, memory-mapped from a folder.

    Attributes:
        rows: ``[rows, d]`` float16 or float32, a read-only `numpy.memmap`.
        positions: ``[rows, 2]`` int32, (chunk, position) of each row, sorted by both.
        meta: the content of ``activations.json``.
    """

    def __init__(self, path: str | Path, verify: bool = True) -> None:
        """Open the folder `path`. With `verify` the sha256 of both arrays is checked (about a second per GB).

        Raises `FileNotFoundError` if there is none, `ValueError` if it is unfinished, truncated, damaged or something
        else.
        """
        self.path = Path(path)
        self.meta = read_meta(self.path)
        if not self.meta["complete"]:
            done, total = self.meta["cursor"]["chunks"], self.meta["inputs"]["chunks"]
            raise ValueError(
                f"path: {self.path} is unfinished ({done} of {total} chunks); run collect again with the same inputs "
                "to go on from there"
            )
        count, width = self.meta["rows"], self.meta["d"]
        self.rows = self._map(ROWS, (count, width), self.meta["inputs"]["dtype"], verify)
        self.positions = self._map(POSITIONS, (count, 2), "int32", verify)
        self._mean: Tensor | None = None

    def _map(self, name: str, shape: tuple[int, int], dtype: str, verify: bool) -> np.ndarray:
        path = self.path / name
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"path: {path} is missing, truncated or damaged ({error}); {_AGAIN}") from error
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(
                f"path: {path} holds {list(array.shape)} {array.dtype}, its description says {list(shape)} {dtype}; "
                f"{_AGAIN}"
            )
        if verify and (found := file_sha256(path)) != self.meta["sha256"][name]:
            raise ValueError(
                f"path: {path} has sha256 {found[:16]}…, its description says {self.meta['sha256'][name][:16]}…: "
                f"it is damaged; {_AGAIN}"
            )
        return array

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, d)``"""
        return self.rows.shape

    def __len__(self) -> int:
        return self.rows.shape[0]

    def __repr__(self) -> str:
        inputs = self.meta["inputs"]
        return (
            f"Activations({list(self.shape)} {inputs['dtype']}, {inputs['module']} of {inputs['source']}, {self.path})"
        )

    @property
    def norm_limit(self) -> float | None:
        """Rows with a larger norm were dropped; None where that was switched off."""
        return self.meta["norm_limit"]

    @property
    def dropped(self) -> dict[str, int]:
        """``{"first_positions": rows, "norm_outliers": rows}`` that are not in the array."""
        return dict(self.meta["dropped"])

    def mean(self) -> Tensor:
        """The mean row ``[d]`` in float64, over all rows; computed once."""
        if self._mean is None:
            total = torch.zeros(self.shape[1], dtype=torch.float64)
            for start in range(0, len(self), 8192):
                total += torch.from_numpy(self.rows[start : start + 8192].astype(np.float64)).sum(0)
            self._mean = total / len(self)
        return self._mean

    def take(self, index: Any) -> Tensor:
        """Rows as an fp32 tensor ``[n, d]``; `index` is a slice or an integer array."""
        # Copies only what is a read-only view of the file; an integer array has copied already.
        return torch.from_numpy(np.require(self.rows[index], requirements=["C", "W"])).float()

    def batches(
        self,
        batch_size: int,
        seed: int = 0,
        epochs: int | None = 1,
        *,
        shuffle: bool = True,
        drop_last: bool = True,
    ) -> Batches:
        """Shuffled fp32 batches ``[batch_size, d]`` of torch tensors; see `Batches`."""
        return Batches(self, batch_size, seed, epochs, shuffle=shuffle, drop_last=drop_last)


class Batches:
    """Batches of rows, each epoch in a new order; the order is a function of `seed` and the epoch alone.

    An iterator. `state_dict()` names the next batch; `load_state_dict()` on a new object goes on from there with the
    same batches the first would have given. ``epochs=None`` never ends. With ``shuffle=False`` rows come in their
    order. Each epoch's last, smaller batch is left out unless ``drop_last=False``.
    """

    def __init__(
        self,
        activations: Activations,
        batch_size: int,
        seed: int = 0,
        epochs: int | None = 1,
        *,
        shuffle: bool = True,
        drop_last: bool = True,
    ) -> None:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
        if drop_last and batch_size > len(activations):
            raise ValueError(
                f"batch_size {batch_size} exceeds the {len(activations)} rows, so there would be no batch at all; "
                "take a smaller one or drop_last=False"
            )
        if epochs is not None and epochs < 0:
            raise ValueError(f"epochs must be at least 0, or None for no end, got {epochs}")
        self._activations, self.batch_size, self.seed, self.epochs = activations, batch_size, seed, epochs
        self._shuffle, self._drop_last = shuffle, drop_last
        self._epoch = self._batch = 0
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def per_epoch(self) -> int:
        """Batches in an epoch."""
        rows = len(self._activations)
        return rows // self.batch_size if self._drop_last else -(-rows // self.batch_size)

    def __len__(self) -> int:
        """Batches in all epochs, those already given included."""
        if self.epochs is None:
            raise TypeError("batches with epochs=None have no length")
        return self.per_epoch * self.epochs

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        if self._batch >= self.per_epoch:
            self._epoch, self._batch = self._epoch + 1, 0
        if (self.epochs is not None and self._epoch >= self.epochs) or self.per_epoch == 0:
            raise StopIteration
        start = self._batch * self.batch_size
        self._batch += 1
        rows = slice(start, start + self.batch_size)
        if not self._shuffle:
            return self._activations.take(rows)
        # Sorted within the batch: the order of rows there means nothing, and reading forward is kinder to a disk.
        return self._activations.take(np.sort(self._permutation()[rows]))

    def _permutation(self) -> np.ndarray:
        if self._order is None or self._order[0] != self._epoch:
            order = np.random.default_rng([self.seed, self._epoch]).permutation(len(self._activations))
            self._order = (self._epoch, order)
        return self._order[1]

    def _identity(self) -> dict[str, Any]:
        return {
            "rows": len(self._activations),
            "sha256": self._activations.meta["sha256"][ROWS],
            "batch_size": self.batch_size,
            "seed": self.seed,
            "shuffle": self._shuffle,
            "drop_last": self._drop_last,
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain values (JSON) that name the next batch."""
        return {"epoch": self._epoch, "batch": self._batch, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at `state`. Raises `ValueError` if it is of other rows, another seed or another batch size."""
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                raise ValueError(f"state: {name} is {state.get(name)!r}, these batches have {mine!r}")
        epoch, batch = state.get("epoch"), state.get("batch")
        if not (isinstance(epoch, int) and isinstance(batch, int) and epoch >= 0 and 0 <= batch <= self.per_epoch):
            raise ValueError(
                f"state: epoch {epoch!r}, batch {batch!r} is no place in {self.per_epoch} batches an epoch"
            )
        self._epoch, self._batch = epoch, batch


def read_meta(path: Path) -> dict[str, Any]:
    """The description in the folder `path`; `FileNotFoundError` or `ValueError` if there is none that can be used."""
    file = path / META
    if not file.exists():
        raise FileNotFoundError(f"path: {path} holds no activations ({META} is not there)")
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
        if meta["format"] != FORMAT:
            raise ValueError(f"format is {meta['format']!r}, expected {FORMAT!r}")
        absent = {"complete", "cursor", "inputs", "rows", "d", "dropped", "norm_limit", "sha256"} - set(meta)
        if absent:
            raise ValueError(f"it lacks {sorted(absent)}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"path: {file} is damaged or of another format ({error})") from error
    return meta


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
