# SPDX-License-Identifier: Apache-2.0
"""Which rows of a forward pass are kept, and how many are not and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from . import hooks
from .tokens import TokenChunks

REASONS = ("padding", "first_positions", "special", "nonfinite", "norm_outliers")


@dataclasses.dataclass(frozen=True)
class RowFilter:
    """What is dropped, each row for the first of these reasons that holds:

    ===================  ==========================================================================================
    ``padding``          places of a chunk beyond its length; no rows at all
    ``first_positions``  the first `skip_positions` of a chunk. Position 0 always sees the same, and the first word
                         after it is often an attention sink
    ``special``          tokens that are no text (`TokenChunks.special`: BOS, EOS, separators), with `drop_special`
    ``nonfinite``        rows with NaN or infinite values, with ``nonfinite='drop'``; 'stop' raises at the first
    ``norm_outliers``    rows whose norm at one of the sites exceeds `outlier_factor` times the median norm there of
                         the first batch (attention sinks); None keeps all
    ===================  ==========================================================================================
    """

    skip_positions: int = 2
    outlier_factor: float | None = 10.0
    drop_special: bool = True
    nonfinite: str = "stop"

    def check(self, ctx: int) -> None:
        """Raises `ValueError` for options that cannot be, for chunks of `ctx` places."""
        hooks.check_row_options(ctx, self.skip_positions, self.outlier_factor)
        if self.nonfinite not in ("stop", "drop"):
            raise ValueError(f"nonfinite must be 'stop' or 'drop', got {self.nonfinite!r}")

    def __call__(
        self,
        hidden: Tensor,
        widths: Sequence[int],
        chunks: TokenChunks,
        index: np.ndarray,
        limits: Sequence[float] | None,
    ) -> tuple[Tensor, dict[str, int], list[float] | None]:
        """Look at ``[batch, longest, Σ widths]``, the output for ``chunks[index]``.

        Args:
            limits: norm at each site above which a row is dropped; None: not known yet.

        Returns:
            Bool ``[batch, longest]``, true for rows to keep; counts of the others by reason; the limits, still None
            where outliers are kept or no row of this batch was left to tell.

        Raises `ValueError` for a row that is not finite, with ``nonfinite='stop'``.
        """
        part = chunks[index]
        longest = hidden.shape[1]
        keep = torch.from_numpy(np.arange(longest) < part.lengths[:, None])
        counts = dict.fromkeys(REASONS, 0)
        counts["padding"] = part.ids.size - part.tokens

        def drop(reason: str, these: Tensor) -> None:
            counts[reason] += int((keep & these).sum())
            keep.logical_and_(~these)

        drop("first_positions", torch.arange(longest) < self.skip_positions)
        if self.drop_special and chunks.special:
            drop("special", torch.from_numpy(np.isin(part.ids[:, :longest], chunks.special)))
        norms = torch.stack([rows.float().norm(dim=-1) for rows in hidden.split(list(widths), -1)], -1).cpu()
        if not bool(norms.isfinite().all()):  # a large but finite row may have an infinite norm, so this only suspects
            bad = ~hidden.isfinite().all(-1).cpu()
            if self.nonfinite == "stop" and bool((keep & bad).any()):
                row, position = (keep & bad).nonzero()[0].tolist()
                raise ValueError(
                    f"model: its activation at chunk {int(index[row])}, position {position} holds NaN or infinite "
                    "values (a lower precision than it was made for?); nonfinite='drop' leaves such rows out and "
                    "counts them"
                )
            drop("nonfinite", bad)
        if self.outlier_factor is not None:
            if limits is None and bool(keep.any()):
                limits = (self.outlier_factor * norms[keep].median(0).values).tolist()
                if not np.isfinite(limits).all():
                    raise ValueError("model: its activations are too large for a norm in float32")
            if limits is not None:
                drop("norm_outliers", (norms > torch.tensor(limits)).any(-1))
        return keep, counts, None if limits is None else list(limits)
