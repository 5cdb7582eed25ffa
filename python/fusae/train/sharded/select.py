# SPDX-License-Identifier: Apache-2.0
"""The selection of several ranks together, each with the best of its own latents: exact, with the tie rule of the ops.

Scores are of the codes' values, so that in 16 bits it is the rounded ones that are compared: equal ones go to the lower
part of the latents, and within a part as the op has ranked them (on float32 sums). In float32 and float64 the result is
that of one process: larger score first, then the lower latent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _checks
from ...codes import SparseCodes
from .mesh import Mesh


def scores(codes: SparseCodes, norms: Tensor | None, magnitude: bool) -> Tensor:
    """What the entries are ranked by, in the dtype of sums."""
    score = codes.values.to(_checks.accumulator(codes.dtype))
    if norms is not None:
        score = score * norms[codes.indices.long()]
    return score.abs() if magnitude else score


def keep_topk(mesh: Mesh, codes: SparseCodes, score: Tensor, k: int) -> SparseCodes:
    """This rank's part of the k best of every row.

    Args:
        codes: ``[n, k']`` of this rank's latents, best first.
        score: ``[n, k']``.
        k: at most as many as all ranks have together.

    Returns:
        ``[n, k]``, every entry at its place in the ranking of all ranks; what is not this rank's has value and index 0.
    """
    if mesh.latents == 1:
        return codes
    width = codes.values.shape[1]
    # Lists of neighbouring latents in their order: a stable sort leaves equal scores to the lower one.
    every = torch.cat(mesh.gather(score), 1)
    place = every.sort(dim=1, descending=True, stable=True).indices[:, :k]
    mine, place = place.div(width, rounding_mode="floor") == mesh.latent_rank, place.remainder(width)
    values = torch.where(mine, codes.values.gather(1, place), 0.0)
    return SparseCodes(values, torch.where(mine, codes.indices.gather(1, place), 0), codes.m)


def keep_batch(
    mesh: Mesh, codes: SparseCodes, score: Tensor, first_row: int, latents: tuple[int, int], budget: int
) -> tuple[SparseCodes, Tensor]:
    """This rank's part of the `budget` best entries of all rows and latents.

    Args:
        codes: ragged, of the rows from `first_row` on and of this rank's latents; with at least those that are among
            the best.
        score: of the entries in storage.
        latents: the first of this rank's latents, and how many there are in all.

    Returns:
        (codes without unused storage, the smallest positive score that was selected or Inf).
    """
    first, m = latents
    used = int(codes.offsets[-1])
    row, score, indices = codes.row_ids()[:used], score[:used], codes.indices[:used]
    parts = mesh.gather_rows(score, "all")
    every = torch.cat(parts)
    if len(every) <= budget:
        least = every.new_tensor(-torch.inf)
        keep = torch.ones_like(score, dtype=torch.bool)
    else:
        least = every.kthvalue(len(every) - budget + 1).values  # NaN is the largest there too
        keep, ties = _above(score, least), _equal(score, least)
        wanted = budget - int(_above(every, least).sum())
        sizes = [int(_equal(part, least).sum()) for part in parts]
        if wanted < sum(sizes):  # equal scores: the lower row, then the lower latent
            key = (row[ties] + first_row) * m + indices[ties] + first
            last = torch.cat(mesh.gather_rows(key, "all", sizes)).sort().values[wanted - 1]
            ties = ties.index_put((ties.nonzero()[:, 0],), key <= last)
        keep = keep | ties
    positive = torch.where((every > 0) & (_above(every, least) | _equal(every, least)), every, torch.inf)
    smallest = torch.cat([positive, positive.new_full((1,), torch.inf)]).min()
    counts = torch.bincount(row[keep], minlength=len(codes))
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return SparseCodes(codes.values[:used][keep], indices[keep], codes.m, offsets), smallest


def _above(score: Tensor, least: Tensor) -> Tensor:
    return (score > least) | (score.isnan() & ~least.isnan())


def _equal(score: Tensor, least: Tensor) -> Tensor:
    return (score == least) | (score.isnan() & least.isnan())


def every_row(mesh: Mesh, codes: SparseCodes, n: int) -> SparseCodes:
    """The codes of all n rows (and this rank's latents) from those of `mesh.rows`."""
    if mesh.data == 1:
        return codes
    sizes = [n * (i + 1) // mesh.data - n * i // mesh.data for i in range(mesh.data)]
    if codes.offsets is None:
        values, indices = (
            torch.cat(mesh.gather_rows(part, "data", sizes)) for part in (codes.values, codes.indices)
        )
        return SparseCodes(values, indices, codes.m)
    counts = mesh.gather_rows(codes.offsets.diff(), "data", sizes)
    sizes = [int(part.sum()) for part in counts]
    values, indices = (torch.cat(mesh.gather_rows(part, "data", sizes)) for part in (codes.values, codes.indices))
    counts = torch.cat(counts)
    return SparseCodes(values, indices, codes.m, torch.cat([counts.new_zeros(1), counts.cumsum(0)]))
