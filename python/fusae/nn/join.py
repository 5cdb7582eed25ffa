# SPDX-License-Identifier: Apache-2.0
"""Codes over several dictionaries: as one, the largest of them all, and what they write together as one output."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _checks
from ..codes import SparseCodes


class _AddUp(torch.autograd.Function):
    @staticmethod
    def forward(*parts):
        y = parts[0].to(_checks.accumulator(parts[0].dtype), copy=True)
        for part in parts[1:]:
            y[:, -part.shape[1] :] += part
        return y

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.like = [(part.shape[1], part.dtype) for part in inputs]

    @staticmethod
    def backward(ctx, grad):
        return tuple(grad[:, -width:].to(dtype) for width, dtype in ctx.like)


def add_up(parts: Sequence[Tensor]) -> Tensor:
    """What the sources write, part s ``[n, (L-s)·d_out]`` for the targets from s on, as ``[n, L·d_out]`` in float32
    (float64 for float64).

    Equivalent to: ``sum(F.pad(part, (parts[0].shape[1] - part.shape[1], 0)) for part in parts)``
    """
    return _AddUp.apply(*parts)


def join_codes(parts: Sequence[SparseCodes]) -> SparseCodes:
    """Codes of the same rows over several dictionaries as codes over all their latents, in the order of `parts`.

    All of fixed width (``[..., k]`` each: ``[..., Σ k]``), or all ragged: others raise `ValueError`. Gradients flow.
    Never reads from the device.

    Equivalent to: ``fusae.codes_from_dense(torch.cat([part.to_dense() for part in parts], -1))``
    """
    if len({(part.is_ragged, part.batch_shape) for part in parts}) != 1:
        raise ValueError(f"parts must be codes of the same rows, all ragged or none, got {list(parts)}")
    m = sum(part.m for part in parts)
    shifts = itertools.accumulate((part.m for part in parts), initial=0)
    indices = [part.indices + shift for part, shift in zip(parts, shifts, strict=False)]
    if parts[0].offsets is None:
        return SparseCodes(torch.cat([part.values for part in parts], -1), torch.cat(indices, -1), m)
    offsets = torch.stack([part.offsets for part in parts]).sum(0)
    start, places = offsets[:-1], []
    size = sum(part.values.shape[0] for part in parts)
    for part in parts:
        # Entry e of row r goes to e + moved[r]; what is not in use has row n and goes behind everything.
        moved = torch.cat([start - part.offsets[:-1], start.new_zeros(1)])
        row = part.row_ids()
        place = torch.arange(row.shape[0], device=row.device) + moved[row]
        places.append(torch.where(row < len(part), place, size))
        start = start + part.offsets[1:] - part.offsets[:-1]
    places = torch.cat(places)
    values = torch.cat([part.values for part in parts])
    values = values.new_zeros(size + 1).index_copy(0, places, values)[:size]
    indices = torch.cat(indices)
    return SparseCodes(values, indices.new_zeros(size + 1).index_copy(0, places, indices)[:size], m, offsets)


def split_codes(codes: SparseCodes, sizes: Sequence[int]) -> list[SparseCodes]:
    """Codes over several dictionaries of `sizes` latents side by side as ragged codes over each: undoes `join_codes`.

    Entries of value 0 are left out. Gradients flow. Reads the number of entries (one host sync a part on a GPU).

    Equivalent to: ``[fusae.codes_from_dense(part) for part in codes.to_dense().split(sizes, -1)]``
    """
    if sum(sizes) != codes.m:
        raise ValueError(f"codes must be over {sum(sizes)} latents, got {codes.m}")
    ragged, parts, start = codes.to_ragged(), [], 0
    ragged._used()  # the parts would not tell that some did not fit
    row, latents = ragged.row_ids(), ragged.indices
    active = (row < len(ragged)) & (ragged.values != 0)
    for size in sizes:
        mine = active & (latents >= start) & (latents < start + size)
        offsets = torch.zeros_like(ragged.offsets)
        offsets[1:] = torch.bincount(row[mine], minlength=len(ragged)).cumsum(0)
        parts.append(SparseCodes(ragged.values[mine], latents[mine] - start, size, offsets))
        start += size
    return parts


@torch.no_grad()
def _keys(codes: SparseCodes, norms: Tensor | None) -> Tensor:
    """Integers in the order of the scores (values, times `norms` of their latents) of ragged codes from a ReLU: NaN is
    above all else, storage that is not in use below."""
    used = codes.row_ids() < len(codes)
    scores = codes.values.to(_checks.accumulator(codes.dtype))
    if norms is not None:
        scores = scores * norms[torch.where(used, codes.indices, 0).long()]
    kind = torch.int64 if scores.dtype == torch.float64 else torch.int32
    # The bits of floats that are not negative rise with them.
    keys = torch.where(scores.isnan(), torch.iinfo(kind).max, scores.abs().view(kind))
    return torch.where(used, keys, -1)


def largest_together(
    parts: Sequence[SparseCodes], count: int, norms: Sequence[Tensor] | None = None
) -> tuple[list[SparseCodes], Tensor]:
    """Of codes of the same n rows over several dictionaries, the `count` largest of all rows and dictionaries.

    Args:
        parts: ragged codes from a ReLU, latents ascending in every row, as `fusae.encode_batch_topk` gives them.
        count: how many to keep, at least 1; all where there are fewer.
        norms: ``[m]`` of every dictionary, in float32 (float64 for float64): the largest by value times norm.

    Returns:
        (parts, smallest): the same codes without the entries left out, in storages of the same size, and the smallest
        positive score kept (float32 or float64; +Inf without any). NaN is the largest; equal scores go to the lower
        row, then to the earlier dictionary, then to the lower latent. In 16 bits scores are those of the rounded
        values. Gradients flow. Never reads from the device.

    Equivalent to::

        joined = torch.cat([part.to_dense() for part in parts], -1).flatten()
        best = torch.sort(joined, descending=True, stable=True).indices[:count]
        kept = torch.zeros_like(joined).index_copy(0, best, joined[best]).view(n, -1)
    """
    keys = [_keys(part, None if norms is None else norms[s]) for s, part in enumerate(parts)]
    pool = torch.cat(keys)
    count = min(count, len(pool))
    if not len(pool):
        return list(parts), parts[0].values.new_full((), torch.inf, dtype=_checks.accumulator(parts[0].dtype))
    cut = pool.kthvalue(len(pool) - count + 1).values
    room = count - (pool > cut).sum()  # for entries that equal it
    ties, before = [key == cut for key in keys], []
    for tie, part in zip(ties, parts, strict=True):
        before.append(torch.cat([part.offsets.new_zeros(1), tie.cumsum(0)]))
    of_row = torch.stack([past[part.offsets].diff() for past, part in zip(before, parts, strict=True)], 1)
    # Ties before those of a row and a dictionary: of earlier rows, and of this row in earlier dictionaries.
    first = (of_row.flatten().cumsum(0) - of_row.flatten()).view_as(of_row)
    kept, smallest = [], []
    for s, (part, key, tie, past) in enumerate(zip(parts, keys, ties, before, strict=True)):
        row, n = part.row_ids(), len(part)
        skip = torch.cat([first[:, s] - past[part.offsets[:-1]], first.new_zeros(1)])
        keep = (key > cut) | (tie & (past[:-1] + skip[row] < room) & (row < n))
        kept.append(_only(part, keep))
        score = key.view(torch.float64 if key.dtype == torch.int64 else torch.float32)
        smallest.append(torch.where(keep & (key > 0) & ~score.isnan(), score, torch.inf).min())
    return kept, torch.stack(smallest).min()


def _only(codes: SparseCodes, keep: Tensor) -> SparseCodes:
    """Ragged codes without the entries where `keep` is false, in a storage of the same size."""
    size = keep.shape[0]
    end = keep.cumsum(0)
    place = torch.where(keep, end - 1, size)  # what is left out goes behind everything
    values = codes.values.new_zeros(size + 1).index_copy(0, place, codes.values)[:size]
    indices = codes.indices.new_zeros(size + 1).index_copy(0, place, codes.indices)[:size]
    offsets = torch.cat([end.new_zeros(1), end])[codes.offsets]
    return SparseCodes(values, indices, codes.m, offsets)
