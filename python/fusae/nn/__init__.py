# SPDX-License-Identifier: Apache-2.0
"""Modules: the sparse coder, its training losses, and what belongs to them."""

from . import objectives
from .activity import DeadLatents
from .coder import SparseCoder
from .config import SparseCoderConfig
from .init import geometric_median, unit_rows_
from .objectives import CoderLoss, Moment

__all__ = [
    "CoderLoss", "DeadLatents", "Moment", "SparseCoder", "SparseCoderConfig", "geometric_median", "objectives",
    "unit_rows_",
]  # fmt: skip
