# SPDX-License-Identifier: Apache-2.0
"""Training losses: each a small frozen dataclass of its options, called with the coder, a batch and the moment."""

from .base import CoderLoss, Moment, Objective
from .topk import TopK

__all__ = ["CoderLoss", "Moment", "Objective", "TopK"]
