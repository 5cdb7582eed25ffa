# SPDX-License-Identifier: Apache-2.0
"""Modules: the sparse coder, its training losses, and what belongs to them."""

from . import objectives
from .activity import DeadLatents
from .coder import SparseCoder
from .config import SparseCoderConfig
from .cross_layer import CrossLayerTranscoder
from .cross_layer_config import CrossLayerConfig
from .files import load
from .init import geometric_median, init_firing_rate_, init_thresholds_, init_uniform_encoder_, unit_rows_
from .join import join_codes, split_codes
from .objectives import CoderLoss, Moment

__all__ = [
    "CoderLoss", "CrossLayerConfig", "CrossLayerTranscoder", "DeadLatents", "Moment", "SparseCoder",
    "SparseCoderConfig", "geometric_median", "init_firing_rate_", "init_thresholds_", "init_uniform_encoder_",
    "join_codes", "load", "objectives", "split_codes", "unit_rows_",
]  # fmt: skip
