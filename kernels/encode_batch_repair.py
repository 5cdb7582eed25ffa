# SPDX-License-Identifier: Apache-2.0
"""`encode_batch_topk` for a batch that its candidates could not certify: the pivot bit by bit, then what is above it.

The n·k-th largest score is found by its bits, 8, 8 and 16 at a time: three passes over the products count the scores
that begin as the pivot does. A fourth counts, by row and range of columns, those that equal it: rows take them in order
until n·k are reached. Two more count and write. So it is exact for any input, in no more memory than the counts; and it
takes six passes. Whether they are needed is known to the device alone: where not, each kernel ends at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .encode_ragged import count_scores, scan_ragged
from .encode_threshold import SPLITS, places
from .encode_tile import Operands, capability, programs

_DIGITS = ((24, 8), (16, 8), (0, 16))  # (shift, bits); above 8 each score that begins so is counted by itself


def find_pivot(o: Operands, wanted: int, needed: Tensor) -> tuple[Tensor, Tensor]:
    """The ordered score of the `wanted`-th largest entry, and how many entries equal to it are among them."""
    device = o.x.device
    prefix = torch.zeros(1, dtype=torch.int32, device=device)
    left = torch.full((1,), wanted, dtype=torch.int64, device=device)
    for shift, bits in _DIGITS:
        bins = torch.zeros(1 << bits, dtype=torch.int64, device=device)
        _count(o, needed, prefix, bins, bins, SHIFT=shift, BITS=bits, EQUAL=False)
        from_above = bins.flip(0).cumsum(0)
        at = (from_above < left).sum().view(1)
        before = torch.where(at > 0, from_above.gather(0, (at - 1).clamp(min=0)), 0)
        left = left - before
        digit = (1 << bits) - 1 - at
        prefix = (prefix.long() & 0xFFFFFFFF | digit << shift).to(torch.int32)  # wraps to the same bits
    return prefix ^ -(2**31), left


def _count(
    o: Operands, needed: Tensor, prefix: Tensor, bins: Tensor, equal: Tensor, *, BITS: int, **constants: object
) -> None:
    # Triton 3.7 compiles no histogram of a tile that lies in the tensor memory of capability 10.
    blocks = BITS <= 8 and (capability(o.x.device) or (0, 0))[0] not in (10, 11)
    count_scores[(min(programs(o.x.device), o.tiles_m * o.tiles_n),)](
        needed, o.x, o.W, *o.vectors(), prefix, bins, equal, o.n, o.m, o.d, *o.strides(), **constants, BITS=BITS,
        BLOCKS=blocks, SPLITS=SPLITS, **o.flags(), GROUP=o.tiles.group, PARTS=o.tiles.parts, **o.launch(),
    )  # fmt: skip


def repair_batch(o: Operands, k: int, relu: bool, needed: Tensor, values: Tensor, indices: Tensor,
                 smallest: Tensor) -> Tensor:  # fmt: skip
    """Fill values and indices ``[n·k]`` (zeros so far) and lower `smallest`, if `needed` (int32 ``[1]``) holds 1.

    Returns the offsets ``[n + 1]``; they mean nothing where `needed` holds 0.
    """
    n, device, size = o.n, o.x.device, o.n * k
    pivot, ties = find_pivot(o, size, needed)
    equal = torch.zeros(n, SPLITS, dtype=torch.int32, device=device)
    _count(o, needed, pivot, equal, equal, SHIFT=0, BITS=1, EQUAL=True)
    per_row = equal.sum(1)
    before = per_row.cumsum(0) - per_row
    quota = torch.minimum((ties - before).clamp(min=0), per_row).to(torch.int32)
    equal = (equal.cumsum(1) - equal).to(torch.int32)  # in the ranges before
    count = torch.zeros(n, SPLITS, dtype=torch.int32, device=device)

    def scan(place: Tensor, write: bool) -> None:
        scan_ragged[(programs(device),)](
            needed, o.x, o.W, *o.vectors(), values, pivot, equal, quota, count, place, values, indices, indices,
            smallest.view(torch.int32), n, o.m, o.d, size, 0.0, *o.strides(), BATCH=True, RELU=relu, WRITE=write,
            WINDOW=False, **o.flags(), SPLITS=SPLITS, CAP=16, **o.launch(),
        )  # fmt: skip

    scan(count, False)
    offsets, place = places(count)
    scan(place, True)
    return offsets
