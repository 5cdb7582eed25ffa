# SPDX-License-Identifier: Apache-2.0
"""Codes over several dictionaries as one, and what several dictionaries write as one output."""

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
