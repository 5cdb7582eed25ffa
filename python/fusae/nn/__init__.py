# SPDX-License-Identifier: Apache-2.0
"""Modules: the sparse coder (top-k sparse autoencoder) and what belongs to it."""

from .activity import DeadLatents
from .coder import CoderLoss, SparseCoder
from .config import SparseCoderConfig
from .init import geometric_median, unit_rows_

__all__ = ["CoderLoss", "DeadLatents", "SparseCoder", "SparseCoderConfig", "geometric_median", "unit_rows_"]
