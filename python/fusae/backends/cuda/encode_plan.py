# SPDX-License-Identifier: Apache-2.0
"""How an encoder runs, as plain functions of shapes: the sample, buffers, pools, rows at a time.

The sample. A row's k largest are looked for above a bound, the r-th largest score of s sampled latents. Too few lie
above it only if r or more of the k - 1 best were sampled; more than `cap` only if fewer than r of the `cap` best were.
Both are binomial tails at the rate s / m (hypergeometric ones are lighter) where neighbouring latents have nothing to
do with each other. They decide speed alone: every row is certified afterwards, and one that fails is repaired.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

UNDER, OVER = 1e-9, 1e-7
LARGEST_CAP = 4096
SMALLEST_M = 8192
"""Below that many latents a sample saves nothing: the repair's running bound is as good."""
RUN = 16
"""Sampled latents that are neighbours."""
ROWS = 128
"""Rows of a tile of the repair, and latents."""
MERGED = 4096
"""Entries that the merge of a repair holds in shared memory."""
REPAIR_BYTES = 1 << 30
"""Bytes of the repair's buffers at most; more rows are encoded in several calls."""


class Sample(NamedTuple):
    size: int
    rank: int
    cap: int


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def tail(trials: int, p: float, successes: int) -> float:
    """P(at least `successes`) of a binomial."""
    if successes <= 0:
        return 1.0
    if successes > trials or p <= 0:
        return 0.0
    if p >= 1:
        return 1.0
    log_p, log_q, total = math.log(p), math.log1p(-p), 0.0
    for i in range(successes, trials + 1):
        term = math.exp(math.lgamma(trials + 1) - math.lgamma(i + 1) - math.lgamma(trials - i + 1)
                        + i * log_p + (trials - i) * log_q)  # fmt: skip
        total += term
        if term < total * 1e-12 and i > trials * p:
            break
    return min(1.0, total)


def sample_size(m: int) -> int:
    """One latent in 32 (3 % of the products, computed twice), 16384 at most; a power of two."""
    return max(RUN, min(16_384, next_power_of_2(m // 32 + 1) // 2))


@functools.lru_cache(maxsize=4096)
def sample(m: int, k: int) -> Sample | None:
    """The sample for the k largest of m, or None where there is no good one."""
    size = sample_size(m)
    if m < SMALLEST_M or size > m // 2:
        return None
    p = size / m
    rank = max(1, int(k * p))
    while tail(k - 1, p, rank) >= UNDER:
        rank += 1
    if rank > size // 2:
        return None
    cap = max(next_power_of_2(k), next_power_of_2(int(1.5 * rank / p)), 128)
    while cap <= LARGEST_CAP and 1 - tail(cap, p, rank) > OVER and cap < m:
        cap *= 2
    return Sample(size, rank, cap) if cap <= LARGEST_CAP else None


class Repair(NamedTuple):
    """Buffers ``[units, ROWS, cap]``; a block of ROWS rows is cut into `splits` ranges of columns at most."""

    units: int
    cap: int
    splits: int


def repair(n: int, m: int, k: int, processors: int) -> Repair:
    """Units for n rows, each in a block, and for some more ranges where blocks are few."""
    blocks = -(-n // ROWS)
    splits = max(1, min(MERGED // next_power_of_2(k), -(-m // ROWS), 32)) if k <= 1024 else 1
    units = max(blocks, min(splits * blocks, 2 * processors))
    return Repair(units, next_power_of_2(max(k + ROWS, 2 * k if k > ROWS else 0)), splits)


def rows_at_a_time(n: int, m: int, k: int, processors: int) -> int:
    """Rows whose repair has room in REPAIR_BYTES: all, unless k is very large."""
    cap = repair(1, m, k, processors).cap
    return max(ROWS, min(n, REPAIR_BYTES // (8 * cap) // ROWS * ROWS))


def pool_size(n: int, capacity: int | None, m: int) -> int:
    """Entries of a threshold's pool: 256 a row, or what fits `capacity` and a row that begins before it."""
    return n * min(m, 256) if capacity is None else min(n * m, capacity + m)


def batch_sample(n: int, m: int, k: int) -> tuple[int, int, int]:
    """Sampled latents (0: none), the rank of the sampled score that bounds the batch, and the entries of the pool.

    Rows resemble each other, so the number of sampled entries among the n·k best varies more than a binomial's: twelve
    standard deviations of one, and the pool has room for as many again.
    """
    size = sample_size(m)
    wanted = n * k
    if m < SMALLEST_M or size > m // 2:
        return 0, 0, wanted + m
    p = size / m
    rank = int(wanted * p + 12 * math.sqrt(wanted * p) + 12)
    if rank > n * size // 2:
        return 0, 0, wanted + m
    return size, rank, max(wanted + m, int(2 * rank / p))
