# SPDX-License-Identifier: Apache-2.0
"""Dense activations to codes and back; what a step at the thresholds gives the entries."""

from __future__ import annotations

import torch
from torch import Tensor

from .codes import Codes, fits
from .latents import ByLatent
from .native import DTYPES, module, ptr, stream, table


def codes_from_dense_fwd(f: Tensor, capacity: int | None) -> tuple[Tensor, Tensor, Tensor]:
    (n, m), device = f.shape, f.device
    mask = torch.empty(n, -(-m // 32), dtype=torch.int32, device=device)
    count = torch.empty(n, dtype=torch.int64, device=device)
    offsets = torch.zeros(n + 1, dtype=torch.int64, device=device)
    dense = (ptr(f), *f.stride(), DTYPES[f.dtype], n, m, ptr(mask))
    module().nonzero_mask(dense, ptr(count), stream(f))
    torch.cumsum(count, 0, out=offsets[1:])
    storage = int(offsets[-1]) if capacity is None else capacity
    values = torch.zeros(storage, dtype=f.dtype, device=device)
    indices = torch.zeros(storage, dtype=torch.int32, device=device)
    module().nonzero_take(dense, ptr(offsets), storage, ptr(values), ptr(indices), stream(f))
    return values, indices, offsets


def scatter(codes: Codes) -> Tensor:
    """``[n, m]`` with the values at the places of their entries (no two at one), 0 elsewhere."""
    out = torch.zeros(codes.n, codes.m, dtype=codes.values.dtype, device=codes.values.device)
    module().scatter(codes.tuple(), ptr(out), stream(out))
    return out


def codes_from_dense_bwd(grad_values: Tensor, indices: Tensor, offsets: Tensor, m: int) -> Tensor:
    fits(offsets, len(indices))
    return scatter(Codes.of(grad_values, indices, offsets, m))


def topk_bwd(grad_values: Tensor, indices: Tensor, m: int) -> Tensor:
    return scatter(Codes.of(grad_values, indices, None, m))


def encode_threshold_bwd(
    indices: Tensor,
    offsets: Tensor,
    state: Tensor,
    grad_values: Tensor | None,
    grad_l0: Tensor | None,
    threshold: Tensor,
    bandwidth: float,
    straight_through: bool,
    need_threshold: bool,
) -> tuple[Tensor, Tensor]:
    fits(offsets, len(indices))
    m, device = threshold.shape[0], threshold.device
    grad_pre, jumps = (torch.zeros(len(indices), dtype=torch.float32, device=device) for _ in range(2))
    codes = Codes.of(grad_pre if grad_values is None else grad_values, indices, offsets, m)
    state, threshold = state.contiguous(), threshold.contiguous()
    grad_l0 = None if grad_l0 is None else grad_l0.contiguous()
    given = codes.tuple()
    module().threshold_gradients(
        (0, *given[1:]) if grad_values is None else given, *map(ptr, (state, grad_l0, threshold)), bandwidth,
        straight_through, ptr(grad_pre), ptr(jumps), stream(threshold),
    )  # fmt: skip
    if not need_threshold:
        return grad_pre, threshold.new_empty(0)
    return grad_pre, ByLatent(codes._replace(values=jumps)).value_sums(threshold.dtype)


TABLE = table(codes_from_dense_fwd, codes_from_dense_bwd, topk_bwd, encode_threshold_bwd)
