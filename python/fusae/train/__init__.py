# SPDX-License-Identifier: Apache-2.0
"""Training of sparse coders: `train` for a whole run, `Trainer` for its parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..nn import SparseCoder
from .config import TrainConfig
from .presets import PRESETS
from .rows import Rows, open_data
from .sweep import Sweep
from .trainer import Trainer

__all__ = ["PRESETS", "Rows", "Sweep", "TrainConfig", "Trainer", "TrainingInterrupted", "open_data", "train"]


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended `train` early. `coder`: the coder as far as it was trained, of plain inputs."""

    def __init__(self, trainer: Trainer, coder: SparseCoder) -> None:
        self.coder = coder
        kept = "not saved: it had no run_dir"
        if trainer.run_dir is not None:
            kept = f"saved: train(None, data, {str(trainer.run_dir)!r}, resume=True) goes on"
        super().__init__(f"stopped after step {trainer.step} of {trainer.config.steps}; {kept}")


def train(
    config: TrainConfig | dict[str, Any] | None,
    data: Any,
    run_dir: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    show: bool = True,
    about: dict[str, Any] | None = None,
) -> SparseCoder:
    """Train a sparse coder to the end; arguments as of `Trainer`. Returns the coder of plain (unscaled) inputs.

    Raises:
        TrainingInterrupted: stopped by a signal, after the step and, with a `run_dir`, a checkpoint.
        ValueError, TypeError, FileNotFoundError, BackendError: before any work.
        FloatingPointError: the training diverged; the last good checkpoint is kept.
    """
    trainer = Trainer(config, data, run_dir, resume=resume, overwrite=overwrite, show=show, about=about)
    coder = trainer.run()
    if not trainer.finished:
        raise TrainingInterrupted(trainer, coder)
    return coder
