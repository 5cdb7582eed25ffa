# SPDX-License-Identifier: Apache-2.0
"""Ragged encoders: what passes the threshold of its latent, and the best of the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import encode_plan as plan
from .encode import Operands, select
from .native import module, ptr, stream, table


class Pool:
    """Scratch for `size` entries of n rows."""

    def __init__(self, o: Operands, size: int) -> None:
        self.size = size = max(size, 1)
        self.found = o.empty(size * module().FOUND_BYTES, dtype=torch.uint8)
        self.entries = o.empty(size, dtype=torch.int64)
        self.total = o.empty(1, dtype=torch.int64)
        self.count = o.empty(o.n, dtype=torch.int32)

    def fields(self) -> dict[str, Any]:
        return {"found": ptr(self.found), "cap": self.size, "total": ptr(self.total), "count": ptr(self.count),
                "entries": ptr(self.entries)}  # fmt: skip


def encode_threshold_fwd(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    threshold: Tensor,
    norms: Tensor | None,
    bandwidth: float,
    capacity: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    o, window, threshold = Operands(x, W_enc, b_enc, norms), bandwidth > 0, threshold.contiguous()
    above = torch.zeros(o.n if window else 0, dtype=torch.int32, device=x.device)
    offsets = torch.zeros(o.n + 1, dtype=torch.int64, device=x.device)
    size, pool = capacity, Pool(o, plan.pool_size(o.n, capacity, o.m))

    def fields() -> dict[str, Any]:
        return {"in": o.fields(), "threshold": ptr(threshold), "half_window": bandwidth / 2, "pool": pool.fields(),
                "above": ptr(above)}  # fmt: skip

    if o.n:
        module().threshold_find(fields(), stream(x))
        torch.cumsum(pool.count, 0, out=offsets[1:])
    if size is None:
        size = int(offsets[-1])  # the only word that the host hears of the device
        if size > pool.size:  # now that it is known
            pool = Pool(o, size)
            above.zero_()
            module().threshold_find(fields(), stream(x))
    values = torch.zeros(size, dtype=x.dtype, device=x.device)
    indices = torch.zeros(size, dtype=torch.int32, device=x.device)
    state = torch.zeros(size if window else 0, dtype=torch.uint8, device=x.device)
    if o.n and size:
        again = o.empty(o.n + 1, dtype=torch.int32)
        args = {
            **fields(), "offsets": ptr(offsets), "again": ptr(again), "values": ptr(values), "indices": ptr(indices),
            "state": ptr(state) if window else 0, "capacity": size,
        }  # fmt: skip
        module().threshold_write(args, stream(x))
    return values, indices, offsets, state, above.float()


def encode_batch_topk_fwd(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    norms: Tensor | None,
    aux_mask: Tensor | None,
    k: int,
    k_aux: int,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    o, relu = Operands(x, W_enc, b_enc, norms), activation == "relu"
    aux = select(o, relu, 0, k_aux if aux_mask is not None else 0, aux_mask)[2:]
    values = torch.zeros(o.n * k, dtype=x.dtype, device=x.device)
    indices = torch.zeros(o.n * k, dtype=torch.int32, device=x.device)
    offsets = torch.zeros(o.n + 1, dtype=torch.int64, device=x.device)
    if o.n == 0:
        return values, indices, offsets, torch.full((), torch.inf, device=x.device), *aux
    size, rank, entries = plan.batch_sample(o.n, o.m, k)
    pool, scores = Pool(o, entries), o.empty(o.n, size, dtype=torch.float32)
    state, bins = o.empty(module().BATCH_STATE_BYTES, dtype=torch.uint8), o.empty(256, dtype=torch.int64)
    equal, place = o.empty(o.n, dtype=torch.int32), o.empty(o.n + 1, dtype=torch.int64)
    args = {
        "in": o.fields(), "k": k, "relu": relu, "sampled": size, "rank": rank, "scores": ptr(scores),
        "pool": pool.fields(), "state": ptr(state), "bins": ptr(bins), "equal": ptr(equal), "offsets": ptr(offsets),
        "place": ptr(place), "values": ptr(values), "indices": ptr(indices),
    }  # fmt: skip
    module().encode_batch_topk(args, stream(x))
    at = module().BATCH_SMALLEST_AT
    smallest = state[at : at + 4].view(torch.float32).clone().view(())
    return values, indices, offsets, smallest, *aux


TABLE = table(encode_threshold_fwd, encode_batch_topk_fwd)
