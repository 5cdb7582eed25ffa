# SPDX-License-Identifier: Apache-2.0
"""One coder trained by many processes: latents shared among some of them, rows of a batch among the others."""

from .coder import ShardedCoder
from .mesh import Mesh, RankLost, is_first, is_launched, restarts
from .trainer import ShardedTrainer, is_finished

__all__ = [
    "Mesh", "RankLost", "ShardedCoder", "ShardedTrainer", "is_finished", "is_first", "is_launched", "restarts",
]  # fmt: skip
