# SPDX-License-Identifier: Apache-2.0
"""`encode_topk` in one pass over the products: sample, gate, certify, repair. No ``[n, m]``, no host sync.

1. `sample_scores`, `row_bounds`: the scores of a few latents give every row a bound (`encode_plan`).
2. `gate`: a persistent GEMM; what reaches its row's bound is appended, score and latent, to the row's buffer. Atomic
   additions to a counter hand out the slots; `certify` makes unique keys of them, so their order doesn't matter.
3. `certify`: a row whose count is at least k and fits the buffer has all of its k best in there, whatever the sample
   was: they are cut out. Any other row goes on a list on the device.
4. `repair_scan`, `repair_merge` (`encode_repair`): rows on the list, exactly, by a bound that rises with what was seen.

A second selection (AuxK) has its own bounds and buffers in the same pass.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import LOWEST, cdiv, from_ordered, key_index, key_value, next_power_of_2, ordered, pack, raw_entry
from .encode_plan import Sample
from .encode_tile import Operands, columns_apart, programs, sampled_latent, tile_place, tile_products, tile_scores
from .select import compact, kth_key
from .topk import emit, program_rows, scan_warps

APART = tl.constexpr(8)
"""Places from one row's counter to the next, 32 bytes. Were they side by side, Triton would lay the slots out by rows,
and every entry would cross shared memory twice: for its slot and for its place."""


@triton.jit(do_not_specialize=["n", "rank"])
def row_bounds(
    scores_ptr, mask_ptr, value_ptr, index_ptr, tally_ptr, failed_ptr, n, size, step, rank,
    MASK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The `rank`-th largest sampled entry of every row, as a score and a latent: entries at or above it are candidates.

    -Inf (everything passes) where fewer latents were sampled; where it is NaN, +Inf and NaN pass.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < n
    j = tl.arange(0, BLOCK)
    inside = j < size
    latent = sampled_latent(j, step)
    if MASK:
        inside = inside & (tl.load(mask_ptr + latent, mask=inside, other=0) != 0)
    valid = in_rows[:, None] & inside[None, :]
    score = tl.load(scores_ptr + rows[:, None] * size + j[None, :], mask=valid, other=0.0)
    keys = tl.where(valid, pack(score, latent[None, :]), LOWEST)
    bound = kth_key(keys, rank)
    enough = tl.sum((keys >= bound[:, None]).to(tl.int32), 1) >= rank
    least = tl.min(tl.where(keys >= bound[:, None], keys, 0x7FFFFFFFFFFFFFFF), 1)
    value = tl.where(enough, key_value(least), float("-inf"))
    index = tl.where(enough, key_index(least), 0x7FFFFFFF)
    nan = value != value
    tl.store(value_ptr + rows, tl.where(nan, float("inf"), value), mask=in_rows)
    tl.store(index_ptr + rows, tl.where(nan, -1, index), mask=in_rows)
    tl.store(tally_ptr + rows * APART, tl.zeros((ROWS,), tl.int32), mask=in_rows)
    if tl.program_id(0) == 0:
        tl.store(failed_ptr, 0)


@triton.jit
def least_scores(value_ptr, index_ptr, rows, in_rows, first):
    """What a score has to reach, for every row of a tile whose first column is `first`.

    The row's bound; the next float behind the tile where the bounding entry lies: equal scores go by the lower latent.
    In that tile all that equal the bound pass: they come next in the order, so what passes is still all above an entry.
    """
    bound = tl.load(value_ptr + rows, mask=in_rows, other=0.0)
    last = tl.load(index_ptr + rows, mask=in_rows, other=0)
    return tl.where((first <= last) | (bound == float("inf")), bound, from_ordered(ordered(bound) + 1))


@triton.jit
def append(pre, score, columns, rows, valid, least, tally_ptr, keys_ptr, side_ptr,
           SIDE: tl.constexpr, CAP: tl.constexpr):  # fmt: skip
    """What reaches `least` goes into the row's buffer. All of it is counted, beyond the buffer's end too.

    Every entry of the matrix comes by here: one comparison, and no arithmetic for keys (`certify` makes them).
    """
    hit = valid & ((score < least[:, None]) == 0)  # so NaN passes
    own = (rows * APART)[:, None] + tl.zeros_like(columns)[None, :]
    slot = tl.atomic_add(tally_ptr + own, 1, mask=hit, sem="relaxed")
    kept = hit & (slot < CAP)
    to = rows.to(tl.int64)[:, None] * CAP + slot
    tl.store(keys_ptr + to, raw_entry(score, columns[None, :]), mask=kept)
    if SIDE:
        tl.store(side_ptr + to, pre, mask=kept)


@triton.jit
def append_tile(
    acc, first, m, rows, in_rows, least, aux_least, b_ptr, norms_ptr, mask_ptr,
    tally_ptr, keys_ptr, side_ptr, aux_tally_ptr, aux_keys_ptr, aux_side_ptr,
    BIAS: tl.constexpr, NORMS: tl.constexpr, MAGNITUDE: tl.constexpr, SIDE: tl.constexpr,
    AUX: tl.constexpr, CAP: tl.constexpr, AUX_CAP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Products of the columns from `first` on, to the buffers of their rows."""
    columns = first + tl.arange(0, BN)
    inside = tl.minimum(columns, m - 1)
    pre, score = tile_scores(acc, inside, b_ptr, norms_ptr, BIAS, NORMS, MAGNITUDE)
    valid = in_rows[:, None] & (columns < m)[None, :]
    append(pre, score, columns, rows, valid, least, tally_ptr, keys_ptr, side_ptr, SIDE, CAP)
    if AUX:
        masked = tl.load(mask_ptr + inside) != 0
        append(pre, score, columns, rows, valid & masked[None, :], aux_least, aux_tally_ptr, aux_keys_ptr, aux_side_ptr,
               SIDE, AUX_CAP)  # fmt: skip


