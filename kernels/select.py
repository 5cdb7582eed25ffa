# SPDX-License-Identifier: Apache-2.0
"""Exact selection among unique 64-bit keys: of blocks in registers, of rows that stream by, and its sorted output.

A selection is found by bisecting the range of keys until exactly k lie above: no sort, no histogram, no tie to break,
since keys are unique (`common.pack`). It takes about 20 counts of a block for ordinary data and never more than 64.
A program has ROWS rows: one of a wide matrix, several of a narrow one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import LOWEST, halfway, key_index, key_value, pack


@triton.jit
def kth_key(keys, k):
    """For every row of the block, a bound with exactly k keys at or above it, or with all that are above LOWEST."""
    high = tl.max(keys, 1)
    low = tl.min(tl.where(keys == LOWEST, 0x7FFFFFFFFFFFFFFF, keys), 1)
    low = tl.maximum(tl.minimum(low, high), LOWEST + 1)
    high = tl.maximum(low, high)
    found = tl.sum((keys >= low[:, None]).to(tl.int32), 1)
    wanted = tl.minimum(found, k)
    while tl.max(found - wanted, 0) > 0:  # at or above low: too many; above high: too few
        middle = halfway(low, high)
        middle = tl.where(middle == low, high, middle)  # low and high are neighbours
        count = tl.sum((keys >= middle[:, None]).to(tl.int32), 1)
        enough = count >= wanted
        low = tl.where(enough, middle, low)
        found = tl.where(enough, count, found)
        high = tl.where(enough, high, middle)
    return low


@triton.jit
def compact(
    keys_ptr, side_ptr, rows, in_rows, count, k, SIDE: tl.constexpr, CAP: tl.constexpr, RAW: tl.constexpr = False,
):  # fmt: skip
    """Cut the first `count` entries of the rows' buffers back to their k best, in place. Returns the bounds.

    RAW: entries come as `raw_entry` and stay as keys.
    """
    slots = tl.arange(0, CAP)
    used = in_rows[:, None] & (slots[None, :] < count[:, None])
    at = rows[:, None] * CAP + slots[None, :]
    tl.debug_barrier()  # what other threads of the program have stored
    keys = tl.load(keys_ptr + at, mask=used, other=LOWEST)
    if RAW:
        keys = tl.where(used, pack(keys.to(tl.int32).to(tl.float32, bitcast=True), (keys >> 32).to(tl.int32)), LOWEST)
    bound = kth_key(keys, k)
    kept = used & (keys >= bound[:, None])
    to = rows[:, None] * CAP + tl.cumsum(kept.to(tl.int32), 1) - 1
    if SIDE:
        side = tl.load(side_ptr + at, mask=used, other=0.0)
        tl.debug_barrier()
        tl.store(side_ptr + to, side, mask=kept)
    else:
        tl.debug_barrier()
    tl.store(keys_ptr + to, keys, mask=kept)
    tl.debug_barrier()
    return bound


@triton.jit
def load_scores(
    pre_ptr, rows, in_rows, stride_n, stride_m, at, m, b_ptr, norms_ptr, mask_ptr, first,
    BIAS: tl.constexpr, NORMS: tl.constexpr, MASK: tl.constexpr, MAGNITUDE: tl.constexpr,
):  # fmt: skip
    """Pre-activations and keys of the columns `at` of a matrix; LOWEST outside of it, and of its mask."""
    columns = at < m
    valid = in_rows[:, None] & columns[None, :]
    address = pre_ptr + rows[:, None] * stride_n + at.to(tl.int64)[None, :] * stride_m
    pre = tl.load(address, mask=valid, other=0.0).to(tl.float32)
    if BIAS:
        pre += tl.load(b_ptr + at, mask=columns, other=0.0).to(tl.float32)[None, :]
    score = pre
    if MAGNITUDE:
        score = tl.abs(score)
    if NORMS:
        score = score * tl.load(norms_ptr + at, mask=columns, other=0.0)[None, :]
    if MASK:
        valid = valid & (tl.load(mask_ptr + at, mask=columns, other=0) != 0)[None, :]
    return pre, tl.where(valid, pack(score, (first + at)[None, :]), LOWEST)


@triton.jit(do_not_specialize=["n", "first", "k"])
def scan_rows(
    pre_ptr, stride_n, stride_m, n, m, b_ptr, norms_ptr, mask_ptr, first, keys_ptr, side_ptr, count_ptr, bound_ptr, k,
    FRESH: tl.constexpr, BIAS: tl.constexpr, NORMS: tl.constexpr, MASK: tl.constexpr, MAGNITUDE: tl.constexpr,
    SIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """The m columns of `pre` stream by once and leave every row's k best so far in its buffer.

    Column j is latent ``first + j``. Buffers: keys (and pre-activations, with SIDE) ``[n, CAP]``, CAP >= 2k, entries in
    use ``count [n]``, and a bound that k entries have already reached: only what is above it is looked at again.
    Without FRESH they hold the state after earlier columns.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < n
    count = tl.zeros((ROWS,), tl.int32)
    bound = tl.full((ROWS,), LOWEST + 1, tl.int64)
    if not FRESH:
        count = tl.load(count_ptr + rows, mask=in_rows, other=0)
        bound = tl.load(bound_ptr + rows, mask=in_rows, other=LOWEST + 1)
    for start in range(0, m, BLOCK):
        pre, keys = load_scores(
            pre_ptr, rows, in_rows, stride_n, stride_m, start + tl.arange(0, BLOCK), m, b_ptr, norms_ptr, mask_ptr,
            first, BIAS, NORMS, MASK, MAGNITUDE,
        )  # fmt: skip
        found = tl.sum((keys >= bound[:, None]).to(tl.int32), 1)
        if tl.max(found, 0) > 0:
            if tl.max(found, 0) > k:  # cut the block before it is stored
                bound = tl.maximum(bound, kth_key(tl.where(keys >= bound[:, None], keys, LOWEST), k))
                found = tl.sum((keys >= bound[:, None]).to(tl.int32), 1)
            if tl.max(count + found, 0) > CAP:
                bound = tl.maximum(bound, compact(keys_ptr, side_ptr, rows, in_rows, count, k, SIDE, CAP))
                count = tl.minimum(count, k)
                found = tl.sum((keys >= bound[:, None]).to(tl.int32), 1)
            hit = keys >= bound[:, None]
            to = rows[:, None] * CAP + count[:, None] + tl.cumsum(hit.to(tl.int32), 1) - 1
            tl.store(keys_ptr + to, keys, mask=hit)
            if SIDE:
                tl.store(side_ptr + to, pre, mask=hit)
            count += found
    if tl.max(count, 0) > k:
        bound = tl.maximum(bound, compact(keys_ptr, side_ptr, rows, in_rows, count, k, SIDE, CAP))
        count = tl.minimum(count, k)
    tl.store(count_ptr + rows, count, mask=in_rows)
    tl.store(bound_ptr + rows, bound, mask=in_rows)


