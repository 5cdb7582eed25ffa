# SPDX-License-Identifier: Apache-2.0
"""How an encoder runs, as plain functions of shapes, dtype and device: tiles, the sample, fused or chunked.

The sample. A row's k largest are looked for above a bound, the r-th largest score of s sampled latents. Too few lie
above it only if r or more of the k - 1 best were sampled; more than `cap` only if fewer than r of the `cap` best were.
Both are binomial tails at the rate s / m (hypergeometric ones are lighter), so they hold for every distribution of
scores. They decide speed alone: every row is certified afterwards, and one that fails is repaired.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from .common import next_power_of_2

UNDER, OVER = 1e-9, 3e-6
"""Of a row: too few candidates, or more than fit. At 8192 rows, one batch in 40 has a row to repair, for a millisecond
or so; twice the buffer for every row would cost more."""
LARGEST_CAP = 8192
"""For up to 3,000 of 131,072 latents, or 1,500 of a million (AuxK)."""
CANDIDATE_BYTES = 512 << 20
LARGEST_BATCH_CAP = 1 << 30
"""Places in the buffer of a batch, which int32 counts."""
SMALLEST_M = 8192
"""Below that many latents the sample and the fixed work of a launch cost more than writing ``[n, m]`` in pieces."""


class Tiles(NamedTuple):
    """Block sizes of the GEMM. They never depend on n, m or k: a product has the same bits whatever else is asked."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    group: int = 8
    parts: int = 4


class Sample(NamedTuple):
    size: int
    rank: int
    cap: int


class BatchSample(NamedTuple):
    """Of a whole batch: latents sampled for every row, rank of the bound among all of them (0: everything passes), and
    candidates that the buffer holds (0: no buffer is large enough)."""

    size: int
    rank: int
    cap: int


def default_tiles(dtype: torch.dtype, d: int, capability: tuple[int, int] | None) -> Tiles:
    """Tiles for a compute capability; None is the interpreter, which wants few and small ones."""
    if capability is None:
        return Tiles(64, 512, 128, 4, 1, parts=2)
    if dtype == torch.float32:
        return Tiles(64, 128, 32, 8, 3)
    if capability[0] == 9:
        return Tiles(128, 256, 64, 8, 3, parts=8)
    if capability[0] in (10, 11):
        return Tiles(128, 128, 64, 8, 4)
    # Also 8.6, 8.9 and 12: 64 KB of the 99 that a block has there.
    return Tiles(128, 128, 32, 8, 4)


def _tail(trials: int, p: float, successes: int) -> float:
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
    """One latent in 32 (3 % of the products, computed twice), 16384 at most."""
    share = m // 32 if m >= 4096 else m // 4
    return max(16, min(16_384, (1 << share.bit_length()) // 2))


@functools.lru_cache(maxsize=4096)
def sample(m: int, k: int, width: int) -> Sample | None:
    """The sample for the k largest of m, or None where there is no good one. `width`: columns of a tile (BN)."""
    size = sample_size(m)
    if size > m:
        return None
    p = size / m
    rank = max(1, int(k * p))
    while _tail(k - 1, p, rank) >= UNDER:
        rank += 1
    if rank > size // 2:
        return None
    least = next_power_of_2(k + width)  # a repaired row's buffer: its k best and a tile of columns
    cap = max(least, next_power_of_2(int(1.5 * rank / p)))
    while cap <= LARGEST_CAP and 1 - _tail(cap, p, rank) > OVER and cap < m:
        cap *= 2
    return Sample(size, rank, cap) if cap <= LARGEST_CAP else None


def batch_sample(n: int, m: int, k: int) -> BatchSample:
    """The sample for the n·k largest of a batch: 2²⁴ scores at most.

    As long as entries of a latent come by chance, the best are sampled as by a binomial law; where few latents make
    many of them, they come by tiles of rows. So there is a quarter more than the law asks for, below and above.
    """
    size = min(sample_size(m), max(16, 1 << ((1 << 24) // n).bit_length() - 1))
    p = size / m
    mean = n * k * p
    rank = int(1.25 * mean + 7 * math.sqrt(mean) + 8)
    cap = int((1.5 * rank + 6 * math.sqrt(rank) + 8) / p)
    if size > m or rank >= n * size or cap >= n * m:
        size, rank, cap = 0, 0, n * m
    return BatchSample(size, rank, cap if cap < LARGEST_BATCH_CAP else 0)


def fused(n: int, m: int, k: int, k_aux: int, select: str, width: int, forced: str = "auto") -> bool:
    """Whether the sampled single pass is the way, and not pieces of ``[n, m]``."""
    if forced == "chunked" or select == "group_max" or n == 0:
        return False
    if sample(m, k, width) is None or (k_aux and sample(m, k_aux, width) is None):
        return False
    return forced == "fused" or m >= SMALLEST_M


def row_pieces(n: int, samples: list[Sample], side: bool, limit: int = CANDIDATE_BYTES) -> list[slice]:
    """Rows whose candidates and sampled scores take `limit` bytes or so: 1024 of them, or a multiple."""
    row = max(4 * s.size for s in samples) + sum(s.cap * (12 if side else 8) for s in samples)
    rows = max(1024, limit // row // 1024 * 1024)
    return [slice(i, min(i + rows, n)) for i in range(0, n, rows)]


def chunk(n: int, m: int, multiple: int = 1, limit: int = 256 << 20) -> tuple[int, int]:
    """(rows, columns) of a piece of float32 scores of at most `limit` bytes or so; columns a multiple of `multiple`.

    And of 64, unless there is another multiple: rows that begin at odd addresses are slow to write and to read.
    """
    multiple = 64 if multiple == 1 else multiple
    columns = min(m, max(multiple, 32_768 // multiple * multiple))
    rows = max(1, min(n, limit // (4 * columns)))
    if rows == n:
        columns = min(m, max(multiple, limit // (4 * max(n, 1)) // multiple * multiple))
    return rows, columns


def repair_splits(units: int, failed_blocks: int, most: int) -> int:
    """Into how many ranges of columns the repair of each block of failed rows is split (the kernel does the same)."""
    return max(1, min(units // max(failed_blocks, 1), most))
