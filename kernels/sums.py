# SPDX-License-Identifier: Apache-2.0
"""Sums by latent: the gradients of weights, biases and values from entries that are sorted by latent.

The entries of each latent, in the order of their rows, are a segment. One gather of the rows that they meet (of x, or
of the output's gradient) gives the sum ``Σ coef · row`` and the dots ``row · weight[latent]`` together. Nothing is
added atomically and no result depends on what ran when: segments of more than `CHUNK` entries are cut into chunks of
that size, whose sums another launch adds in order. So the work of a program is bounded, whatever the distribution over
latents, and grids depend on sizes alone: no host sync, and CUDA graphs can capture it (but for row-sparse results,
whose size the host has to know).

Bytes: programs run by block of columns, and such a block of the gathered rows (8 MB at n 8192) stays in L2, so each of
them crosses memory once: ``(n + m + m·[dots])·d`` elements, 2.2 GB in bfloat16 at n 8192, d 4096, m 131072, of which
80 % of copy bandwidth is expected, besides ``nnz·d`` elements (4.3 GB) from L2. The sort moves about ``120·nnz`` bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import INTERPRETED, cdiv
from .decode import join_dots
from .entries import BLOCK, Codes, contiguous_rows, gather_tile, gathered, group_of, row_of, used_entries

CHUNK = 32 if INTERPRETED else 256
"""Entries of a latent that one program adds up. It fixes the order of sums: never tuned."""
SHORT, LONG = (4, 2), (8, 1)
"""Entries at a time and segments of a program: where these are whole and mostly short, and where they are chunks."""


@triton.jit(do_not_specialize=["n", "m", "width", "storage"])
def keys_kernel(keys, coef, indices, offsets, n, m, width, storage,
                RAGGED: tl.constexpr, ZEROS: tl.constexpr, B: tl.constexpr):  # fmt: skip
    """What entries are sorted by: their latent, or m if they are not in use (or, without ZEROS, their value is 0)."""
    e = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    used = e < used_entries(offsets, n, width, storage, RAGGED)
    latent = tl.load(indices + e, mask=used, other=-1)
    used &= (latent >= 0) & (latent < m)
    if not ZEROS:
        used &= tl.load(coef + e, mask=used, other=0.0).to(tl.float32) != 0
    tl.store(keys + e, tl.where(used, latent, m).to(tl.int32), mask=e < storage)


@triton.jit(do_not_specialize=["n", "width", "storage", "groups"])
def entries_kernel(row, coef_out, order, coef, indices, offsets, prefixes, n, width, storage, groups,
                   RAGGED: tl.constexpr, GROUPED: tl.constexpr, BY_RANK: tl.constexpr, B: tl.constexpr):  # fmt: skip
    """Row (``group·n + row``, if GROUPED) and coefficient of the sorted entries, side by side."""
    p = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = p < storage
    e = tl.load(order + p, mask=inside, other=0)
    found, rank = row_of(offsets, e, n, width, RAGGED)
    if GROUPED:
        latent = tl.load(indices + e, mask=inside, other=0).to(tl.int64)
        found += group_of(prefixes, groups, latent, rank, BY_RANK).to(tl.int64) * n
    tl.store(row + p, found.to(row.dtype.element_ty), mask=inside)
    tl.store(coef_out + p, tl.load(coef + e, mask=inside, other=0.0).to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["segments", "chunk"])
def segment(s, segments, latents, slots, begin, end, chunk,
            LISTED: tl.constexpr, SLOTTED: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """Latent, first and last entry, and row of the result (or -1) of the segments s.

    WHOLE: `begin` and `end` are by latent, and the result of a segment of more than `chunk` entries isn't this
    launch's: no entries, and -1. Else they are by segment, and so is a result that is not SLOTTED; none if it is empty.
    """
    live = s < segments
    latent = tl.load(latents + s, mask=live, other=0).to(tl.int64) if LISTED else s
    slot = tl.load(slots + s, mask=live, other=-1).to(tl.int64) if SLOTTED else s
    at = latent if WHOLE else s
    first = tl.load(begin + at, mask=live, other=0)
    last = tl.load(end + at, mask=live, other=0)
    if WHOLE:
        mine = live & (last - first <= chunk)
        last = tl.where(mine, last, first)
    else:
        mine = live & (last > first)
    return latent, first, last, tl.where(mine, slot, -1)


@triton.jit(do_not_specialize=["segments", "chunk", "storage"])
def sums_kernel(
    out, dots, source, weight, row, coef, order, latents, slots, begin, end, scale,
    segments, chunk, storage, d, stride_source, stride_weight,
    LISTED: tl.constexpr, SLOTTED: tl.constexpr, WHOLE: tl.constexpr, SUM: tl.constexpr, DOTS: tl.constexpr,
    SCALED: tl.constexpr, N: tl.constexpr, E: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """For N segments and D columns: ``out[slot] = scale · Σ_e coef[e] · source[row[e]]``, and
    ``dots[block, order[e]] = source[row[e]] · weight[latent]``."""
    s = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    cols = tl.program_id(1) * D + tl.arange(0, D)
    latent, first, last, slot = segment(s, segments, latents, slots, begin, end, chunk, LISTED, SLOTTED, WHOLE)
    count = (last - first).to(tl.int32)
    if DOTS:
        mask = (count > 0)[:, None] & (cols < d)[None, :]
        met = tl.load(weight + latent[:, None] * stride_weight + cols[None, :], mask=mask, other=0.0)
        met = met.to(tl.float32)[:, None, :]
    acc = tl.zeros([N, D], dtype=tl.float32)
    for start in range(0, tl.max(count, axis=0), E):
        place = start + tl.arange(0, E)
        used = place[None, :] < count[:, None]
        at = first[:, None] + place[None, :]
        i = tl.load(row + at, mask=used, other=0).to(tl.int64)
        c = tl.load(coef + at, mask=used, other=0.0)
        rows = gathered(source, i, stride_source, cols, d, used if DOTS else used & (c != 0))
        if SUM:
            part = c[:, :, None] * rows
            if DOTS:  # rows of coefficient 0 were read
                part = tl.where((c != 0)[:, :, None], part, 0.0)
            acc += tl.sum(part, axis=1)
        if DOTS:
            e = tl.load(order + at, mask=used, other=0)
            tl.store(dots + tl.program_id(1).to(tl.int64) * storage + e, tl.sum(met * rows, axis=2), mask=used)
    if SUM:
        if SCALED:
            acc *= tl.load(scale).to(tl.float32)
        mask = (slot >= 0)[:, None] & (cols < d)[None, :]
        tl.store(out + slot[:, None] * d + cols[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["segments"])
def join_kernel(out, parts, slots, begin, end, scale, segments, d,
                SCALED: tl.constexpr, N: tl.constexpr, E: tl.constexpr, D: tl.constexpr):  # fmt: skip
    """``out[slot] = scale · Σ_c parts[c]``, over the chunks c of N segments, in order."""
    s = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    cols = tl.program_id(1) * D + tl.arange(0, D)
    _, first, last, slot = segment(s, segments, s, slots, begin, end, 0, False, True, False)
    count = (last - first).to(tl.int32)
    acc = tl.zeros([N, D], dtype=tl.float32)
    for start in range(0, tl.max(count, axis=0), E):
        place = start + tl.arange(0, E)
        used = place[None, :] < count[:, None]
        acc += tl.sum(gathered(parts, first[:, None] + place[None, :], d, cols, d, used), axis=1)
    if SCALED:
        acc *= tl.load(scale).to(tl.float32)
    mask = (slot >= 0)[:, None] & (cols < d)[None, :]
    tl.store(out + slot[:, None] * d + cols[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["segments", "chunk"])
def coef_sums_kernel(
    out, coef, slots, begin, end, segments, chunk,
    SLOTTED: tl.constexpr, WHOLE: tl.constexpr, N: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """``out[slot] = Σ_e coef[e]`` for N segments, E entries at a time."""
    s = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    _, first, last, slot = segment(s, segments, s, slots, begin, end, chunk, False, SLOTTED, WHOLE)
    count = (last - first).to(tl.int32)
    acc = tl.zeros([N], dtype=tl.float32)
    for start in range(0, tl.max(count, axis=0), E):
        place = start + tl.arange(0, E)
        used = place[None, :] < count[:, None]
        acc += tl.sum(tl.load(coef + first[:, None] + place[None, :], mask=used, other=0.0), axis=1)
    tl.store(out + slot, acc.to(out.dtype.element_ty), mask=slot >= 0)


class ByLatent:
    """The entries of codes in the order of their latents, and passes over them.

    Args:
        codes: their values are the coefficients.
        zeros: keep entries of value 0. A pass without dots has no use for them, and padding may be very many entries
            of one latent.
        prefixes: int32, for entries that meet the row of their group in ``[prefixes, n, d]``.
    """

    def __init__(self, codes: Codes, zeros: bool, prefixes: Tensor | None = None, by_rank: bool = False) -> None:
        self.codes, self.zeros = codes, zeros
        groups, storage, device = 1 if prefixes is None else len(prefixes), codes.storage, codes.indices.device
        keys, self.order = torch.sort(self._keys(zeros), stable=True)
        row_type = torch.int32 if codes.n * groups < 2**31 else torch.int64
        self.row = torch.empty(storage, dtype=row_type, device=device)
        self.coef = torch.empty(storage, dtype=torch.float32, device=device)
        if storage:
            entries_kernel[(cdiv(storage, BLOCK),)](
                self.row, self.coef, self.order, codes.values, codes.indices, codes.offsets, prefixes,
                codes.n, codes.width, storage, groups,
                RAGGED=codes.offsets is not None, GROUPED=prefixes is not None, BY_RANK=by_rank, B=BLOCK,
            )  # fmt: skip
        self.start = torch.searchsorted(keys, torch.arange(codes.m + 1, dtype=torch.int32, device=device))
        self._cut()

    def _keys(self, zeros: bool) -> Tensor:
        codes = self.codes
        keys = torch.empty(codes.storage, dtype=torch.int32, device=codes.indices.device)
        if codes.storage:
            keys_kernel[(cdiv(codes.storage, BLOCK),)](
                keys, codes.values, codes.indices, codes.offsets, codes.n, codes.m, codes.width, codes.storage,
                RAGGED=codes.offsets is not None, ZEROS=zeros, B=BLOCK,
            )  # fmt: skip
        return keys

    def _cut(self) -> None:
        """Chunks of the long segments, and which belong to one: as many as there could be, most of them empty."""
        start, m, device = self.start, self.codes.m, self.start.device
        longs = self.codes.storage // (CHUNK + 1)
        size = start.diff()
        chunks = torch.where(size > CHUNK, (size + (CHUNK - 1)) // CHUNK, 0)
        behind = chunks.cumsum(0)
        ahead = behind - chunks
        chunk = torch.arange(self.codes.storage // CHUNK + longs if longs else 0, device=device)
        self.chunk_latent = latent = torch.searchsorted(behind, chunk, right=True).clamp_(max=m - 1)
        begin = start[latent] + (chunk - ahead[latent]) * CHUNK
        end = torch.minimum(begin + CHUNK, start[latent + 1])
        self.chunk_begin, self.chunk_end = (torch.where(chunk < behind[-1], t, 0) for t in (begin, end))
        long, count = torch.arange(longs, device=device), (chunks > 0).cumsum(0)
        self.long = torch.searchsorted(count, long, right=True).clamp_(max=m - 1)
        self.long_begin, self.long_end = (torch.where(long < count[-1], t[self.long], 0) for t in (ahead, behind))

    def touched(self) -> Tensor:
        """The latents with an entry whose coefficient is not 0, ascending, int64 ``[u]``. One host sync."""
        if not self.zeros:
            return self.start.diff().nonzero().view(-1)
        mark = torch.zeros(self.codes.m + 1, dtype=torch.bool, device=self.start.device)
        return mark.index_fill_(0, self._keys(False).long(), True)[:-1].nonzero().view(-1)

    def sums(
        self,
        source: Tensor,
        out: Tensor | None = None,
        rows: Tensor | None = None,
        weight: Tensor | None = None,
        dots: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> None:
        """Sums of the rows of `source` into `out` ``[m, d]``, or ``[u, d]`` for the latents `rows` ``[u]``; the dot of
        every entry's row with that of `weight` into `dots`, shaped as the values; all times the number `scale`."""
        d, chunks, longs = source.shape[-1], len(self.chunk_latent), len(self.long)
        source = contiguous_rows(source)
        weight = None if dots is None else contiguous_rows(weight)
        short, long = (gather_tile(d, source.element_size(), *shape) for shape in (SHORT, LONG))
        blocks = cdiv(d, short.columns)
        parts = torch.empty(0 if out is None else chunks, d, dtype=torch.float32, device=source.device)
        part_dots = torch.empty(
            0 if dots is None else blocks, self.codes.storage, dtype=torch.float32, device=source.device
        )

        def launch(tile, segments, result, latents, slots, begin, end, whole, scaled):
            if segments and blocks:
                sums_kernel[(cdiv(segments, tile.rows), blocks)](
                    result, part_dots, source, weight, self.row, self.coef, self.order, latents, slots, begin, end,
                    scale, segments, CHUNK, self.codes.storage, d, source.stride(0),
                    0 if weight is None else weight.stride(0),
                    LISTED=latents is not None, SLOTTED=slots is not None, WHOLE=whole, SUM=out is not None,
                    DOTS=dots is not None, SCALED=scaled, **tile.sizes,
                )  # fmt: skip

        scaled, (latents, slots) = scale is not None, self._visited(rows, dots is not None)
        segments = self.codes.m if latents is None else len(latents)
        launch(short, segments, out, latents, slots, self.start, self.start[1:], True, scaled)
        launch(long, chunks, parts, self.chunk_latent, None, self.chunk_begin, self.chunk_end, False, False)
        if out is not None and longs and blocks:
            join_kernel[(cdiv(longs, long.rows), blocks)](
                out, parts, _slots(self.long, rows), self.long_begin, self.long_end, scale, longs, d,
                SCALED=scaled, **long.sizes,
            )  # fmt: skip
        if dots is not None:
            join_dots(part_dots, self.codes, dots, scale)

    def _visited(self, rows: Tensor | None, dots: bool) -> tuple[Tensor | None, Tensor | None]:
        """The latents of a pass (None: all) and where their sums go (-1: nowhere; None: in their own order)."""
        if rows is None or not dots:
            return rows, None
        present = self.start.diff().nonzero().view(-1)  # also those that were stored with value 0 everywhere
        return present, _slots(present, rows)

    def coef_sums(self, dtype: torch.dtype) -> Tensor:
        """``[m]``: the sum of the coefficients of every latent."""
        out = torch.empty(self.codes.m, dtype=dtype, device=self.start.device)
        parts = torch.empty(len(self.chunk_latent), dtype=torch.float32, device=out.device)

        def launch(segments, result, coef, slots, begin, end, whole):
            if segments:
                coef_sums_kernel[(cdiv(segments, 32),)](
                    result, coef, slots, begin, end, segments, CHUNK,
                    SLOTTED=slots is not None, WHOLE=whole, N=32, E=16,
                )  # fmt: skip

        launch(self.codes.m, out, self.coef, None, self.start, self.start[1:], True)
        launch(len(parts), parts, self.coef, None, self.chunk_begin, self.chunk_end, False)
        launch(len(self.long), out, parts, self.long, self.long_begin, self.long_end, False)
        return out


def _slots(latents: Tensor, rows: Tensor | None) -> Tensor:
    """Place of every latent among the ascending `rows`, -1 if it isn't one; without `rows`, the latent itself."""
    if rows is None:
        return latents
    if not len(rows):
        return torch.full_like(latents, -1)
    at = torch.searchsorted(rows, latents).clamp_(max=len(rows) - 1)
    return torch.where(rows[at] == latents, at, -1)