@triton.jit(do_not_specialize=["n"])
def make_keys(
    pre_ptr, stride_n, stride_m, n, m, b_ptr, norms_ptr, mask_ptr, keys_ptr, side_ptr,
    BIAS: tl.constexpr, NORMS: tl.constexpr, MASK: tl.constexpr, MAGNITUDE: tl.constexpr, SIDE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The keys ``[n, m]`` of `pre` (and its values in float32, with SIDE), for a k that no block in registers holds."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pre, keys = load_scores(
        pre_ptr, rows, rows < n, stride_n, stride_m, at, m, b_ptr, norms_ptr, mask_ptr, 0, BIAS, NORMS, MASK, MAGNITUDE,
    )  # fmt: skip
    to = rows[:, None] * m + at[None, :]
    valid = (rows < n)[:, None] & (at < m)[None, :]
    tl.store(keys_ptr + to, keys, mask=valid)
    if SIDE:
        tl.store(side_ptr + to, pre, mask=valid)


@triton.jit
def store_sorted(
    keys_ptr, side_ptr, base, rows, in_rows, used, first, fill_ptr, values_ptr, indices_ptr, k,
    SIDE: tl.constexpr, FILL: tl.constexpr, RELU: tl.constexpr, SORTED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The first `used` (<= k) entries of buffers that begin at `base`, sorted, as codes of `rows`: `emit_rows`."""
    slots = first + tl.arange(0, BLOCK)
    valid = in_rows[:, None] & (slots[None, :] < used[:, None])
    at = base[:, None] + slots[None, :]
    keys = tl.load(keys_ptr + at, mask=valid, other=LOWEST)
    place = tl.zeros((ROWS, BLOCK), tl.int32) + slots[None, :]
    if not SORTED:
        place = tl.zeros((ROWS, BLOCK), tl.int32)
        for start in range(0, k, CHUNK):
            others = start + tl.arange(0, CHUNK)
            other_valid = in_rows[:, None] & (others[None, :] < used[:, None])
            other = tl.load(keys_ptr + base[:, None] + others[None, :], mask=other_valid, other=LOWEST)
            place += tl.sum((other[:, None, :] > keys[:, :, None]).to(tl.int32), 2)
    if SIDE:
        value = tl.load(side_ptr + at, mask=valid, other=0.0)
    else:
        value = key_value(keys)
    if RELU:
        value = tl.where(value <= 0.0, 0.0, value)  # NaN stays
    to = rows[:, None] * k + place
    tl.store(values_ptr + to, value.to(values_ptr.dtype.element_ty), mask=valid)
    tl.store(indices_ptr + to, key_index(keys), mask=valid)
    if FILL:
        to = rows[:, None] * k + slots[None, :]
        rest = in_rows[:, None] & (slots[None, :] >= used[:, None]) & (slots[None, :] < k)
        latents = tl.load(fill_ptr + slots[None, :] - used[:, None], mask=rest, other=0)
        tl.store(values_ptr + to, tl.zeros((ROWS, BLOCK), values_ptr.dtype.element_ty), mask=rest)
        tl.store(indices_ptr + to, latents, mask=rest)


@triton.jit(do_not_specialize=["n", "k"])
def emit_rows(
    keys_ptr, side_ptr, stride, count_ptr, fill_ptr, values_ptr, indices_ptr, n, k,
    COUNT: tl.constexpr, SIDE: tl.constexpr, FILL: tl.constexpr, RELU: tl.constexpr, SORTED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Up to k entries of every row's buffer, sorted by counting those above each, as codes ``[n, k]``.

    Places behind the entries in use (FILL) get value 0 and the latents of `fill_ptr`, in order. With SORTED the buffer
    is sorted already and BLOCK entries are a part of it.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < n
    used = tl.full((ROWS,), 0, tl.int32) + k
    if COUNT:
        used = tl.minimum(tl.load(count_ptr + rows, mask=in_rows, other=0), k)
    store_sorted(keys_ptr, side_ptr, rows * stride, rows, in_rows, used, tl.program_id(1) * BLOCK, fill_ptr,
                 values_ptr, indices_ptr, k, SIDE, FILL, RELU, SORTED, ROWS, BLOCK, CHUNK)  # fmt: skip
