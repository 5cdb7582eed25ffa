# SPDX-License-Identifier: Apache-2.0
"""Selections of given pre-activations."""

from __future__ import annotations

import torch
from torch import Tensor

from .native import DTYPES, module, ptr, stream, table


def topk_fwd(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    n, m = pre.shape
    if pre.stride(1) != 1:
        pre = pre.contiguous()
    values = pre.new_empty(n, k)
    indices = torch.empty(n, k, dtype=torch.int32, device=pre.device)
    given = (ptr(pre), pre.stride(0), DTYPES[pre.dtype], n, m, k)
    if k <= module().MAX_TOPK:
        module().topk(*given, ptr(values), ptr(indices), 0, stream(pre))
        return values, indices
    # More than a block of threads can sort: the keys of the k largest, then torch's sort. No two keys are the same.
    keys = torch.empty(n, k, dtype=torch.int64, device=pre.device)
    module().topk(*given, 0, 0, ptr(keys), stream(pre))
    places = 0xFFFFFFFF - (keys.sort(dim=1, descending=True).values & 0xFFFFFFFF)
    return torch.gather(pre, 1, places, out=values), indices.copy_(places)


TABLE = table(topk_fwd)
