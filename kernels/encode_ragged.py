# SPDX-License-Identifier: Apache-2.0
"""Tiles of pre-activations that become ragged codes, latents ascending in every row, wherever and in whatever order the
tiles ran.

The columns are cut into SPLITS ranges. `gate_ragged` is a persistent GEMM that counts the entries of every row and
range and keeps the first CAP of them in a buffer (slots by atomic additions, in any order). `write_ragged` sorts a
buffer by latent and writes it to its final place, which the counts tell. Where a buffer was too small, `scan_ragged`
computes the block of rows and the range again, tile by tile in order, and writes what the buffer could not hold.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import ordered
from .encode_tile import columns_apart, tile_place, tile_products, tile_scores


@triton.jit
def passes(pre, score, limit, half, WINDOW: tl.constexpr):
    """(stored, above): NaN is above every threshold; the window is open."""
    above = (score > limit) | (score != score) | (limit != limit)
    if WINDOW:
        return above | (tl.abs(pre - limit) < half), above
    return above, above


@triton.jit(do_not_specialize=["n"])
def gate_ragged(
    x_ptr, w_ptr, b_ptr, norms_ptr, limit_ptr, count_ptr, above_ptr, entry_ptr, n, m, d, half, sxn, sxd, swm, swd,
    TMA: tl.constexpr, BIAS: tl.constexpr, NORMS: tl.constexpr, MAGNITUDE: tl.constexpr, WINDOW: tl.constexpr,
    SPLITS: tl.constexpr, CAP: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Counts ``[n, SPLITS]`` and entries ``[n, SPLITS, CAP]``: the latent, below it the bits of the pre-activation."""
    tiles_m, tiles_n = tl.cdiv(n, BM), tl.cdiv(m, BN)
    per_split = tl.cdiv(tiles_n, SPLITS)
    WIDTH: tl.constexpr = BN // PARTS
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_place(tile, tiles_m, tiles_n, GROUP)
        rows = tile_m * BM + tl.arange(0, BM)
        in_rows = rows < n
        columns = tl.minimum(tile_n * BN + tl.arange(0, BN), m - 1)
        acc = tile_products(x_ptr, w_ptr, tl.minimum(rows, n - 1), columns, tile_m * BM, tile_n * BN, d,
                            sxn, sxd, swm, swd, TMA, EVEN, PRECISION, BM, BN, BK)  # fmt: skip
        own = rows.to(tl.int64) * SPLITS + tile_n // per_split
        parts = columns_apart(acc, BM, BN, PARTS)
        for part in tl.static_range(PARTS):
            at = tile_n * BN + part * WIDTH + tl.arange(0, WIDTH)
            inside = tl.minimum(at, m - 1)
            pre, score = tile_scores(parts[part], inside, b_ptr, norms_ptr, BIAS, NORMS, MAGNITUDE)
            stored, above = passes(pre, score, tl.load(limit_ptr + inside)[None, :], half, WINDOW)
            valid = in_rows[:, None] & (at < m)[None, :]
            hit = valid & stored
            slot = tl.atomic_add(count_ptr + own[:, None] + tl.zeros_like(at)[None, :], 1, mask=hit, sem="relaxed")
            bits = pre.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
            entry = (at.to(tl.int64) << 32)[None, :] | bits
            tl.store(entry_ptr + own[:, None] * CAP + slot, entry, mask=hit & (slot < CAP))
            if WINDOW:
                tl.atomic_add(above_ptr + rows, tl.sum((valid & above).to(tl.int32), 1), mask=in_rows, sem="relaxed")


