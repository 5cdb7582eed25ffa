# SPDX-License-Identifier: Apache-2.0
"""Squared errors of nested reconstructions, and what their gradients need, in one gather of the decoder rows.

Entries are sorted by row and group first (for more than one prefix), so that a program, which has one block of columns
of a row, adds them to a single residual and squares it where a group ends. With the residuals goes their weighted sum
``Σ_g w_g r_g``. A second walk over the groups takes ``w_g r_g`` off it, one by one: what is left before group g is
``mixed[g] = Σ_{h ≥ g} w_h r_h``, which the entries of the group meet in their dots. It reads the same pieces of rows
again, 64 KB at k 64, right after, so from L1 or L2. Nothing grows with the number of prefixes but what is written.

Bytes: ``nnz·d`` elements of W_dec as in `decode`, the target, the residual, ``G·n·d`` elements for G > 1 prefixes, and
``4·nnz`` of dots for every block of columns: 4.5 GB in bfloat16 at n 8192, d 4096, k 64, at 80 % of copy bandwidth.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv
from .decode import join_dots
from .entries import (
    BLOCK,
    Codes,
    contiguous_rows,
    gather_tile,
    gathered,
    group_of,
    on_device,
    row_entries,
    row_of,
    used_entries,
)

NESTED = (4,)
"""Entries at a time where the few of a group are added before the next group's."""


@triton.jit(do_not_specialize=["n", "width", "storage", "groups"])
def group_keys_kernel(keys, indices, offsets, prefixes, n, width, storage, groups,
                      RAGGED: tl.constexpr, BY_RANK: tl.constexpr, B: tl.constexpr):  # fmt: skip
    """``row·groups + group`` of every entry, ``n·groups`` where the storage is not in use."""
    e = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    used = e < used_entries(offsets, n, width, storage, RAGGED)
    row, rank = row_of(offsets, e, n, width, RAGGED)
    latent = tl.load(indices + e, mask=used, other=0).to(tl.int64)
    key = row * groups + group_of(prefixes, groups, latent, rank, BY_RANK).to(tl.int64)
    tl.store(keys + e, tl.where(used, key, n.to(tl.int64) * groups).to(keys.dtype.element_ty), mask=e < storage)


@triton.jit
def entries_at(values, indices, first, count, start, m, E: tl.constexpr):
    """Of E entries: places, which are in use, which name a latent, latents, values (NaN if there is no such latent)."""
    place = start + tl.arange(0, E)
    used = place[None, :] < count[:, None]
    at = first[:, None] + place[None, :]
    latent = tl.load(indices + at, mask=used, other=-1)
    inside = (latent >= 0) & (latent < m)
    value = tl.load(values + at, mask=used, other=0.0).to(tl.float32)
    value = tl.where(used & (inside == 0), float("nan"), value)
    return at, used, inside, latent.to(tl.int64), value


@triton.jit
def group_entries(begins, offsets, i, g, live, groups, width, storage, RAGGED: tl.constexpr, GROUPED: tl.constexpr):
    """First entry and number of entries of group g of the rows i."""
    if GROUPED:
        first = tl.load(begins + i * groups + g, mask=live, other=0)
        count = (tl.load(begins + i * groups + g + 1, mask=live, other=0) - first).to(tl.int32)
    else:
        first, count = row_entries(offsets, i, live, width, storage, RAGGED)
    return first, count


