# SPDX-License-Identifier: Apache-2.0
"""Squared errors of nested reconstructions, and what their gradients need, in one gather of the decoder rows.

A program has one block of columns of a row: the residuals of up to 8 prefixes side by side in registers, in which every
entry that it gathers counts for its own prefix and all later ones. The dots of the value gradients read the same pieces
of rows again, 64 KB at k 64, at once, so from L1 or L2. More than 8 prefixes are taken eight at a time, from the last
ones to the first, for their weighted sums run that way; each eight gather again.

Bytes: ``nnz·d`` elements of W_dec as in `decode`, the target, the residual, ``G·n·d`` elements for G > 1 prefixes, and
``4·nnz`` of dots for every block of columns: 4.5 GB in bfloat16 at n 8192, d 4096, k 64, at 80 % of copy bandwidth.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import INTERPRETED, cdiv, next_power_of_2
from .decode import join_dots
from .entries import Codes, Tile, contiguous_rows, gather_tile, gathered, group_of, on_device, row_entries

MOST_GROUPS = 8


@triton.jit
def entries_at(values, indices, first, count, start, prefixes, groups, m,
               BY_RANK: tl.constexpr, G: tl.constexpr, E: tl.constexpr):  # fmt: skip
    """Places, which are in use, latents, values (NaN for a latent that does not exist) and groups of E entries."""
    place = start + tl.arange(0, E)
    used = place[None, :] < count[:, None]
    at = first[:, None] + place[None, :]
    latent = tl.load(indices + at, mask=used, other=-1)
    inside = (latent >= 0) & (latent < m)
    value = tl.load(values + at, mask=used, other=0.0).to(tl.float32)
    value = tl.where(used & (inside == 0), float("nan"), value)
    if G > 1:
        group = group_of(prefixes, groups, latent, place[None, :] + tl.zeros_like(latent), BY_RANK)
    else:
        group = tl.zeros_like(latent)
    return at, used, inside, latent.to(tl.int64), value, group


@triton.jit(do_not_specialize=["n", "m", "width", "storage", "groups"])
def decode_loss_kernel(
    values, indices, offsets, weight, bias, target, prefixes, weights, sse, residual, mixed, dots,
    n, m, width, storage, groups, d, stride, stride_target,
    RAGGED: tl.constexpr, BIAS: tl.constexpr, BY_RANK: tl.constexpr, MIXED: tl.constexpr, DOTS: tl.constexpr,
    G: tl.constexpr, N: tl.constexpr, E: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Residuals of all groups for N rows and D columns; see `decode_loss`."""
    i = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    cols = tl.program_id(1) * D + tl.arange(0, D)
    block = tl.program_id(1).to(tl.int64)
    first, count = row_entries(offsets, i, i < n, width, storage, RAGGED)
    most = tl.max(count, axis=0)
    mask = (i < n)[:, None] & (cols < d)[None, :]
    goal = tl.load(target + i[:, None] * stride_target + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        goal -= tl.load(bias + cols, mask=cols < d, other=0.0).to(tl.float32)[None, :]
    carry = tl.zeros([N, D], dtype=tl.float32)
    rounds = (groups + G - 1) // G
    for turn in range(0, rounds):
        low = (rounds - 1 - turn) * G
        g = low + tl.arange(0, G)
        acc = goal[:, None, :] + tl.zeros([N, G, D], dtype=tl.float32)
        for start in range(0, most, E):
            _, _, inside, latent, value, group = entries_at(
                values, indices, first, count, start, prefixes, groups, m, BY_RANK, G, E
            )
            rows = gathered(weight, latent, stride, cols, d, inside & (value != 0))
            part = value[:, :, None] * rows
            if G == 1:
                acc -= tl.sum(part, axis=1)[:, None, :]
            else:
                counts = group[:, None, :] <= g[None, :, None]
                acc -= tl.sum(tl.where(counts[:, :, :, None], part[:, None, :, :], 0.0), axis=2)
        acc = tl.where((cols < d)[None, None, :], acc, 0.0)
        known = (i < n)[:, None] & (g < groups)[None, :]
        tl.store(sse + (block * n + i[:, None]) * groups + g[None, :], tl.sum(acc * acc, axis=2), mask=known)
        if turn == 0:
            last = tl.sum(tl.where((g == groups - 1)[None, :, None], acc, 0.0), axis=1)
            tl.store(residual + i[:, None] * d + cols[None, :], last.to(residual.dtype.element_ty), mask=mask)
        if MIXED or DOTS:
            if G > 1:  # one prefix alone has the weight 1
                share = tl.load(weights + g, mask=g < groups, other=0.0)
                acc = tl.where((g < groups)[None, :, None], share[None, :, None] * acc, 0.0)
                later = (g[:, None] <= g[None, :])[None, :, :, None]
                acc = tl.sum(tl.where(later, acc[:, None, :, :], 0.0), axis=2) + carry[:, None, :]
                carry = tl.sum(tl.where((g == low)[None, :, None], acc, 0.0), axis=1)
            if MIXED:
                own_row = (g.to(tl.int64)[None, :] * n + i[:, None]) * d
                to = mixed + own_row[:, :, None] + cols[None, None, :]
                tl.store(to, acc.to(mixed.dtype.element_ty), mask=known[:, :, None] & (cols < d)[None, None, :])
            if DOTS:
                for start in range(0, most, E):
                    at, used, inside, latent, value, group = entries_at(
                        values, indices, first, count, start, prefixes, groups, m, BY_RANK, G, E
                    )
                    mine = used & (group >= low) & (group < low + G)
                    rows = gathered(weight, latent, stride, cols, d, inside & mine)
                    if G == 1:
                        met = acc
                    else:
                        own = group[:, None, :] == g[None, :, None]
                        met = tl.sum(tl.where(own[:, :, :, None], acc[:, :, None, :], 0.0), axis=1)
                    tl.store(dots + block * storage + at, tl.sum(met * rows, axis=2), mask=mine)


def loss_tile(d: int, item: int, groups: int) -> tuple[int, Tile]:
    """Prefixes at a time, and the tile."""
    at_once = groups if groups <= 2 else MOST_GROUPS
    if INTERPRETED:
        columns = min(128, max(16, next_power_of_2(d)))
        return at_once, Tile(max(1, 2**17 // (8 * at_once * columns)), 8, columns, 4)
    tile = gather_tile(d, item, entries=8 if at_once == 1 else 4)
    if at_once > 2:  # more warps, so that the residuals stay in registers
        tile = Tile(1, 4, tile.columns, max(tile.warps, 16 // item))
    return at_once, tile


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
    weight, target = contiguous_rows(weight), contiguous_rows(target)
    at_once, tile = loss_tile(d, weight.element_size(), groups)
    blocks = cdiv(d, tile.columns)
    keep = need_mixed and groups > 1
    sse = torch.empty(blocks, n, groups, dtype=torch.float32, device=device)
    residual = torch.empty(n, d, dtype=weight.dtype, device=device)
    mixed = torch.empty((groups, n, d) if keep else 0, dtype=weight.dtype, device=device)
    dots = torch.empty(codes.values.shape if need_dots else 0, dtype=torch.float32, device=device)
    parts = torch.empty(blocks if need_dots else 0, codes.storage, dtype=torch.float32, device=device)
    if n and blocks:
        decode_loss_kernel[(cdiv(n, tile.rows), blocks)](
            codes.values, codes.indices, codes.offsets, weight, None if bias is None else bias.contiguous(), target,
            *((on_device(prefixes, codes.indices, torch.int32), on_device(weights, sse, torch.float32))
              if groups > 1 else (None, None)),
            sse, residual, mixed, parts, n, codes.m, codes.width, codes.storage, groups, d, weight.stride(0),
            target.stride(0), RAGGED=codes.offsets is not None, BIAS=bias is not None, BY_RANK=by_rank, MIXED=keep,
            DOTS=need_dots, G=at_once, **tile.sizes,
        )  # fmt: skip
    if need_dots:
        join_dots(parts, codes, dots)
    return sse.sum((0, 1), dtype=torch.float64).float(), residual, mixed, dots
