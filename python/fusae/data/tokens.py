# SPDX-License-Identifier: Apache-2.0
"""Token chunks: pieces of documents as ids ``[chunks, ctx]``, padded on the right where a piece is shorter."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
from torch import Tensor

# Chunks are put in order of length within stretches of so many batches: long enough that batches are nearly even,
# short enough that a run that was stopped can go on at the start of a stretch.
_WINDOW_BATCHES = 32


@dataclasses.dataclass(frozen=True, eq=False)
class TokenChunks:
    """Token ids of chunks, each a piece of one document.

    Attributes:
        ids: ``[chunks, ctx]`` integers (uint16 or int32 from `tokenize`); positions from a chunk's length on hold
            `pad_id`.
        lengths: ``[chunks]`` int32, tokens in use of each, 1 to ctx.
        pad_id: an id of the vocabulary; what it is does not matter, since padding is masked.
        special: ids that are no text: BOS, EOS, separator, padding. A caller may drop their rows.

    ``chunks[a:b]`` and ``chunks[index array]`` are `TokenChunks` of these.

    Raises `TypeError` for ids that are no integers, `ValueError` for shapes that do not fit or no chunk at all.
    """

    ids: np.ndarray
    lengths: np.ndarray
    pad_id: int = 0
    special: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        ids, lengths = self.ids, self.lengths
        if not isinstance(ids, np.ndarray) or not np.issubdtype(ids.dtype, np.integer):
            what = f"dtype {ids.dtype}" if isinstance(ids, np.ndarray | Tensor) else type(ids).__name__
            raise TypeError(f"chunks must be an integer array of token ids [chunks, ctx], got {what}")
        if ids.ndim != 2 or 0 in ids.shape:
            raise ValueError(f"chunks must have shape [chunks, ctx] with at least one chunk, got {list(ids.shape)}")
        if not isinstance(lengths, np.ndarray) or not np.issubdtype(lengths.dtype, np.integer):
            raise TypeError(f"lengths must be an integer array [chunks], got {type(lengths).__name__}")
        if lengths.shape != ids.shape[:1] or lengths.min() < 1 or lengths.max() > ids.shape[1]:
            raise ValueError(
                f"lengths must be [{ids.shape[0]}] integers from 1 to {ids.shape[1]}, got {list(lengths.shape)}"
                + (f" from {lengths.min()} to {lengths.max()}" if lengths.size else "")
            )

    @classmethod
    def of(cls, chunks: TokenChunks | np.ndarray | Tensor) -> TokenChunks:
        """`chunks` itself, or an integer array or tensor ``[chunks, ctx]`` as chunks that are full."""
        if isinstance(chunks, TokenChunks):
            return chunks
        ids = chunks.detach().cpu().numpy() if isinstance(chunks, Tensor) else chunks
        full = ids.shape if isinstance(ids, np.ndarray) and ids.ndim == 2 else (0, 0)
        return cls(ids, np.full(full[0], full[1], dtype=np.int32))

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __repr__(self) -> str:
        return f"TokenChunks({list(self.shape)} {self.ids.dtype}, {self.tokens:,} tokens)"

    @property
    def shape(self) -> tuple[int, int]:
        """``(chunks, ctx)``"""
        return self.ids.shape  # type: ignore[return-value]

    @property
    def tokens(self) -> int:
        """Tokens in use, over all chunks."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def padded(self) -> bool:
        """Whether a chunk is shorter than ctx."""
        return int(self.lengths.min()) < self.shape[1]

    def __getitem__(self, index: slice | np.ndarray) -> TokenChunks:
        if not isinstance(index, slice | np.ndarray):
            raise TypeError(f"chunks[...] takes a slice or an index array (row(i) gives one chunk), got {index!r}")
        return dataclasses.replace(self, ids=self.ids[index], lengths=self.lengths[index])

    def row(self, chunk: int) -> np.ndarray:
        """The ids in use of one chunk, ``[length]``."""
        return self.ids[chunk, : self.lengths[chunk]]

    def sha256(self) -> str:
        """Over ids and lengths; padding, `special` and the integers' dtype do not enter.

        Equivalent to, for full chunks: ``hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()``
        """
        digest, positions = hashlib.sha256(), np.arange(self.shape[1])
        for start in range(0, len(self), 4096):
            part = self[start : start + 4096]
            used = np.where(positions < part.lengths[:, None], part.ids, 0) if part.padded else part.ids
            digest.update(np.ascontiguousarray(used, dtype="<i8"))
        if self.padded:
            digest.update(np.ascontiguousarray(self.lengths, dtype="<i8"))
        return digest.hexdigest()

    def batches(self, batch_size: int, window: int | None = None) -> list[np.ndarray]:
        """Index arrays of `batch_size` chunks (the last of a window may be smaller), similar lengths together.

        Chunks are sorted by length, longest first, within each `window` consecutive chunks (default: 32 batches), and
        the windows follow each other: batches that make up whole windows are of the first so many chunks. Full chunks
        keep their order. A function of the arguments alone.
        """
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
        window = _WINDOW_BATCHES * batch_size if window is None else window
        if not isinstance(window, int) or window < 1:
            raise ValueError(f"window must be an integer of at least 1, or None, got {window!r}")
        batches = []
        for start in range(0, len(self), window):
            order = start + np.argsort(-self.lengths[start : start + window], kind="stable")
            batches += [np.sort(order[i : i + batch_size]) for i in range(0, len(order), batch_size)]
        return batches
