# SPDX-License-Identifier: Apache-2.0
"""Rows of `encode_topk` that their candidates could not certify, exactly and on the device's own account.

The list of rows and its length stay on the device. Blocks of BM listed rows and ranges of columns are the units of
work; the fewer blocks there are, the more ranges each is split into. A unit goes through its columns in order with the
GEMM's own tiles: what is above the row's bound is appended, and a buffer that may be full after the next tile is cut
back to its k best, which raises the bound. `repair_merge` joins the ranges. With an empty list both return at once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import INTERPRETED, LOWEST, next_power_of_2, pack
from .encode_tile import Operands, programs, tile_products, tile_scores
from .select import compact, kth_key, store_sorted
from .topk import scan_warps

_MERGED = 4096  # keys that a merge holds in registers
_CUT = 8192


@triton.jit
def splits_of(units, blocks, most):
    """As `encode_plan.repair_splits`."""
    return tl.maximum(1, tl.minimum(units // tl.maximum(blocks, 1), most))


@triton.jit(do_not_specialize=["n", "k", "units", "most"])
def repair_scan(
    x_ptr, w_ptr, b_ptr, norms_ptr, mask_ptr, failed_ptr, list_ptr, keys_ptr, side_ptr, count_ptr, bound_ptr,
    n, m, d, k, units, most, sxn, sxd, swm, swd,
    BIAS: tl.constexpr, NORMS: tl.constexpr, MAGNITUDE: tl.constexpr, SIDE: tl.constexpr, MASK: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    CAP: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    failed = tl.load(failed_ptr)
    blocks = tl.cdiv(failed, BM)
    splits = splits_of(units, blocks, most)
    tiles = tl.cdiv(tl.cdiv(m, BN), splits)
    for unit in range(tl.program_id(0), blocks * splits, tl.num_programs(0)):
        place = (unit // splits) * BM + tl.arange(0, BM)
        in_rows = place < failed
        rows = tl.load(list_ptr + place, mask=in_rows, other=0)
        own = (tl.zeros((BM,), tl.int64) + unit) * BM + tl.arange(0, BM)
        tl.store(count_ptr + own, tl.zeros((BM,), tl.int32))
        tl.store(bound_ptr + own, tl.full((BM,), LOWEST + 1, tl.int64))
        tl.debug_barrier()
        first = (unit % splits) * tiles * BN
        for start in range(first, tl.minimum(first + tiles * BN, m), BN):
            columns = start + tl.arange(0, BN)
            inside = tl.minimum(columns, m - 1)
            acc = tile_products(x_ptr, w_ptr, rows, inside, 0, 0, d, sxn, sxd, swm, swd, False, EVEN, PRECISION,
                                BM, BN, BK)  # fmt: skip
            pre, score = tile_scores(acc, inside, b_ptr, norms_ptr, BIAS, NORMS, MAGNITUDE)
            valid = in_rows[:, None] & (columns < m)[None, :]
            if MASK:
                valid = valid & (tl.load(mask_ptr + inside) != 0)[None, :]
            keys = pack(score, columns[None, :])
            hit = valid & (keys >= tl.load(bound_ptr + own)[:, None])
            slot = tl.atomic_add(count_ptr + own[:, None] + tl.zeros_like(columns)[None, :], 1, mask=hit, sem="relaxed")
            to = own[:, None] * CAP + slot
            tl.store(keys_ptr + to, keys, mask=hit)
            if SIDE:
                tl.store(side_ptr + to, pre, mask=hit)
            tl.debug_barrier()
            fullest = tl.max(tl.load(count_ptr + own, cache_modifier=".cg"), 0)
            if (fullest > CAP - BN) | ((start + BN >= first + tiles * BN) | (start + BN >= m)):
                for r in range(0, BM, CUT):
                    part = (tl.zeros((CUT,), tl.int64) + unit) * BM + r + tl.arange(0, CUT)
                    count = tl.load(count_ptr + part, cache_modifier=".cg")
                    bound = compact(keys_ptr, side_ptr, part, count > k, tl.where(count > k, count, 0), k, SIDE, CAP)
                    tl.store(bound_ptr + part, bound, mask=count > k)
                    tl.store(count_ptr + part, tl.minimum(count, k))
                tl.debug_barrier()


@triton.jit(do_not_specialize=["k", "units", "most"])
def repair_merge(
    failed_ptr, list_ptr, keys_ptr, side_ptr, count_ptr, fill_ptr, values_ptr, indices_ptr, k, units, most,
    SIDE: tl.constexpr, FILL: tl.constexpr, RELU: tl.constexpr, BM: tl.constexpr, CAP: tl.constexpr,
    SPLITS: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The k best of all ranges of a listed row, sorted, as its codes."""
    failed = tl.load(failed_ptr)
    splits = splits_of(units, tl.cdiv(failed, BM), most)
    for place in range(tl.program_id(0), failed, tl.num_programs(0)):
        row = tl.load(list_ptr + place + tl.arange(0, 1)).to(tl.int64)
        unit = (place // BM) * splits
        base = ((tl.zeros((1,), tl.int64) + unit) * BM + place % BM) * CAP  # the row's buffer in its first range
        split = tl.arange(0, SPLITS * K) // K
        slot = tl.arange(0, SPLITS * K) % K
        own = (unit + split.to(tl.int64)) * BM + place % BM
        used = tl.load(count_ptr + own, mask=split < splits, other=0)
        valid = (split < splits) & (slot < used)
        keys = tl.load(keys_ptr + own * CAP + slot, mask=valid, other=LOWEST)
        kept = valid & (keys >= tl.max(kth_key(keys[None, :], k), 0))
        to = base + tl.cumsum(kept.to(tl.int32), 0) - 1
        if SIDE:
            side = tl.load(side_ptr + own * CAP + slot, mask=valid, other=0.0)
            tl.debug_barrier()
            tl.store(side_ptr + to, side, mask=kept)
        else:
            tl.debug_barrier()
        tl.store(keys_ptr + to, keys, mask=kept)
        tl.debug_barrier()
        count = tl.sum(kept.to(tl.int32), 0)
        store_sorted(keys_ptr, side_ptr, base, row, row >= 0,
                     count + tl.zeros((1,), tl.int32), 0, fill_ptr, values_ptr, indices_ptr, k,
                     SIDE, FILL, RELU, False, 1, K, CHUNK)  # fmt: skip
        tl.debug_barrier()


def repair(
    o: Operands, c, values: Tensor, indices: Tensor, relu: bool, fill: Tensor | None
) -> None:
    """Redo the rows that `c` (`encode_topk.Candidates`) has listed. Its buffers are free: the other rows are out."""
    t, width = o.tiles, next_power_of_2(c.k + o.tiles.BN)
    units = c.keys.numel() // (t.BM * width)
    block = max(16, next_power_of_2(c.k))
    most = max(1, min(_MERGED // block, o.tiles_n, 32))
    # A count and a bound for every row of a unit; the bounds of the first pass are of no more use.
    count = c.keys.new_empty(units * t.BM, dtype=c.count.dtype)
    bound = c.keys.new_empty(units * t.BM)
    repair_scan[(programs(o.x.device),)](
        o.x, o.W, *o.vectors(), o.x if c.mask is None else c.mask, c.failed, c.list, c.keys, c.pre, count, bound,
        o.n, o.m, o.d, c.k, units, most, *o.strides(), **o.flags(), SIDE=c.side, MASK=c.mask is not None, CAP=width,
        CUT=t.BM if INTERPRETED else max(1, min(t.BM, _CUT // width)), **o.launch(),
    )  # fmt: skip
    splits = next_power_of_2(most)
    repair_merge[(min(o.n, 4 * programs(o.x.device)),)](
        c.failed, c.list, c.keys, c.pre, count, c.keys if fill is None else fill, values, indices, c.k, units, most,
        SIDE=c.side, FILL=fill is not None, RELU=relu, BM=t.BM, CAP=width, SPLITS=splits, K=block,
        CHUNK=16 if INTERPRETED else max(1, 4096 // block), num_warps=scan_warps(splits * block),
    )  # fmt: skip


