# SPDX-License-Identifier: Apache-2.0
"""Rows straight from a model, through a shuffle buffer, without a disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import hooks
from .batches import check_batch_size, check_epochs, check_identity
from .capture import weights_sha256
from .kept import REASONS, RowFilter
from .tokens import TokenChunks


class ActivationStream:
    """What a model computes for token chunks, as a source of shuffled rows: ``shape`` is ``(None, d)``.

    Each pass over the chunks runs them in a new order, in batches of similar length. Kept rows fill a buffer, and the
    buffer is given out in random order; then the next rows fill it. No row is left out in between or at the end of a
    pass, only what does not make up a batch at the end of the last.

    The shuffle mixes `buffer_rows` neighbouring rows: take several times the batch, and many chunks' worth. Memory is
    ``buffer_rows · d`` values of the model's dtype. The model must stay as it is.

    Args:
        model, chunks, module: as for `fusae.data.collect`.
        buffer_rows: rows in the buffer; rounded down to whole batches, at least one.
        batch_size: chunks a forward pass.
        skip_positions, outlier_factor, drop_special, nonfinite: which rows are dropped, see
            `fusae.data.kept.RowFilter`.
        source: a name of model and text for reports.
        model_sha256: what `weights_sha256(model)` gave, to save the time.

    Attributes:
        sites: ``[{"module", "side", "width"}]``
        norm_limit: as `Activations.norm_limit`; of the same first batch as there.

    Raises `TypeError` or `ValueError` for a bad argument, or if the first batches have no row to keep.
    """

    def __init__(
        self,
        model: nn.Module,
        chunks: TokenChunks | np.ndarray | Tensor,
        module: str | Sequence[str],
        *,
        buffer_rows: int = 1 << 16,
        batch_size: int = 16,
        skip_positions: int = 2,
        outlier_factor: float | None = 10.0,
        drop_special: bool = True,
        nonfinite: str = "stop",
        source: str = "",
        model_sha256: str | None = None,
    ) -> None:
        chunks = hooks.check_chunks(chunks, model)
        self._filter = RowFilter(skip_positions, outlier_factor, drop_special, nonfinite)
        self._filter.check(chunks.shape[1])
        check_batch_size(batch_size)
        if not isinstance(buffer_rows, int) or buffer_rows < 1:
            raise ValueError(f"buffer_rows must be an integer of at least 1, got {buffer_rows!r}")
        self.model, self.chunks, self.buffer_rows, self.batch_size = model, chunks, buffer_rows, batch_size
        self._sites = hooks.Sites.find(model, module)
        self._device = hooks.device_of(model)
        self.order = chunks.batches(batch_size)
        self._limits: list[float] | None = None
        self._probe()
        assert self._sites.widths is not None
        self.sites = self._sites.described
        self.shape = (None, sum(self._sites.widths))
        self.inputs = {
            "model_sha256": model_sha256 or weights_sha256(model),
            "chunks_sha256": chunks.sha256(),
            "chunks": chunks.shape[0],
            "ctx": chunks.shape[1],
            "module": module if isinstance(module, str) else list(module),
            "skip_positions": skip_positions,
            "outlier_factor": outlier_factor,
            "special": sorted(set(chunks.special)) if drop_special else [],
            "nonfinite": nonfinite,
            "chunks_a_pass": batch_size,
            "source": source,
        }
        # A run that was stopped by a row that is not finite may go on without such rows.
        compared = {name: value for name, value in self.inputs.items() if name not in ("source", "nonfinite")}
        self.fingerprint = hashlib.sha256(repr(sorted(compared.items())).encode()).hexdigest()
        self._last: StreamBatches | None = None

    def __repr__(self) -> str:
        return (
            f"ActivationStream({', '.join(self._sites.names)} of {self.inputs['source'] or type(self.model).__name__}, "
            f"d {self.shape[1]}, {self.chunks.tokens:,} tokens a pass, buffer of {self.buffer_rows:,} rows)"
        )

    @property
    def norm_limit(self) -> float | tuple[float, ...] | None:
        limits = self._limits
        return limits if limits is None else limits[0] if len(limits) == 1 else tuple(limits)

    @property
    def dropped(self) -> dict[str, int]:
        """Rows dropped by reason, by the batches that filled their buffer last, since their beginning."""
        return dict.fromkeys(REASONS, 0) if self._last is None else self._last.dropped

    def batches(self, batch_size: int, seed: int = 0, epochs: int | None = 1) -> StreamBatches:
        """Shuffled fp32 batches ``[batch_size, d]``, on the model's device; see `StreamBatches`."""
        return StreamBatches(self, batch_size, seed, epochs)

    def rows_of(self, index: np.ndarray) -> tuple[Tensor, dict[str, int]]:
        """The kept rows ``[n, d]`` of ``chunks[index]`` in the model's dtype, and the counts of the others."""
        with hooks.evaluating(self.model):
            hidden = hooks.run_to(self.model, self._sites, *hooks.batch_of(self.chunks, index, self._device))
            assert self._sites.widths is not None
            keep, counts, limits = self._filter(hidden, self._sites.widths, self.chunks, index, self._limits)
            self._limits = limits
            return hidden[keep.to(self._device)], counts

    def _probe(self) -> None:
        for index in self.order:
            if len(self.rows_of(index)[0]):
                return
        raise ValueError("skip_positions and the other options leave no row at all; check the model and the chunks")


