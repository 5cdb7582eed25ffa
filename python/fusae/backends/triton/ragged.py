# SPDX-License-Identifier: Apache-2.0
"""Ragged encoders: what passes the threshold of its latent, and the best of the batch."""

from __future__ import annotations

from torch import Tensor

from ...kernels import encode_plan as plan
from ...kernels.encode_batch_topk import select_batch
from ...kernels.encode_chunked import select_chunked
from ...kernels.encode_threshold import select_threshold
from ...kernels.encode_tile import Operands
from ...kernels.encode_topk import Candidates
from ...kernels.topk import Columns
from .available import table
from .encode import auxiliary, way

MOST_CANDIDATES = 1 << 27
"""Of the auxiliary selection beside a batch: 1 GB. More rows than that are selected by pieces of ``[n, m]``."""


def encode_threshold_fwd(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    threshold: Tensor,
    norms: Tensor | None,
    bandwidth: float,
    capacity: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return select_threshold(Operands(x, W_enc, b_enc, norms), threshold, bandwidth, capacity)


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
    aux, aux_values, aux_indices = auxiliary(x, aux_mask, k_aux if aux_mask is not None else 0)
    second = None
    if aux and len(x):
        sample = plan.sample(o.m, k_aux, o.tiles.BN)
        # All rows at once, unlike in `encode_topk`: the batch has one bound.
        if plan.fused(len(x), o.m, k_aux, 0, "topk", o.tiles.BN, way()) and len(x) * sample.cap <= MOST_CANDIDATES:
            second = Candidates(o, k_aux, sample, aux[1])
            second.bounds(o.sampled(second.sample.size))
        else:
            select_chunked(o.x, W_enc, Columns(o.bias, o.norms), relu, aux)
    found = select_batch(o, k, relu, second)
    if second is not None:
        second.certify()
        second.finish(aux_values, aux_indices, relu, aux[4])
    return *found, aux_values, aux_indices


TABLE = table(encode_threshold_fwd, encode_batch_topk_fwd)