@triton.jit(do_not_specialize=["total", "capacity"])
def write_ragged(
    entry_ptr, count_ptr, place_ptr, limit_ptr, values_ptr, indices_ptr, state_ptr, total, capacity, half,
    WINDOW: tl.constexpr, CAP: tl.constexpr, UNITS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The entries of ranges whose buffer holds all of them, in the order of their latents, from ``place`` on."""
    units = tl.program_id(0).to(tl.int64) * UNITS + tl.arange(0, UNITS)
    valid_unit = units < total
    count = tl.load(count_ptr + units, mask=valid_unit, other=0)
    count = tl.where(count <= CAP, count, 0)
    slots = tl.arange(0, CAP)
    used = valid_unit[:, None] & (slots[None, :] < count[:, None])
    entry = tl.load(entry_ptr + units[:, None] * CAP + slots[None, :], mask=used, other=0)
    rank = tl.zeros((UNITS, CAP), tl.int32)
    for start in range(0, tl.max(count, 0), CHUNK):
        others = start + tl.arange(0, CHUNK)
        other_used = valid_unit[:, None] & (others[None, :] < count[:, None])
        other = tl.load(entry_ptr + units[:, None] * CAP + others[None, :], mask=other_used, other=0x7FFFFFFFFFFFFFFF)
        rank += tl.sum((other[:, None, :] < entry[:, :, None]).to(tl.int32), 2)
    to = tl.load(place_ptr + units, mask=valid_unit, other=0)[:, None] + rank
    kept = used & (to < capacity)
    latent = (entry >> 32).to(tl.int32)
    pre = entry.to(tl.int32).to(tl.float32, bitcast=True)
    if WINDOW:
        limit = tl.load(limit_ptr + latent, mask=used, other=0.0)
        above = (pre > limit) | (pre != pre) | (limit != limit)
        near = tl.abs(pre - limit) < half
        tl.store(state_ptr + to, (above.to(tl.int32) + 2 * near.to(tl.int32)).to(tl.uint8), mask=kept)
        pre = tl.where(above, pre, 0.0)
    tl.store(values_ptr + to, pre.to(values_ptr.dtype.element_ty), mask=kept)
    tl.store(indices_ptr + to, latent, mask=kept)


@triton.jit(do_not_specialize=["n", "capacity"])
def scan_ragged(
    needed_ptr, x_ptr, w_ptr, b_ptr, norms_ptr, limit_ptr, pivot_ptr, equal_ptr, quota_ptr,
    count_ptr, place_ptr, values_ptr, indices_ptr, state_ptr, smallest_ptr, n, m, d, capacity, half, sxn, sxd, swm, swd,
    BATCH: tl.constexpr, RELU: tl.constexpr, WRITE: tl.constexpr, WINDOW: tl.constexpr,
    BIAS: tl.constexpr, NORMS: tl.constexpr, MAGNITUDE: tl.constexpr, SPLITS: tl.constexpr, CAP: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Blocks of rows and ranges of columns, each from its first tile to its last: entries in order.

    By thresholds: what `gate_ragged` counted and `write_ragged` left out. BATCH: what is above the pivot, and of what
    equals it the first ``quota[row]`` of a row, ``equal [n, SPLITS]`` of them in the ranges before; without WRITE it is
    counted only. Nothing at all if `needed_ptr` holds 0.
    """
    tiles_m, tiles_n = tl.cdiv(n, BM), tl.cdiv(m, BN)
    per_split = tl.cdiv(tiles_n, SPLITS)
    units = tiles_m * SPLITS
    if BATCH:
        units *= tl.load(needed_ptr)
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        split = unit // tiles_m
        rows = (unit % tiles_m) * BM + tl.arange(0, BM)
        in_rows = rows < n
        own = rows.to(tl.int64) * SPLITS + split
        wanted = in_rows
        if not BATCH:
            wanted = in_rows & (tl.load(count_ptr + own, mask=in_rows, other=0) > CAP)
        if tl.max(wanted.to(tl.int32), 0) > 0:
            ties = tl.zeros((BM,), tl.int32)
            quota = tl.zeros((BM,), tl.int32)
            to_row = tl.zeros((BM,), tl.int64)
            taken = tl.zeros((BM,), tl.int32)
            least = tl.zeros((BM,), tl.float32) + float("inf")
            pivot = 0
            if BATCH:
                pivot = tl.load(pivot_ptr)
                ties = tl.load(equal_ptr + own, mask=in_rows, other=0).to(tl.int32)
                quota = tl.load(quota_ptr + rows, mask=in_rows, other=0).to(tl.int32)
            if WRITE:
                to_row = tl.load(place_ptr + own, mask=in_rows, other=0)
            last = tl.minimum((split + 1) * per_split * BN, m)
            for start in range(split * per_split * BN, last, BN):
                columns = start + tl.arange(0, BN)
                inside = tl.minimum(columns, m - 1)
                acc = tile_products(x_ptr, w_ptr, tl.minimum(rows, n - 1), inside, 0, 0, d, sxn, sxd, swm, swd,
                                    False, EVEN, PRECISION, BM, BN, BK)  # fmt: skip
                pre, score = tile_scores(acc, inside, b_ptr, norms_ptr, BIAS, NORMS, MAGNITUDE)
                valid = wanted[:, None] & (columns < m)[None, :]
                if BATCH:
                    key = ordered(score)
                    equal = valid & (key == pivot)
                    rank = ties[:, None] + tl.cumsum(equal.to(tl.int32), 1)
                    ties += tl.sum(equal.to(tl.int32), 1)
                    hit = valid & ((key > pivot) | (equal & (rank <= quota[:, None])))
                    if RELU:
                        hit = hit & ((pre > 0.0) | (pre != pre))
                    positive = tl.where(hit & (score > 0.0), score, float("inf"))
                    least = tl.minimum(least, tl.min(positive, 1))
                    value = pre
                else:
                    limit = tl.load(limit_ptr + inside)[None, :]
                    hit, above = passes(pre, score, limit, half, WINDOW)
                    hit = hit & valid
                    value = tl.where(above, pre, 0.0)
                if WRITE:
                    to = to_row[:, None] + taken[:, None] + tl.cumsum(hit.to(tl.int32), 1) - 1
                    kept = hit & (to < capacity)
                    tl.store(values_ptr + to, value.to(values_ptr.dtype.element_ty), mask=kept)
                    latent = columns[None, :] + tl.zeros((BM, BN), tl.int32)
                    tl.store(indices_ptr + to, latent, mask=kept)
                    if WINDOW:
                        near = tl.abs(pre - limit) < half
                        state = above.to(tl.int32) + 2 * near.to(tl.int32)
                        tl.store(state_ptr + to, state.to(tl.uint8), mask=kept)
                taken += tl.sum(hit.to(tl.int32), 1)
            if BATCH:
                if WRITE:
                    # Positive floats are in the order of their bits.
                    tl.atomic_min(smallest_ptr, tl.min(least, 0).to(tl.int32, bitcast=True), sem="relaxed")
                else:
                    tl.store(count_ptr + own, taken, mask=in_rows)


@triton.jit(do_not_specialize=["n"])
def count_scores(
    needed_ptr, x_ptr, w_ptr, b_ptr, norms_ptr, prefix_ptr, bins_ptr, equal_ptr, n, m, d, sxn, sxd, swm, swd,
    SHIFT: tl.constexpr, BITS: tl.constexpr, EQUAL: tl.constexpr, BLOCKS: tl.constexpr, SPLITS: tl.constexpr,
    BIAS: tl.constexpr, NORMS: tl.constexpr, MAGNITUDE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """How many ordered scores of the batch begin with the bits of `prefix`, by their next BITS bits (those from SHIFT).

    EQUAL: how many equal it, by row and range of columns. BLOCKS: blocks of the tile are counted together (up to 8
    bits); else each score by itself, which is for the last bits, where few begin as the prefix does. `needed_ptr`: 1,
    or 0 for nothing to do.
    """
    tiles_m, tiles_n = tl.cdiv(n, BM), tl.cdiv(m, BN)
    per_split = tl.cdiv(tiles_n, SPLITS)
    WIDTH: tl.constexpr = BN // PARTS
    prefix = tl.load(prefix_ptr)
    for tile in range(tl.program_id(0), tiles_m * tiles_n * tl.load(needed_ptr), tl.num_programs(0)):
        tile_m, tile_n = tile_place(tile, tiles_m, tiles_n, GROUP)
        rows = tile_m * BM + tl.arange(0, BM)
        in_rows = rows < n
        columns = tl.minimum(tile_n * BN + tl.arange(0, BN), m - 1)
        acc = tile_products(x_ptr, w_ptr, tl.minimum(rows, n - 1), columns, 0, 0, d, sxn, sxd, swm, swd,
                            False, EVEN, PRECISION, BM, BN, BK)  # fmt: skip
        parts = columns_apart(acc, BM, BN, PARTS)
        for part in tl.static_range(PARTS):
            at = tile_n * BN + part * WIDTH + tl.arange(0, WIDTH)
            inside = tl.minimum(at, m - 1)
            pre, score = tile_scores(parts[part], inside, b_ptr, norms_ptr, BIAS, NORMS, MAGNITUDE)
            valid = in_rows[:, None] & (at < m)[None, :]
            key = ordered(score)
            if EQUAL:
                equal = tl.sum((valid & (key == prefix)).to(tl.int32), 1)
                to = rows.to(tl.int64) * SPLITS + tile_n // per_split
                tl.atomic_add(equal_ptr + to, equal, mask=in_rows & (equal > 0), sem="relaxed")
            else:
                key = key ^ (-2147483648)  # unsigned order in the bits
                if SHIFT + BITS < 32:
                    valid = valid & ((key >> (SHIFT + BITS)) == (prefix >> (SHIFT + BITS)))
                digit = (key >> SHIFT) & ((1 << BITS) - 1)
                if BLOCKS:
                    # What is not valid counts as 0 and is taken off: without a mask, no element changes its place.
                    digit = tl.reshape(tl.where(valid, digit, 0), (BM * WIDTH,), can_reorder=True)
                    bins = tl.arange(0, 1 << BITS)
                    found = tl.histogram(digit, 1 << BITS)
                    found -= tl.where(bins == 0, BM * WIDTH - tl.sum(tl.sum(valid.to(tl.int32), 1), 0), 0)
                    tl.atomic_add(bins_ptr + bins, found.to(tl.int64), mask=found > 0, sem="relaxed")
                else:
                    tl.atomic_add(bins_ptr + digit, tl.full((BM, WIDTH), 1, tl.int64), mask=valid, sem="relaxed")