class StreamBatches:
    """Batches of an `ActivationStream`; the order is a function of the seed alone, given model and chunks.

    The stream of kept rows, pass after pass, is cut into blocks of whole batches (as many as the buffer holds); a block
    is filled, permuted and given out. The state names the place in the chunks at which the block began, so going on
    from it runs the model over that one block again and gives the same bits. ``epochs=None`` never ends.
    """

    def __init__(self, stream: ActivationStream, batch_size: int, seed: int = 0, epochs: int | None = 1) -> None:
        check_batch_size(batch_size)
        check_epochs(epochs)
        self._stream, self.batch_size, self.seed, self.epochs = stream, batch_size, seed, epochs
        self.block_rows = max(1, stream.buffer_rows // batch_size) * batch_size
        # Where the block begins: passes done, batches of chunks run in this one, rows of the next that are given out.
        self._start = {"epoch": 0, "cursor": 0, "offset": 0}
        self._end = dict(self._start)
        self._block = self._batch = 0
        self._filled = False
        self._count = 0  # rows in the buffer: a full block, or what the stream ends with
        self._buffer: Tensor | None = None
        self._rest: Tensor | None = None  # what the model gave for the chunks at which the block ends
        self._chunks: tuple[int, np.ndarray] | None = None
        self._before = dict.fromkeys(REASONS, 0)  # dropped before this block
        self._dropped = dict(self._before)  # and up to its end

    @property
    def dropped(self) -> dict[str, int]:
        """Rows dropped so far by reason: those of all chunks that were run for the blocks up to this one."""
        return dict(self._dropped)

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        if not self._filled:
            self._fill()
        if (self._batch + 1) * self.batch_size > self._count:
            if self._count < self.block_rows:  # the stream has ended
                raise StopIteration
            self._block, self._batch = self._block + 1, 0
            self._start, self._before = self._end, self._dropped
            self._fill()
            return next(self)
        first = self._batch * self.batch_size
        self._batch += 1
        assert self._buffer is not None
        index = torch.from_numpy(np.sort(self._order[first : first + self.batch_size]))
        return self._buffer[index.to(self._buffer.device)].float()

    def _fill(self) -> None:
        """Run the model until the block is full or the stream ends."""
        stream, at, dropped, count = self._stream, dict(self._start), dict(self._before), 0
        rest, self._rest = self._rest, None
        self._filled = False
        while count < self.block_rows and (self.epochs is None or at["epoch"] < self.epochs):
            if at["cursor"] == len(stream.order):
                at = {"epoch": at["epoch"] + 1, "cursor": 0, "offset": 0}
                continue
            if rest is None:
                rest, counts = stream.rows_of(stream.order[self._chunk_order(at["epoch"])[at["cursor"]]])
                if at["offset"] == 0:  # else its rows began in the block before, and so did its counts
                    dropped = {reason: dropped[reason] + counts[reason] for reason in REASONS}
            if self._buffer is None:
                self._buffer = rest.new_empty(self.block_rows, rest.shape[1])
            take = min(len(rest) - at["offset"], self.block_rows - count)
            self._buffer[count : count + take] = rest[at["offset"] : at["offset"] + take]
            count += take
            at["offset"] += take
            if at["offset"] == len(rest):
                at["cursor"], at["offset"], rest = at["cursor"] + 1, 0, None
        self._end, self._rest, self._dropped, self._count = at, rest, dropped, count
        self._order = np.random.default_rng([self.seed, self._block, 1]).permutation(count)
        self._filled, stream._last = True, self

    def _chunk_order(self, epoch: int) -> np.ndarray:
        if self._chunks is None or self._chunks[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self._stream.order))
            self._chunks = (epoch, order)
        return self._chunks[1]

    def _identity(self) -> dict[str, Any]:
        return {
            "sha256": self._stream.fingerprint,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "block_rows": self.block_rows,
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain values (JSON) that name the next batch."""
        place = {"block": self._block, "batch": self._batch, "start": dict(self._start), "dropped": dict(self._before)}
        return {**place, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at `state`. Raises `ValueError` if it is of another stream, seed, batch size or buffer."""
        check_identity(state, self._identity())
        start, dropped = state.get("start"), state.get("dropped")
        numbers = [state.get("block"), state.get("batch")]
        for part, names in ((start, self._start), (dropped, self._before)):
            if not isinstance(part, dict) or set(part) != set(names):
                raise ValueError(f"state: {part!r} must have {', '.join(names)}")
            numbers += part.values()
        if not all(isinstance(number, int) and number >= 0 for number in numbers) or (
            numbers[1] > self.block_rows // self.batch_size or start["cursor"] > len(self._stream.order)
        ):
            raise ValueError(f"state: {numbers} is no place in this stream of {len(self._stream.order)} batches a pass")
        self._start, self._before, self._dropped = dict(start), dict(dropped), dict(dropped)
        self._block, self._batch = numbers[0], numbers[1]
        self._filled, self._rest = False, None
