# SPDX-License-Identifier: Apache-2.0
"""Every raw op in plain torch: the specification, and a backend that runs anywhere.

The functions have the signatures of the raw ops. Sums are taken in float32 (float64 for float64 inputs), whatever the
dtype of the inputs; run on float64 copies, they are the oracle that every other backend is measured against.

Order of selection: larger score first, NaN largest of all, equal scores by the lower index; ``-0.0 == +0.0``.
"""

from .adam import adam_rows_
from .decode import codes_from_dense_bwd, codes_from_dense_fwd, decode_bwd, decode_fwd, decode_loss_bwd, decode_loss_fwd
from .encode import (
    encode_batch_topk_fwd,
    encode_bwd,
    encode_threshold_bwd,
    encode_threshold_fwd,
    encode_topk_fwd,
    topk_bwd,
    topk_fwd,
)
from .sums import accumulator

__all__ = [
    "accumulator",
    "adam_rows_",
    "codes_from_dense_bwd",
    "codes_from_dense_fwd",
    "decode_bwd",
    "decode_fwd",
    "decode_loss_bwd",
    "decode_loss_fwd",
    "encode_batch_topk_fwd",
    "encode_bwd",
    "encode_threshold_bwd",
    "encode_threshold_fwd",
    "encode_topk_fwd",
    "topk_bwd",
    "topk_fwd",
]
