# SPDX-License-Identifier: Apache-2.0
"""The directory of a run: what is in it, whether it is free, what a continued run must share with its beginning."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..formats.native import replacing, write_json
from ..info import versions
from . import checkpoint
from .config import TrainConfig
from .rows import describe

if TYPE_CHECKING:
    from .trainer import Trainer

CONFIG, METRICS, CODER = "config.json", "metrics.jsonl", "coder"
# May differ between a run and its continuation: they do not change the result.
_FREE = ("log_every", "checkpoint_every", "device")


def prepare(run_dir: Path | None, config: TrainConfig | None, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """What the checkpoint to resume says, or None for a new run, whose directory is then free."""
    if config is not None and not isinstance(config, TrainConfig):
        raise TypeError(f"config must be a fusae.train.TrainConfig, got {type(config).__name__}")
    if resume:
        if run_dir is None:
            raise ValueError("resume needs a run_dir")
        if (run_dir / CODER).exists() and not (run_dir / checkpoint.NAME).exists():
            raise ValueError(f"run_dir: the run in {run_dir} is finished: {run_dir / CODER} holds its coder")
        return checkpoint.read_about(run_dir / checkpoint.NAME)
    if config is None:
        raise ValueError("config must be given for a new run")
    if run_dir is not None:
        present = [name for name in (CONFIG, METRICS, checkpoint.NAME, CODER) if (run_dir / name).exists()]
        if present and not overwrite:
            raise FileExistsError(
                f"run_dir: {run_dir} holds a run ({', '.join(present)}); resume it, overwrite it, or take another one"
            )
    return None


def merge(given: TrainConfig | None, stored: TrainConfig) -> TrainConfig:
    """The stored configuration with the given free choices; anything else given must agree with it."""
    if given is None:
        return stored
    for field in dataclasses.fields(TrainConfig):
        mine, theirs = getattr(given, field.name), getattr(stored, field.name)
        derived = mine is None or (field.name == "tokens" and mine // stored.batch_size * stored.batch_size == theirs)
        if field.name not in _FREE and not derived and mine != theirs:
            raise ValueError(
                f"{field.name} is {mine!r}, the run to resume has {theirs!r}; start a new run to change it"
            )
    return dataclasses.replace(stored, **{name: getattr(given, name) for name in _FREE})


def start_files(trainer: Trainer) -> None:
    """config.json, and metrics.jsonl cut back to the rows done (a crash may have logged beyond its checkpoint)."""
    run_dir, step = trainer.run_dir, trainer.step
    run_dir.mkdir(parents=True, exist_ok=True)
    if step == 0:
        for name in (checkpoint.NAME, f"{CODER}/coder.json", f"{CODER}/coder.safetensors"):
            (run_dir / name).unlink(missing_ok=True)
        about = {
            "train": trainer.config.to_dict(),
            "data": describe(trainer.source),
            "input_scale": trainer.scale,
            "versions": versions(),
        }
        write_json(run_dir / CONFIG, about)
    metrics = run_dir / METRICS
    kept = []
    if step and metrics.exists():
        for line in metrics.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # a line cut short by a crash
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
    with replacing(metrics) as scratch:
        scratch.write_text("".join(kept), encoding="utf-8")
