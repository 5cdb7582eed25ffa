# SPDX-License-Identifier: Apache-2.0
"""Ragged encoders: what passes the threshold of its latent, and the best of the batch."""

from __future__ import annotations

from torch import Tensor

from ...kernels.encode_batch_topk import select_batch
from ...kernels.encode_chunked import select_chunked
from ...kernels.encode_threshold import select_threshold
from ...kernels.encode_tile import Operands
from ...kernels.topk import Columns
from .available import table
from .encode import auxiliary


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
    o = Operands(x, W_enc, b_enc, norms)
    aux, aux_values, aux_indices = auxiliary(x, aux_mask, k_aux if aux_mask is not None else 0)
    if aux and len(x):
        select_chunked(o.x, W_enc, Columns(o.bias, o.norms), activation == "relu", aux)
    return *select_batch(o, k, activation == "relu"), aux_values, aux_indices


TABLE = table(encode_threshold_fwd, encode_batch_topk_fwd)