@triton.jit(do_not_specialize=["n", "m", "width", "storage", "groups"])
def decode_loss_kernel(
    values, indices, offsets, order, begins, weight, bias, target, weights, sse, residual, mixed, dots,
    n, m, width, storage, groups, d, stride, stride_target,
    RAGGED: tl.constexpr, GROUPED: tl.constexpr, BIAS: tl.constexpr, MIXED: tl.constexpr, DOTS: tl.constexpr,
    N: tl.constexpr, E: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Residuals of all groups for N rows and D columns; see `decode_loss`. GROUPED: `values` and `indices` are sorted
    by row and group, of which `begins` are the first ones and `order` the places in the codes."""
    i = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    cols = tl.program_id(1) * D + tl.arange(0, D)
    block = tl.program_id(1).to(tl.int64)
    live, seen = i < n, (cols < d)[None, :]
    mask = live[:, None] & seen
    goal = tl.load(target + i[:, None] * stride_target + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        goal -= tl.load(bias + cols, mask=cols < d, other=0.0).to(tl.float32)[None, :]
    left, total = goal, tl.zeros([N, D], dtype=tl.float32)
    for g in range(0, groups):
        first, count = group_entries(begins, offsets, i, g, live, groups, width, storage, RAGGED, GROUPED)
        for start in range(0, tl.max(count, axis=0), E):
            _, _, inside, latent, value = entries_at(values, indices, first, count, start, m, E)
            rows = gathered(weight, latent, stride, cols, d, inside & (value != 0))
            left -= tl.sum(value[:, :, None] * rows, axis=1)
        left = tl.where(seen, left, 0.0)
        tl.store(sse + (block * n + i) * groups + g, tl.sum(left * left, axis=1), mask=live)
        if GROUPED:
            share = tl.load(weights + g)
            total += share * left
    tl.store(residual + i[:, None] * d + cols[None, :], left.to(residual.dtype.element_ty), mask=mask)
    if MIXED or DOTS:
        last = left
        left = goal
        for g in range(0, groups):
            first, count = group_entries(begins, offsets, i, g, live, groups, width, storage, RAGGED, GROUPED)
            if GROUPED:
                share = tl.load(weights + g)
                met = tl.where(g == groups - 1, share * last, total)  # the last one is known without subtractions
            else:
                met = last
            if MIXED:
                to = mixed + (i + n.to(tl.int64) * g)[:, None] * d + cols[None, :]
                tl.store(to, met.to(mixed.dtype.element_ty), mask=mask)
            for start in range(0, tl.max(count, axis=0), E):
                at, used, inside, latent, value = entries_at(values, indices, first, count, start, m, E)
                rows = gathered(weight, latent, stride, cols, d, inside if DOTS else inside & (value != 0))
                if DOTS:
                    place = tl.load(order + at, mask=used, other=0) if GROUPED else at
                    tl.store(dots + block * storage + place, tl.sum(met[:, None, :] * rows, axis=2), mask=used)
                if GROUPED:
                    part = value[:, :, None] * rows
                    left -= tl.sum(tl.where((value != 0)[:, :, None], part, 0.0), axis=1)
            if GROUPED:  # of an infinite sum, all that is left is infinite
                left = tl.where(seen, left, 0.0)
                total = tl.where(tl.abs(total) == float("inf"), total, total - share * left)


def _by_group(codes: Codes, prefixes: list[int], by_rank: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values and indices by row and group, their places in the codes, and the first one of every group of every row."""
    groups, storage, device = len(prefixes), codes.storage, codes.indices.device
    count = codes.n * groups
    keys = torch.empty(storage, dtype=torch.int32 if count < 2**31 else torch.int64, device=device)
    if storage:
        group_keys_kernel[(cdiv(storage, BLOCK),)](
            keys, codes.indices, codes.offsets, on_device(prefixes, codes.indices, torch.int32), codes.n, codes.width,
            storage, groups, RAGGED=codes.offsets is not None, BY_RANK=by_rank, B=BLOCK,
        )  # fmt: skip
    keys, order = torch.sort(keys, stable=True)
    begins = torch.searchsorted(keys, torch.arange(count + 1, dtype=keys.dtype, device=device))
    return codes.values.view(-1)[order], codes.indices.view(-1)[order], order, begins


def decode_loss(
    codes: Codes,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    prefixes: list[int],
    weights: list[float],
    by_rank: bool,
    need_mixed: bool,
    need_dots: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Residuals ``r_g`` of the entries in groups 0..g: (``Σ r_g²`` ``[G]``, the last residual ``[n, d]``, where needed
    ``mixed[g] = Σ_{h ≥ g} weights[h] r_h`` ``[G, n, d]`` and ``mixed[group] · weight[latent]`` of every entry)."""
    d, n, groups, device = weight.shape[1], codes.n, len(prefixes), weight.device
    weight, target, grouped = contiguous_rows(weight), contiguous_rows(target), groups > 1
    tile = gather_tile(d, weight.element_size(), *(NESTED if grouped else ()))
    blocks = cdiv(d, tile.columns)
    sse = torch.empty(blocks, n, groups, dtype=torch.float32, device=device)
    residual = torch.empty(n, d, dtype=weight.dtype, device=device)
    mixed = torch.empty((groups, n, d) if need_mixed and grouped else 0, dtype=weight.dtype, device=device)
    dots = torch.empty(codes.values.shape if need_dots else 0, dtype=torch.float32, device=device)
    parts = torch.empty(blocks if need_dots else 0, codes.storage, dtype=torch.float32, device=device)
    values, indices, order, begins = codes.values, codes.indices, None, None
    if grouped:
        values, indices, order, begins = _by_group(codes, prefixes, by_rank)
    if n and blocks:
        decode_loss_kernel[(cdiv(n, tile.rows), blocks)](
            values, indices, codes.offsets, order, begins, weight, None if bias is None else bias.contiguous(), target,
            on_device(weights, sse, torch.float32) if grouped else None, sse, residual, mixed, parts,
            n, codes.m, codes.width, codes.storage, groups, d, weight.stride(0), target.stride(0),
            RAGGED=codes.offsets is not None, GROUPED=grouped, BIAS=bias is not None, MIXED=need_mixed and grouped,
            DOTS=need_dots, **tile.sizes,
        )  # fmt: skip
    if need_dots:
        join_dots(parts, codes, dots)
    return sse.sum((0, 1), dtype=torch.float64).float(), residual, mixed, dots
