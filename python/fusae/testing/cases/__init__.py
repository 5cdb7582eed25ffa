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
from .encode import ENCODE_TOPK, TOPK, encode_topk, topk

CASES = TOPK + ENCODE_TOPK + DECODE + ADAM_ROWS

__all__ = ["CASES", "Case", "Inputs", "adam_rows_", "decode", "encode_topk", "topk"]
