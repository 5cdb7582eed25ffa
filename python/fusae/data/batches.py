# SPDX-License-Identifier: Apache-2.0
"""Shuffled batches of stored rows, in an order that is a function of the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

# Stores of at most so many bytes are shuffled as a whole where nothing else is asked for.
SHUFFLE_WHOLE = 8 << 30
# Rows in the shuffle buffer of a larger one, and in each run of neighbouring rows that goes into it.
SHUFFLE_ROWS, BLOCK_ROWS = 1 << 20, 256


class Batches:
    """Batches of rows, each epoch in a new order; the order is a function of `seed` and the epoch alone.

    An iterator. `state_dict()` names the next batch; `load_state_dict()` on a new object goes on from there with the
    same batches the first would have given, at once. ``epochs=None`` never ends. With ``shuffle=False`` rows come in
    their order. Each epoch's last, smaller batch is left out unless ``drop_last=False``.

    Args:
        rows: `fusae.data.Activations`, or another object with a length, ``take(index)`` and a `fingerprint`.
        shuffle_rows: how far rows are mixed. Runs of 256 neighbouring rows are put in random order; so many rows of
            that order at a time (whole runs, at least one) are permuted among themselves. The disk then reads forward
            in each run, and the pages of one buffer are all that must fit in memory. As many as there are rows, or
            more: one permutation of all. None: that too for stores of up to 8 GiB, and 1,048,576 rows for larger ones.
    """

    def __init__(
        self,
        rows: Any,
        batch_size: int,
        seed: int = 0,
        epochs: int | None = 1,
        *,
        shuffle: bool = True,
        drop_last: bool = True,
        shuffle_rows: int | None = None,
    ) -> None:
        check_batch_size(batch_size)
        if drop_last and batch_size > len(rows):
            raise ValueError(
                f"batch_size {batch_size} exceeds the {len(rows)} rows, so there would be no batch at all; "
                "take a smaller one or drop_last=False"
            )
        check_epochs(epochs)
        if shuffle_rows is None:
            shuffle_rows = len(rows) if getattr(rows, "bytes", 0) <= SHUFFLE_WHOLE else SHUFFLE_ROWS
        if not isinstance(shuffle_rows, int) or shuffle_rows < 1:
            raise ValueError(f"shuffle_rows must be an integer of at least 1, or None, got {shuffle_rows!r}")
        self._rows, self.batch_size, self.seed, self.epochs = rows, batch_size, seed, epochs
        self._shuffle, self._drop_last = shuffle, drop_last
        self.shuffle_rows = len(rows) if shuffle_rows >= len(rows) else max(1, shuffle_rows // BLOCK_ROWS) * BLOCK_ROWS
        self._epoch = self._batch = 0
        self._blocks: tuple[int, np.ndarray] | None = None
        self._buffer: tuple[tuple[int, int], np.ndarray] | None = None

    @property
    def per_epoch(self) -> int:
        """Batches in an epoch."""
        rows = len(self._rows)
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
        stop = min(start + self.batch_size, len(self._rows))
        self._batch += 1
        if not self._shuffle:
            return self._rows.take(slice(start, stop))
        # Sorted within the batch: the order of rows there means nothing, and reading forward is kinder to a disk.
        return self._rows.take(np.sort(self._order(start, stop)))

    def _order(self, start: int, stop: int) -> np.ndarray:
        """The rows at places ``start:stop`` of this epoch's order."""
        if self.shuffle_rows == len(self._rows):
            return self._shuffled(0)[start:stop]
        parts = []
        for buffer in range(start // self.shuffle_rows, (stop - 1) // self.shuffle_rows + 1):
            first = buffer * self.shuffle_rows
            parts.append(self._shuffled(buffer)[max(start - first, 0) : stop - first])
        self._expect(start + self.shuffle_rows, stop + self.shuffle_rows)
        return np.concatenate(parts)

    def _shuffled(self, buffer: int) -> np.ndarray:
        """The rows of a buffer, permuted; kept for the next call."""
        key = (self._epoch, buffer)
        if self._buffer is None or self._buffer[0] != key:
            if self.shuffle_rows == len(self._rows):
                order = np.random.default_rng([self.seed, self._epoch]).permutation(len(self._rows))
            else:
                if hasattr(self._rows, "release"):
                    self._rows.release()
                first = buffer * self.shuffle_rows
                rows = np.arange(first, min(first + self.shuffle_rows, len(self._rows)))
                # Never [seed, epoch, 0], which is what [seed, epoch] means to numpy.
                generator = np.random.default_rng([self.seed, self._epoch, 1 + buffer])
                order = generator.permutation(self._in_blocks(rows))
            self._buffer = (key, order)
        return self._buffer[1]

    def _in_blocks(self, places: np.ndarray) -> np.ndarray:
        """The rows at these places of the order in which blocks are read."""
        count = -(-len(self._rows) // BLOCK_ROWS)
        if self._blocks is None or self._blocks[0] != self._epoch:
            order = np.random.default_rng([self.seed, self._epoch]).permutation(count)
            # The last block may be shorter; it stays last, so that every place before it is in a full block.
            self._blocks = (self._epoch, np.append(order[order != count - 1], count - 1))
        return self._blocks[1][places // BLOCK_ROWS] * BLOCK_ROWS + places % BLOCK_ROWS

    def _expect(self, start: int, stop: int) -> None:
        """Have the disk read ahead what the next buffer mixes: a batch's worth with every batch."""
        stop = min(stop, len(self._rows))
        if start < stop and hasattr(self._rows, "expect"):
            for first in self._in_blocks(np.arange(start // BLOCK_ROWS * BLOCK_ROWS, stop, BLOCK_ROWS)):
                self._rows.expect(int(first), min(int(first) + BLOCK_ROWS, len(self._rows)))

    def _identity(self) -> dict[str, Any]:
        return {
            "rows": len(self._rows),
            "sha256": self._rows.fingerprint,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "shuffle": self._shuffle,
            "drop_last": self._drop_last,
            "shuffle_rows": self.shuffle_rows,
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain values (JSON) that name the next batch."""
        return {"epoch": self._epoch, "batch": self._batch, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at `state`. Raises `ValueError` if it is of other rows, another seed or another batch size."""
        check_identity(state, self._identity())
        epoch, batch = state.get("epoch"), state.get("batch")
        if not (isinstance(epoch, int) and isinstance(batch, int) and epoch >= 0 and 0 <= batch <= self.per_epoch):
            raise ValueError(
                f"state: epoch {epoch!r}, batch {batch!r} is no place in {self.per_epoch} batches an epoch"
            )
        self._epoch, self._batch = epoch, batch


def check_batch_size(batch_size: Any) -> None:
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}")


def check_epochs(epochs: int | None) -> None:
    if epochs is not None and epochs < 0:
        raise ValueError(f"epochs must be at least 0, or None for no end, got {epochs}")


def check_identity(state: dict[str, Any], mine: dict[str, Any]) -> None:
    for name, value in mine.items():
        if state.get(name) != value:
            raise ValueError(f"state: {name} is {state.get(name)!r}, these batches have {value!r}")
