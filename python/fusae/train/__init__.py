# SPDX-License-Identifier: Apache-2.0
"""Training of sparse coders: `train` for a whole run, `Trainer` for its parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..nn import SparseCoder
from .config import TrainConfig
from .rows import Rows, open_data
from .trainer import Trainer

__all__ = ["Rows", "TrainConfig", "Trainer", "open_data", "train"]


def train(
    config: TrainConfig | None,
    data: Any,
    run_dir: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    show: bool = True,
) -> SparseCoder:
    """Train a sparse coder; arguments as of `Trainer`. Returns the coder of plain (unscaled) inputs."""
    return Trainer(config, data, run_dir, resume=resume, overwrite=overwrite, show=show).run()
