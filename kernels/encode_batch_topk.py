# SPDX-License-Identifier: Apache-2.0
"""`encode_batch_topk` in one pass over the products: sample, gate, certify, repair. No ``[n, m]``, no host sync.

1. The `rank`-th largest of a sample of scores, other latents in every tile of rows, is the bound of the whole batch
   (`encode_plan.batch_sample`). Equal scores go by their place, so it is an entry, not only a score.
2. `gate_batch`: a persistent GEMM; what reaches the bound is appended, score, latent and row, to one buffer of `cap`
   places (two to three times n·k). One counter hands them out; tiles that find it beyond the end append nothing more.
3. If the counter is at least n·k and the buffer holds all, the n·k best are in there, whatever the sample was. Sorted
   by place in the matrix, they are cut at their n·k-th score, ties by their place: the order of arrival is forgotten.
   A ReLU keeps what is positive alone: a bound at or below 0 is raised to the first number above, and then n·k need
   not be reached.
4. Else a flag on the device lets `repair_batch` do it all again in six passes.

Bytes beyond the operands: 12 a candidate (16 with norms) and 24 for their sort; 64 MB for the sample at most.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, from_ordered, ordered, raw_entry
from .encode_batch_repair import repair_batch
from .encode_plan import BatchSample, batch_sample
from .encode_tile import (
    Operands,
    columns_apart,
    programs,
    sampled_latent,
    tile_place,
    tile_products,
    tile_scores,
)
from .encode_topk import Candidates, append, least_scores

BLOCK = 1024
NONE = tl.constexpr(-(2**31))
"""Below the order of every score: a place of the buffer that is not in use."""
_LOWEST_SCORE = -2139095041  # -Inf in the order of `common.ordered`


@triton.jit(do_not_specialize=["n"])
def batch_bounds(
    key_ptr, row_ptr, place_ptr, value_ptr, index_ptr, n, step,
    RELU: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The bounding entry, of ordered score `key` and the `place`-th sampled of its row, as a bound of every row.

    As `encode_topk.row_bounds` leaves them: rows before it let what equals it pass, rows behind it do not.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    last = tl.load(row_ptr).to(tl.int32)
    latent = sampled_latent(tl.load(place_ptr).to(tl.int32), step, last // BM)
    value = from_ordered(tl.load(key_ptr)) + tl.zeros((BLOCK,), tl.float32)
    index = tl.where(rows < last, 0x7FFFFFFF, tl.where(rows == last, latent, -1))
    nan = value != value  # +Inf and NaN pass
    value = tl.where(nan, float("inf"), value)
    if RELU:
        index = tl.where(value <= 0.0, -1, index)
        value = tl.where(value <= 0.0, 0.0, value)
    tl.store(value_ptr + rows, value, mask=rows < n)
    tl.store(index_ptr + rows, index, mask=rows < n)


@triton.jit
def append_batch(pre, score, columns, rows, valid, least, total_ptr, keys_ptr, row_ptr, side_ptr, cap,
                 SIDE: tl.constexpr):  # fmt: skip
    """What reaches `least` goes into the buffer of the batch."""
    hit = valid & ((score < least[:, None]) == 0)  # so NaN passes
    slot = tl.atomic_add(total_ptr + tl.zeros_like(hit.to(tl.int32)), 1, mask=hit, sem="relaxed")
    kept = hit & (slot < cap)
    tl.store(keys_ptr + slot, raw_entry(score, columns[None, :]), mask=kept)
    tl.store(row_ptr + slot, rows[:, None] + tl.zeros_like(columns)[None, :], mask=kept)
    if SIDE:
        tl.store(side_ptr + slot, pre, mask=kept)


@triton.jit(do_not_specialize=["n", "cap"])
def gate_batch(
    x_ptr, w_ptr, b_ptr, norms_ptr, mask_ptr, value_ptr, index_ptr, total_ptr, keys_ptr, row_ptr, side_ptr,
    aux_value_ptr, aux_index_ptr, aux_tally_ptr, aux_keys_ptr, aux_side_ptr,
    n, m, d, cap, sxn, sxd, swm, swd,
    TMA: tl.constexpr, BIAS: tl.constexpr, NORMS: tl.constexpr, MAGNITUDE: tl.constexpr, AUX: tl.constexpr,
    AUX_CAP: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """`encode_topk.gate` with one buffer for all rows.

    `total_ptr`: hits, exact up to `cap`; beyond it, no more than the tiles in work at one time add, so int32 holds it.
    """
    tiles_m, tiles_n = tl.cdiv(n, BM), tl.cdiv(m, BN)
    WIDTH: tl.constexpr = BN // PARTS
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_place(tile, tiles_m, tiles_n, GROUP)
        rows = tile_m * BM + tl.arange(0, BM)
        in_rows = rows < n
        columns = tl.minimum(tile_n * BN + tl.arange(0, BN), m - 1)
        least = least_scores(value_ptr, index_ptr, rows, in_rows, tile_n * BN)
        # Once full, full for good: a storm of equal scores would count them one by one, at a single address.
        open_rows = in_rows & (tl.load(total_ptr, cache_modifier=".cg") <= cap)
        aux_least = least
        if AUX:
            aux_least = least_scores(aux_value_ptr, aux_index_ptr, rows, in_rows, tile_n * BN)
        acc = tile_products(x_ptr, w_ptr, tl.minimum(rows, n - 1), columns, tile_m * BM, tile_n * BN, d,
                            sxn, sxd, swm, swd, TMA, EVEN, PRECISION, BM, BN, BK)  # fmt: skip
        parts = columns_apart(acc, BM, BN, PARTS)
        for part in tl.static_range(PARTS):
            at = tile_n * BN + part * WIDTH + tl.arange(0, WIDTH)
            inside = tl.minimum(at, m - 1)
            pre, score = tile_scores(parts[part], inside, b_ptr, norms_ptr, BIAS, NORMS, MAGNITUDE)
            valid = (at < m)[None, :]
            append_batch(pre, score, at, rows, open_rows[:, None] & valid, least, total_ptr, keys_ptr, row_ptr,
                         side_ptr, cap, NORMS)  # fmt: skip
            if AUX:
                masked = (tl.load(mask_ptr + inside) != 0)[None, :]
                append(pre, score, at, rows, in_rows[:, None] & valid & masked, aux_least, aux_tally_ptr,
                       aux_keys_ptr, aux_side_ptr, NORMS, AUX_CAP)  # fmt: skip


@triton.jit(do_not_specialize=["cap"])
def batch_places(keys_ptr, row_ptr, total_ptr, place_ptr, order_ptr, m, cap, BLOCK: tl.constexpr):
    """Place in the matrix (row·m + latent) and ordered score of every candidate; behind all others where not in use."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    used = e < tl.minimum(tl.load(total_ptr), cap)
    entry = tl.load(keys_ptr + e, mask=used, other=0)
    row = tl.load(row_ptr + e, mask=used, other=0).to(tl.int64)
    score = entry.to(tl.int32).to(tl.float32, bitcast=True)
    place = tl.where(used, row * m + (entry >> 32), 0x7FFFFFFFFFFFFFFF)
    tl.store(place_ptr + e, place, mask=e < cap)
    tl.store(order_ptr + e, tl.where(used, ordered(score), NONE), mask=e < cap)


