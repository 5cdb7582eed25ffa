# SPDX-License-Identifier: Apache-2.0
"""Cases, oracles and comparisons: what decides whether a backend is right. Used by the tests and the benchmarks."""

from .cases import CASES, Case
from .compare import (
    assert_equal,
    assert_grads,
    assert_same_nonfinite,
    assert_topk,
    assert_within_budget,
    selection_band,
)
from .targets import Target, left_out, targets

__all__ = [
    "CASES",
    "Case",
    "Target",
    "assert_equal",
    "assert_grads",
    "assert_same_nonfinite",
    "assert_topk",
    "assert_within_budget",
    "left_out",
    "selection_band",
    "targets",
]