@triton.jit(do_not_specialize=["n"])
def gate(
    x_ptr, w_ptr, b_ptr, norms_ptr, mask_ptr,
    value_ptr, index_ptr, tally_ptr, keys_ptr, side_ptr,
    aux_value_ptr, aux_index_ptr, aux_tally_ptr, aux_keys_ptr, aux_side_ptr,
    n, m, d, sxn, sxd, swm, swd,
    TMA: tl.constexpr, BIAS: tl.constexpr, NORMS: tl.constexpr, MAGNITUDE: tl.constexpr, SIDE: tl.constexpr,
    AUX: tl.constexpr, CAP: tl.constexpr, AUX_CAP: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(n, BM), tl.cdiv(m, BN)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_place(tile, tiles_m, tiles_n, GROUP)
        rows = tile_m * BM + tl.arange(0, BM)
        in_rows = rows < n
        columns = tl.minimum(tile_n * BN + tl.arange(0, BN), m - 1)
        # Ahead of the products, which then hide the time that it takes.
        least = least_scores(value_ptr, index_ptr, rows, in_rows, tile_n * BN)
        aux_least = least
        if AUX:
            aux_least = least_scores(aux_value_ptr, aux_index_ptr, rows, in_rows, tile_n * BN)
        acc = tile_products(x_ptr, w_ptr, tl.minimum(rows, n - 1), columns, tile_m * BM, tile_n * BN, d,
                            sxn, sxd, swm, swd, TMA, EVEN, PRECISION, BM, BN, BK)  # fmt: skip
        # A part of the columns at a time: beside the accumulators there are few registers for slots and addresses.
        parts = columns_apart(acc, BM, BN, PARTS)
        for part in tl.static_range(PARTS):
            append_tile(
                parts[part], tile_n * BN + part * (BN // PARTS), m, rows, in_rows, least, aux_least, b_ptr, norms_ptr,
                mask_ptr, tally_ptr, keys_ptr, side_ptr, aux_tally_ptr, aux_keys_ptr, aux_side_ptr,
                BIAS, NORMS, MAGNITUDE, SIDE, AUX, CAP, AUX_CAP, BN // PARTS,
            )  # fmt: skip


@triton.jit(do_not_specialize=["n", "k"])
def certify(
    keys_ptr, side_ptr, tally_ptr, count_ptr, limit_ptr, failed_ptr, list_ptr, n, k,
    LIMIT: tl.constexpr, SIDE: tl.constexpr, ROWS: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Cut certified rows back to their k best; list the others, and leave them a count of 0.

    `limit_ptr`: with LIMIT, how many latents there are to select among, if fewer than k.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < n
    count = tl.load(tally_ptr + rows * APART, mask=in_rows, other=0)
    wanted = k
    if LIMIT:
        wanted = tl.minimum(tl.load(limit_ptr), k)
    good = in_rows & (count >= wanted) & (count <= CAP)
    compact(keys_ptr, side_ptr, rows, good, tl.where(good, count, 0), wanted, SIDE, CAP, True)
    tl.store(count_ptr + rows, tl.where(good, tl.minimum(count, k), 0), mask=in_rows)
    failed = in_rows & (good == 0)
    slot = tl.atomic_add(failed_ptr + tl.zeros((ROWS,), tl.int32), 1, mask=failed, sem="relaxed")
    tl.store(list_ptr + slot, rows.to(tl.int32), mask=failed)


@dataclasses.dataclass
class Candidates:
    """The buffers of one selection of k a row, as wide as its sample needs."""

    operands: Operands
    k: int
    sample: Sample
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device=o.x.device)

        o, cap = self.operands, self.sample.cap
        n = o.tiles_m * o.tiles.BM  # the repair uses the buffers by tiles of rows
        self.side = o.side
        self.keys = empty(n, cap, dtype=torch.int64)
        self.pre = empty(n if self.side else 1, cap if self.side else 1, dtype=torch.float32)
        self.value, self.index = empty(n, dtype=torch.float32), empty(n, dtype=torch.int32)
        self.tally = empty(n * APART.value, dtype=torch.int32)
        self.count, self.list = empty(n, dtype=torch.int32), empty(n, dtype=torch.int32)
        self.failed = empty(1, dtype=torch.int32)
        # Latents to select among, where a mask may leave fewer than k: known to the device alone.
        self.limit = None if self.mask is None else self.mask.sum(dtype=torch.int32).view(1)

    def bounds(self, scores: Tensor) -> None:
        n, size = scores.shape
        block = next_power_of_2(size)
        rows = program_rows(n, block)
        row_bounds[(cdiv(n, rows),)](
            scores, scores if self.mask is None else self.mask, self.value, self.index, self.tally, self.failed, n,
            size, self.operands.m // size, self.sample.rank, MASK=self.mask is not None, ROWS=rows, BLOCK=block,
            num_warps=scan_warps(rows * block),
        )  # fmt: skip

    def arguments(self) -> tuple[Tensor, ...]:
        return self.value, self.index, self.tally, self.keys, self.pre

    def certify(self) -> None:
        n, cap = self.operands.n, self.sample.cap
        rows = program_rows(n, cap)
        certify[(cdiv(n, rows),)](
            self.keys, self.pre, self.tally, self.count, self.count if self.limit is None else self.limit, self.failed,
            self.list, n, self.k, LIMIT=self.limit is not None, SIDE=self.side, ROWS=rows, CAP=cap,
            num_warps=scan_warps(rows * cap),
        )  # fmt: skip

    def finish(self, values: Tensor, indices: Tensor, relu: bool, fill: Tensor | None) -> None:
        """Certified rows as sorted codes; then the failed ones, in the buffers that are free now."""
        from .encode_repair import repair

        o = self.operands
        emit(self.keys, self.pre if self.side else None, self.count, values, indices, relu, fill)
        repair(o, self, values, indices, relu, fill)


def run_gate(operands: Operands, main: Candidates, aux: Candidates | None) -> None:
    o, second = operands, aux or main
    grid = min(programs(o.x.device), o.tiles_m * o.tiles_n)
    gate[(grid,)](
        *o.pointers(), *o.vectors(), o.x if aux is None else aux.mask, *main.arguments(), *second.arguments(),
        o.n, o.m, o.d, *o.strides(), TMA=o.tma, **o.flags(), SIDE=main.side, AUX=aux is not None, CAP=main.sample.cap,
        AUX_CAP=second.sample.cap, GROUP=o.tiles.group, PARTS=o.tiles.parts, **o.launch(),
    )  # fmt: skip


def select_fused(
    operands: Operands, k: int, sample: Sample, out: tuple[Tensor, Tensor], relu: bool,
    aux: tuple[int, Sample, Tensor, Tensor, tuple[Tensor, Tensor]] | None = None,
) -> None:  # fmt: skip
    """The whole of it. `aux`: (k_aux, its sample, mask as bytes, latents to fill up with, (values, indices))."""
    main = Candidates(operands, k, sample)
    second = None if aux is None else Candidates(operands, aux[0], aux[1], aux[2])
    scores = operands.sampled(sample.size)
    main.bounds(scores)
    if second is not None:
        second.bounds(scores)
    del scores
    run_gate(operands, main, second)
    main.certify()
    main.finish(*out, relu, None)
    if second is not None:
        second.certify()
        second.finish(*aux[4], relu, aux[3])
