# SPDX-License-Identifier: Apache-2.0
"""The public ops. One file per op: schema and fake, autograd.Function, public function."""

from . import encode_bwd as _encode_bwd  # noqa: F401  (defines the raw op that the encode ops share)
from .adam_rows import adam_rows_
from .codes_from_dense import codes_from_dense
from .decode import decode
from .decode_loss import DecodeLoss, decode_loss
from .encode_batch_topk import encode_batch_topk
from .encode_threshold import encode_threshold
from .encode_topk import encode_topk
from .topk import topk

__all__ = [
    "DecodeLoss",
    "adam_rows_",
    "codes_from_dense",
    "decode",
    "decode_loss",
    "encode_batch_topk",
    "encode_threshold",
    "encode_topk",
    "topk",
]
