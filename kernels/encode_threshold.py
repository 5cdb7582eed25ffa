# SPDX-License-Identifier: Apache-2.0
"""`encode_threshold`: one pass over the products, then what it found goes where it belongs (`encode_ragged`)."""

from __future__ import annotations

import torch
from torch import Tensor

from .common import INTERPRETED, cdiv, next_power_of_2
from .encode_ragged import gate_ragged, scan_ragged, write_ragged
from .encode_tile import Operands, programs

SPLITS = 8
_ENTRY_BYTES = 128 << 20


def buffer_size(n: int, limit: int = _ENTRY_BYTES) -> int:
    """Entries that a row can leave in each range of columns, of 8 bytes: 16 to 128."""
    return max(16, min(128, next_power_of_2(limit // (8 * SPLITS * max(n, 1)) + 1) // 2))


def select_threshold(
    o: Operands, threshold: Tensor, bandwidth: float, capacity: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """values, indices, offsets, states, l0 as the raw op gives them."""
    n, device, window, half = o.n, o.x.device, bandwidth > 0, bandwidth / 2
    threshold, cap = threshold.contiguous(), buffer_size(n)
    count = torch.zeros(n, SPLITS, dtype=torch.int32, device=device)
    above = torch.zeros(n if window else 1, dtype=torch.int32, device=device)
    entries = torch.empty(n * SPLITS * cap, dtype=torch.int64, device=device)
    t, grid = o.tiles, programs(device)
    if n:
        gate_ragged[(min(grid, o.tiles_m * o.tiles_n),)](
            *o.pointers(), *o.vectors(), threshold, count, above, entries, n, o.m, o.d, half, *o.strides(), TMA=o.tma,
            **o.flags(), WINDOW=window, SPLITS=SPLITS, CAP=cap, GROUP=t.group, PARTS=t.parts, **o.launch(),
        )  # fmt: skip
    offsets, place = places(count)
    size = int(offsets[-1]) if capacity is None else capacity  # the only word that the host hears of the device
    values = torch.zeros(size, dtype=o.x.dtype, device=device)
    indices = torch.zeros(size, dtype=torch.int32, device=device)
    state = torch.zeros(size if window else 0, dtype=torch.uint8, device=device)
    if n and size:
        units = max(1, (2**16 if INTERPRETED else 512) // cap)
        write_ragged[(cdiv(n * SPLITS, units),)](
            entries, count, place, threshold, values, indices, state if window else indices, n * SPLITS, size, half,
            WINDOW=window, CAP=cap, UNITS=units, CHUNK=8 if INTERPRETED else 4, num_warps=4,
        )  # fmt: skip
        scan_ragged[(grid,)](
            count, o.x, o.W, *o.vectors(), threshold, count, count, count, count, place, values, indices,
            state if window else indices, count, n, o.m, o.d, size, half, *o.strides(), BATCH=False, RELU=False,
            WRITE=True, WINDOW=window, **o.flags(), SPLITS=SPLITS, CAP=cap, **o.launch(),
        )  # fmt: skip
    return values, indices, offsets, state, above.float() if window else above.new_empty(0, dtype=torch.float32)


def places(count: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets ``[n + 1]`` of rows and the first places ``[n, SPLITS]`` of their ranges, int64, of counts."""
    ends = count.flatten().cumsum(0, dtype=torch.int64)
    place = ends - count.flatten()
    offsets = torch.zeros(len(count) + 1, dtype=torch.int64, device=count.device)
    offsets[1:] = ends.view(count.shape)[:, -1]
    return offsets, place
