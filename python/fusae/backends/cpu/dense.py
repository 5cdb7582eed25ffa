# SPDX-License-Identifier: Apache-2.0
"""Dense activations to codes and back."""

from __future__ import annotations

import torch
from torch import Tensor

from .native import _C, DTYPES, offset, ptr


def codes_from_dense_fwd(f: Tensor, capacity: int | None) -> tuple[Tensor, Tensor, Tensor]:
    n, m = f.shape
    mask = torch.empty(n, -(-m // 64), dtype=torch.int64)
    offsets = torch.zeros(n + 1, dtype=torch.int64)
    dense, threads = (ptr(f), *f.stride(), DTYPES[f.dtype], n, m, ptr(mask)), torch.get_num_threads()
    _C.nonzero_mask(*dense, offset(offsets, 1), threads)
    torch.cumsum(offsets, 0, out=offsets)
    used = int(offsets[-1])
    storage = used if capacity is None else capacity
    values, indices = f.new_empty(storage), torch.empty(storage, dtype=torch.int32)
    _C.nonzero_take(*dense, ptr(offsets), storage, ptr(values), ptr(indices), threads)
    values[used:], indices[used:] = 0.0, 0
    return values, indices, offsets


def codes_from_dense_bwd(grad_values: Tensor, indices: Tensor, offsets: Tensor, m: int) -> Tensor:
    # No kernel: writing the zeros of [n, m] takes the time, the scatter next to none.
    n = offsets.shape[0] - 1
    used = int(offsets[-1])
    if used > len(grad_values):
        raise IndexError(f"offsets count {used} entries, the storage has {len(grad_values)}: a capacity was too small")
    place = torch.repeat_interleave(torch.arange(n) * m, offsets.diff(), output_size=used).add_(indices[:used])
    return grad_values.new_zeros(n * m).index_copy_(0, place, grad_values[:used]).view(n, m)
