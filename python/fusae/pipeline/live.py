# SPDX-License-Identifier: Apache-2.0
"""Rows straight from a model, in the order of the text: for measuring without a disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor, nn

from ..data import TokenChunks, hooks
from ..data.kept import REASONS, RowFilter


class LiveRows:
    """The kept rows of a model at some sites, computed anew each time they are asked for.

    An iterable of batches ``[n, d]`` in fp32, on the CPU. `len` is what is expected: norm outliers are not taken off.

    Args:
        model, chunks, module: as for `fusae.data.collect`.
        kept: which rows.
        expected: how many there will be, about.
        batch_size: chunks a forward pass.
        limits: norm above which a row is dropped, at each site; None: from the first batch, where `kept` drops any.

    Attributes:
        dropped: rows left out, by reason, in the last whole pass.
        norm_limit: as of `fusae.data.Activations`, once a batch was run.
    """

    def __init__(
        self,
        model: nn.Module,
        chunks: TokenChunks,
        module: str | Sequence[str],
        kept: RowFilter,
        expected: int,
        *,
        batch_size: int = 16,
        limits: float | Sequence[float] | None = None,
    ) -> None:
        self.model, self.chunks, self.kept, self.expected = model, hooks.check_chunks(chunks, model), kept, expected
        kept.check(chunks.shape[1])
        self.batch_size = batch_size
        self._sites = hooks.Sites.find(model, module)
        self._limits = None if limits is None else list(limits if isinstance(limits, Sequence) else [limits])
        self.dropped = dict.fromkeys(REASONS, 0)

    def __len__(self) -> int:
        return self.expected

    @property
    def norm_limit(self) -> float | tuple[float, ...] | None:
        limits = self._limits
        return limits if limits is None else limits[0] if len(limits) == 1 else tuple(limits)

    def __iter__(self) -> Iterator[Tensor]:
        for rows, _ in self.blocks(self.batch_size):
            yield rows

    def blocks(self, batch_chunks: int) -> Iterator[tuple[Tensor, np.ndarray]]:
        """(rows ``[r, d]``, their (chunk, position) ``[r, 2]``) of `batch_chunks` chunks at a time."""
        device, dropped = hooks.device_of(self.model), dict.fromkeys(REASONS, 0)
        for index in self.chunks.batches(batch_chunks):
            with hooks.evaluating(self.model):
                hidden = hooks.run_to(self.model, self._sites, *hooks.batch_of(self.chunks, index, device))
            keep, counts, self._limits = self.kept(hidden, self._sites.widths, self.chunks, index, self._limits)
            dropped = {reason: number + counts[reason] for reason, number in dropped.items()}
            if keep.any():
                where = keep.nonzero().numpy()
                yield hidden[keep.to(device)].float().cpu(), np.stack([index[where[:, 0]], where[:, 1]], 1)
        self.dropped = dropped
