# SPDX-License-Identifier: Apache-2.0
"""Training losses: each a small frozen dataclass of its options, called with the coder, a batch and the moment.

Squared errors are summed over d, meaned over rows, and divided by the variance of the targets (``moment.variance``), so
that 1 is the error of their mean. Published coefficients belong to undivided errors of rows of unit mean squared norm,
which is the same where the variance is 1.
"""

from .base import CoderLoss, Moment, Objective
from .cross_layer import CrossLayer
from .jumprelu import JumpReLU
from .nested import HierarchicalTopK, Matryoshka
from .relu import Gated, ReLU
from .topk import BatchTopK, TopK

__all__ = [
    "BatchTopK", "CoderLoss", "CrossLayer", "Gated", "HierarchicalTopK", "JumpReLU", "Matryoshka", "Moment",
    "Objective", "ReLU", "TopK",
]  # fmt: skip
