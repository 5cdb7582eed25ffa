# SPDX-License-Identifier: Apache-2.0
"""Codes in the forms that circuit-tracer and llamascopium hand round: dense, COO, gathered rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ..codes import SparseCodes
from ..ops import codes_from_dense, decode

ROWS = 64  # rows whose dense activations are held at a time, where there is no fused encoder


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is done with these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def fuses(x: Tensor, n: int) -> bool:
    """Whether the fused encoder is the faster one for n rows like those of `x`.

    On a CPU it is not in 16 bits, whose products it takes in float32, nor for a few rows (the next token of a text):
    there reading the weights takes all the time.
    """
    return x.device.type != "cpu" or (x.dtype in (torch.float32, torch.float64) and n >= 32)


def by_blocks(x: Tensor, activations, m: int) -> SparseCodes:
    """Ragged codes of ``activations(rows)`` ``[rows, m]``, a function that makes dense ones, for a few rows at a time.

    Not differentiable. Equivalent to: ``fusae.codes_from_dense(activations(x))``
    """
    made = [codes_from_dense(activations(part)) for part in x.split(ROWS)]
    counts = [codes.offsets.diff() for codes in made]
    offsets = torch.zeros(x.shape[0] + 1, dtype=torch.int64, device=x.device)
    if not made:
        empty = torch.empty(0, dtype=torch.int32, device=x.device)
        return SparseCodes(x.new_empty(0), empty, m, offsets)
    torch.cumsum(torch.cat(counts), 0, out=offsets[1:])
    values, indices = torch.cat([c.values for c in made]), torch.cat([c.indices for c in made])
    return SparseCodes(values, indices, m, offsets)


def ascending(codes: SparseCodes) -> SparseCodes:
    """Ragged codes without zeros, latents ascending in every row, of codes of ``[n, m]`` in either form."""
    if codes.offsets is None:
        order = codes.indices.argsort(-1)
        codes = SparseCodes(codes.values.gather(-1, order), codes.indices.gather(-1, order), codes.m).to_ragged()
    active = codes.values != 0
    if active.all():
        return codes
    offsets = torch.zeros_like(codes.offsets)
    torch.cumsum(codes.l0, 0, out=offsets[1:])
    return SparseCodes(codes.values[active], codes.indices[active], codes.m, offsets)


def spread(codes: SparseCodes, keep: Tensor) -> SparseCodes:
    """Ragged codes of all n rows, where those given are of the rows `keep` ``[n]`` (bool) and the others are empty."""
    counts = torch.zeros(keep.shape[0], dtype=torch.int64, device=keep.device)
    counts[keep] = codes.offsets.diff()
    offsets = torch.zeros(keep.shape[0] + 1, dtype=torch.int64, device=keep.device)
    torch.cumsum(counts, 0, out=offsets[1:])
    return SparseCodes(codes.values, codes.indices, codes.m, offsets)


def to_coo(parts: list[SparseCodes], *, stacked: bool = True) -> Tensor:
    """A coalesced ``torch.sparse_coo`` tensor ``[len(parts), n, m]`` (`stacked`; else ``[n, m]`` of the only part).

    Args:
        parts: ragged codes of n rows each, without zeros, latents ascending.
    """
    values, latents = torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts]).long()
    where = [torch.cat([p.row_ids() for p in parts]), latents]
    shape = [len(parts[0]), parts[0].m]
    if stacked:
        counts = torch.tensor([p.values.shape[0] for p in parts], device=values.device)
        where.insert(0, torch.repeat_interleave(torch.arange(len(parts), device=values.device), counts))
        shape.insert(0, len(parts))
    return torch.sparse_coo_tensor(torch.stack(where), values, shape, is_coalesced=True, check_invariants=False)


def from_coo(sparse: Tensor) -> SparseCodes:
    """Ragged codes of a coalesced ``torch.sparse_coo`` tensor ``[n, m]``."""
    rows, latents = sparse.indices()
    n, m = sparse.shape
    offsets = torch.zeros(n + 1, dtype=torch.int64, device=sparse.device)
    torch.cumsum(torch.bincount(rows, minlength=n), 0, out=offsets[1:])
    return SparseCodes(sparse.values(), latents.int(), m, offsets)


def sum_rows(rows: Tensor, offsets: Tensor) -> Tensor:
    """Sums of neighbouring rows of ``[nnz, d]``: row i of the result ``[n, d]`` is that of ``offsets[i : i + 2]``.

    Summed in float32 whatever the dtype.
    """
    if rows.shape[0] == 0:
        return rows.new_zeros(offsets.shape[0] - 1, rows.shape[1])
    each = torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)
    return decode(SparseCodes(rows.new_ones(rows.shape[0]), each, rows.shape[0], offsets), rows)


def gather_scaled(W: Tensor, latents: Tensor, values: Tensor, out: Tensor | None = None) -> Tensor:
    """``W[latents] * values`` for ``[m, d]`` rows, into `out` ``[nnz, d]`` where given. Not differentiable."""
    rows = torch.index_select(W, 0, latents) if out is None else torch.index_select(W, 0, latents, out=out)
    return rows.mul_(values[:, None])
