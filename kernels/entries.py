# SPDX-License-Identifier: Apache-2.0
"""The entries of codes as kernels see them, of fixed width or ragged, and the tiles in which their rows are gathered.

What every gather does about bad codes, without a host sync: entries beyond the storage are left out (offsets that count
more than fit are told wherever the host reads them), and a latent outside ``[0, m)`` reads no memory.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import INTERPRETED, cdiv, next_power_of_2

BLOCK = 1024
"""Entries of a program that handles each by itself."""


@dataclasses.dataclass(frozen=True)
class Codes:
    """Codes, contiguous, and their sizes. `values` may be any coefficients of the entries."""

    values: Tensor
    indices: Tensor
    offsets: Tensor | None
    m: int

    @classmethod
    def of(cls, values: Tensor, indices: Tensor, offsets: Tensor | None, m: int) -> Codes:
        return cls(values.contiguous(), indices.contiguous(), None if offsets is None else offsets.contiguous(), m)

    @property
    def n(self) -> int:
        return self.indices.shape[0] if self.offsets is None else self.offsets.shape[0] - 1

    @property
    def width(self) -> int:
        return 0 if self.offsets is not None else self.indices.shape[1]

    @property
    def storage(self) -> int:
        return self.indices.numel()


@dataclasses.dataclass(frozen=True)
class Tile:
    """Rows of codes (or latents) of a program, entries of each gathered at a time, columns, and warps."""

    rows: int
    entries: int
    columns: int
    warps: int

    @property
    def sizes(self) -> dict[str, int]:
        return {"N": self.rows, "E": self.entries, "D": self.columns, "num_warps": self.warps}


def gather_tile(d: int, item: int, entries: int = 8, rows: int = 1) -> Tile:
    """A tile whose threads each read 16 bytes of a row at a time, `rows` x `entries` such reads in flight.

    Pieces of rows are 1 KB, or 512 B where that would leave more than an eighth of the lanes idle. Pieces, and not
    whole rows, so that the columns in work at one time are few: programs of one block of columns run one after another
    (the grid's first axis is rows), and a block of all rows is much nearer to the size of the L2 cache than the rows.
    The tile never changes the order of a sum.
    """
    if INTERPRETED:  # few, large programs
        columns = min(128, max(16, next_power_of_2(d)))
        return Tile(2**17 // (entries * columns), entries, columns, 4)
    lanes = 512 // item  # of one warp
    if d < lanes:
        columns = max(16, next_power_of_2(d))
        return Tile(rows * max(1, lanes // columns), entries, columns, 1)
    warps = 2 if cdiv(d, 2 * lanes) * 2 * lanes <= d * 9 // 8 else 1
    return Tile(rows, entries, lanes * warps, warps)


@triton.jit
def row_entries(offsets, i, live, width, storage, RAGGED: tl.constexpr):
    """First entry and number of entries of the rows i; none where not `live`."""
    if RAGGED:
        first = tl.minimum(tl.load(offsets + i, mask=live, other=0), storage)
        last = tl.minimum(tl.load(offsets + i + 1, mask=live, other=0), storage)
    else:
        first = i * width
        last = tl.where(live, first + width, first)
    return first, tl.maximum(last - first, 0).to(tl.int32)


@triton.jit
def used_entries(offsets, n, width, storage, RAGGED: tl.constexpr):
    """How many entries of the storage are in use."""
    if RAGGED:
        return tl.minimum(tl.load(offsets + n), storage)
    else:
        return n.to(tl.int64) * width


@triton.jit
def row_of(offsets, e, n, width, RAGGED: tl.constexpr):
    """Row of the entries e, and their place in it."""
    if RAGGED:  # the first row whose end is behind e
        low = tl.zeros_like(e)
        high = low + n
        bits = n
        while bits > 0:
            middle = (low + high) // 2
            open = low < high
            behind = tl.load(offsets + middle + 1, mask=open, other=0) <= e
            low = tl.where(open & behind, middle + 1, low)
            high = tl.where(open & (behind == 0), middle, high)
            bits = bits // 2
        return low, e - tl.load(offsets + low, mask=low < n, other=0)
    else:
        row = e // width
        return row, e - row * width


@triton.jit
def group_of(prefixes, groups, latent, rank, BY_RANK: tl.constexpr):
    """The group of entries: how many prefixes, the last one left out, their latent or rank has passed."""
    key = rank if BY_RANK else latent
    group = tl.zeros_like(key).to(tl.int32)
    for g in range(0, groups - 1):
        group += (key >= tl.load(prefixes + g)).to(tl.int32)
    return group


@triton.jit
def gathered(source, row, stride, cols, d, mask):
    """``source[row, cols]`` as float32, 0 where not `mask` or beyond d. `row`: int64 ``[N, E]``."""
    at = source + row[:, :, None] * stride + cols[None, None, :]
    return tl.load(at, mask=mask[:, :, None] & (cols < d)[None, None, :], other=0.0).to(tl.float32)


def contiguous_rows(t: Tensor) -> Tensor:
    """`t` itself if the elements of each row lie side by side, else a copy."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 and t.is_contiguous() else t.contiguous()


def on_device(numbers: list, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A small tensor of numbers, made by kernels alone: no copy from the host that a CUDA graph could not keep."""
    return torch.stack([torch.full((), number, dtype=dtype, device=like.device) for number in numbers])
