# SPDX-License-Identifier: Apache-2.0
"""Dense activations to codes and back; what a step at the thresholds gives the entries."""

from __future__ import annotations

from torch import Tensor

from ...kernels import dense as kernels
from ...kernels.entries import Codes
from ...kernels.sums import ByLatent
from .available import table
from .checks import fits


def codes_from_dense_fwd(f: Tensor, capacity: int | None) -> tuple[Tensor, Tensor, Tensor]:
    return kernels.codes_from_dense(f, capacity)


def codes_from_dense_bwd(grad_values: Tensor, indices: Tensor, offsets: Tensor, m: int) -> Tensor:
    fits(offsets, len(indices))
    return kernels.scatter(Codes.of(grad_values, indices, offsets, m))


def topk_bwd(grad_values: Tensor, indices: Tensor, m: int) -> Tensor:
    return kernels.scatter(Codes.of(grad_values, indices, None, m))


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
    codes = Codes.of(indices, indices, offsets, threshold.shape[0])
    grad_pre, jumps = kernels.threshold_gradients(
        codes, state, grad_values, grad_l0, threshold, bandwidth, straight_through
    )
    if not need_threshold:
        return grad_pre, threshold.new_empty(0)
    entries = ByLatent(Codes.of(jumps, indices, offsets, codes.m), zeros=False)
    return grad_pre, entries.coef_sums(threshold.dtype)


TABLE = table(codes_from_dense_fwd, codes_from_dense_bwd, topk_bwd, encode_threshold_bwd)