class BatchCandidates:
    """The buffer of a batch and what becomes of it."""

    def __init__(self, operands: Operands, k: int, sample: BatchSample, relu: bool) -> None:
        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device=operands.x.device)

        self.operands, self.sample, self.relu, self.wanted = operands, sample, relu, operands.n * k
        self.side = operands.side
        self.keys, self.row = empty(sample.cap, dtype=torch.int64), empty(sample.cap, dtype=torch.int32)
        self.pre = empty(sample.cap if self.side else 1, dtype=torch.float32)
        self.value = empty(operands.n, dtype=torch.float32)
        self.index = empty(operands.n, dtype=torch.int32)
        self.total = torch.zeros(1, dtype=torch.int32, device=operands.x.device)

    def bound(self) -> None:
        o, size, rank = self.operands, self.sample.size, self.sample.rank
        device = o.x.device
        if rank:
            keys = o.sampled(size, keys=True)
            self.key = torch.topk(keys.view(-1), rank, sorted=False).values.amin().view(1)
            # Of those that equal it, the last one that is still among the `rank` first.
            left = rank - (keys > self.key).sum()
            equal = (keys == self.key).sum(1)
            upto = equal.cumsum(0)
            row = torch.searchsorted(upto, left.view(1)).clamp_(max=o.n - 1)
            line = (keys.index_select(0, row) == self.key).view(-1).cumsum(0)
            place = torch.searchsorted(line, left - upto[row] + equal[row])
        else:  # everything is a candidate
            self.key = torch.full((1,), _LOWEST_SCORE, dtype=torch.int32, device=device)
            row = torch.full((1,), o.n, dtype=torch.int64, device=device)
            place = row
        # Of a ReLU only positive entries count; with norms a score of 0 may be one of them.
        self.positive = self.relu and not self.side
        batch_bounds[(cdiv(o.n, BLOCK),)](
            self.key, row, place, self.value, self.index, o.n, max(1, o.m // max(1, size)), RELU=self.positive,
            BM=o.tiles.BM, BLOCK=BLOCK,
        )  # fmt: skip

    def gate(self, aux: Candidates | None) -> None:
        o = self.operands
        second = (self.value, self.index, self.row, self.keys, self.pre) if aux is None else aux.arguments()
        gate_batch[(min(programs(o.x.device), o.tiles_m * o.tiles_n),)](
            *o.pointers(), *o.vectors(), o.x if aux is None else aux.mask, self.value, self.index, self.total,
            self.keys, self.row, self.pre, *second, o.n, o.m, o.d, self.sample.cap, *o.strides(), **o.flags(),
            TMA=o.tma, AUX=aux is not None, AUX_CAP=16 if aux is None else aux.sample.cap, GROUP=o.tiles.group,
            PARTS=o.tiles.parts, **o.launch(),
        )  # fmt: skip

    def certified(self) -> Tensor:
        """Bool ``[1]``: the best are all in the buffer."""
        enough = self.total >= self.wanted
        if self.positive:
            enough = enough | (self.key <= 0)
        return enough & (self.total <= self.sample.cap)

    def cut(self, good: Tensor, values: Tensor, indices: Tensor, smallest: Tensor) -> Tensor:
        """Fill values and indices (zeros so far) and lower `smallest`, where `good`. Returns the offsets."""
        o, cap, wanted = self.operands, self.sample.cap, self.wanted
        place = torch.empty(cap, dtype=torch.int64, device=o.x.device)
        key = torch.empty(cap, dtype=torch.int32, device=o.x.device)
        batch_places[(cdiv(cap, BLOCK),)](self.keys, self.row, self.total, place, key, o.m, cap, BLOCK=BLOCK)
        place, order = torch.sort(place)
        key = key[order]
        pivot = torch.topk(key, wanted, sorted=False).values.amin()
        equal = key == pivot
        kept = (key > pivot) | equal & (equal.cumsum(0) <= wanted - (key > pivot).sum())
        kept &= (key != NONE.value) & good
        entry = self.keys[order].view(torch.int32).view(-1, 2)  # latent above the bits of the score
        score, latent = entry[:, 0].contiguous().view(torch.float32), entry[:, 1]
        pre = self.pre[order] if self.side else score
        if self.relu:
            kept &= ~(pre <= 0)
        to = torch.where(kept, kept.cumsum(0) - 1, wanted)  # the last place takes what is not kept
        values.index_copy_(0, to, pre.to(values.dtype))
        indices.index_copy_(0, to, latent)
        torch.minimum(smallest, torch.where(kept & (score > 0), score, torch.inf).amin(), out=smallest)
        begins = torch.searchsorted(place, torch.arange(o.n + 1, device=place.device) * o.m)
        return torch.cat([begins.new_zeros(1), kept.cumsum(0)])[begins]


def select_batch(
    o: Operands, k: int, relu: bool, aux: Candidates | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """values, indices ``[n·k]``, offsets, the smallest positive score that was selected.

    `aux`: a selection of every row in the same pass, its bounds set; it is left to be certified.
    """
    n, device, size = o.n, o.x.device, o.n * k
    values = torch.zeros(size + 1, dtype=o.x.dtype, device=device)
    indices = torch.zeros(size + 1, dtype=torch.int32, device=device)
    smallest = torch.full((), torch.inf, dtype=torch.float32, device=device)
    if n == 0:
        return values[:0], indices[:0], torch.zeros(1, dtype=torch.int64, device=device), smallest
    batch = BatchCandidates(o, k, batch_sample(n, o.m, k), relu)
    batch.bound()
    batch.gate(aux)
    good = batch.certified()
    offsets = torch.zeros(n + 1, dtype=torch.int64, device=device)
    if batch.sample.cap:
        offsets = batch.cut(good, values, indices, smallest)
    values, indices = values[:size], indices[:size]
    repaired = repair_batch(o, k, relu, (~good).to(torch.int32), values, indices, smallest)
    return values, indices, torch.where(good, offsets, repaired), smallest
