# SPDX-License-Identifier: Apache-2.0
"""The cases on which every backend is tested and benchmarked: a shape, a generator of inputs, the public call, a cost.

`CASES` is the conformance list, chosen so that every size, pattern, layout and option meets every other kind of hazard
at least once (pairs, not the full product). The same builders make other cases: ``encode_topk(n=2048, d=576, ...)``.
One file per family of ops.
"""

from __future__ import annotations

from .adam import ADAM_ROWS, adam_rows_
from .case import Case, Inputs
from .decode import DECODE, decode
from .dense import CODES_FROM_DENSE, codes_from_dense
from .encode import ENCODE_TOPK, TOPK, encode_topk, topk
from .loss import DECODE_LOSS, decode_loss
from .ragged import ENCODE_BATCH_TOPK, ENCODE_THRESHOLD, encode_batch_topk, encode_threshold

CASES = (
    TOPK + ENCODE_TOPK + ENCODE_THRESHOLD + ENCODE_BATCH_TOPK + DECODE + DECODE_LOSS + CODES_FROM_DENSE + ADAM_ROWS
)

__all__ = [
    "CASES", "Case", "Inputs", "adam_rows_", "codes_from_dense", "decode", "decode_loss", "encode_batch_topk",
    "encode_threshold", "encode_topk", "topk",
]  # fmt: skip
