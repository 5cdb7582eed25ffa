# SPDX-License-Identifier: Apache-2.0
"""The directory of a run: what is in it, whether it is free, what a continued run must share with its beginning."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..formats.native import remove_scratch, replacing, write_json
from ..info import versions
from . import checkpoint, shards
from .config import TrainConfig, expanded
from .metrics import EVENTS, METRICS
from .rows import describe

if TYPE_CHECKING:
    from .trainer import Trainer

CONFIG, CODER = "config.json", "coder"
# The last of it to be written: where it is, the run is finished.
_DONE = f"{CODER}/coder.json"
# All that a run, its evaluation and its report write.
_FILES = (
    CONFIG, METRICS, checkpoint.NAME, _DONE, f"{CODER}/coder.safetensors",
    "eval.json", "features.json", "bench.json", "report.html",
)  # fmt: skip
# May differ between a run and its continuation: they do not change the result (but for the rounding of another device,
# and for rows that are not finite).
_FREE = (
    "log_every", "checkpoint_every", "prefetch", "tensorboard", "nonfinite", "device", "shard_latents", "rank_timeout",
)  # fmt: skip


def prepare(
    run_dir: Path | None, config: TrainConfig | dict[str, Any] | None, resume: bool, overwrite: bool
) -> dict[str, Any] | None:
    """What the checkpoint to resume says, or None for a new run, whose directory is then free."""
    if config is not None and not isinstance(config, (TrainConfig, dict) if resume else TrainConfig):
        also = ", a dict of fields or None" if resume else ""
        raise TypeError(f"config must be a fusae.train.TrainConfig{also}, got {type(config).__name__}")
    if resume:
        if run_dir is None:
            raise ValueError("resume needs a run_dir")
        if (run_dir / _DONE).exists() and not (run_dir / checkpoint.NAME).exists():
            raise ValueError(f"run_dir: the run in {run_dir} is finished: {run_dir / CODER} holds its coder")
        return checkpoint.read_about(run_dir / checkpoint.NAME)
    if config is None:
        raise ValueError("config must be given for a new run")
    if run_dir is not None:
        present = [name for name in _FILES if (run_dir / name).exists()]
        if present and not overwrite:
            raise FileExistsError(
                f"run_dir: {run_dir} holds a run ({', '.join(present)}); resume it, overwrite it, or take another one"
            )
    return None


@contextlib.contextmanager
def locked(run_dir: Path | None) -> Iterator[None]:
    """Inside, no other trainer works on the run. The lock ends with the process, however that ends.

    Raises:
        ValueError: another one does.
    """
    if run_dir is None:
        yield
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    folder = os.open(run_dir, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ValueError(f"run_dir: another process is training in {run_dir}; wait for it, or stop it") from None
    finally:
        os.close(folder)


def merge(given: TrainConfig | dict[str, Any] | None, stored: TrainConfig) -> TrainConfig:
    """The stored configuration with the given free choices; anything else given must agree with it."""
    if given is None:
        return stored
    values = given.to_dict() if isinstance(given, TrainConfig) else expanded(given)
    for name, mine in values.items():
        theirs = getattr(stored, name)
        if name == "tokens" and isinstance(mine, int):
            mine -= mine % stored.batch_size  # as `resolve` does
        if name not in _FREE and mine is not None and mine != theirs:
            raise ValueError(f"{name} is {mine!r}, the run to resume has {theirs!r}; start a new run to change it")
    return dataclasses.replace(stored, **{name: values[name] for name in _FREE if name in values})


def start_files(trainer: Trainer, new: bool) -> None:
    """config.json, and metrics.jsonl cut back to the rows done (a crash may have logged beyond its checkpoint).

    A new run first removes all files of an old one, which `prepare` found or was told to overwrite.
    """
    with locked(trainer.run_dir):
        _start_files(trainer, new)


def _start_files(trainer: Trainer, new: bool) -> None:
    run_dir, step = trainer.run_dir, trainer.step
    for name in _FILES:
        remove_scratch(run_dir / name)
    path = run_dir / checkpoint.NAME  # of its shards, those of a save that was cut short go
    shards.remove_others(path, [] if new else shards.files_of(checkpoint.read_about(path)))
    if new:
        for name in _FILES:
            (run_dir / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not there, or not empty
            (run_dir / CODER).rmdir()
        shutil.rmtree(run_dir / EVENTS, ignore_errors=True)
        about = {
            **trainer.about,
            "train": trainer.config.to_dict(),
            "data": describe(trainer.source),
            "input_scales": list(trainer.scaling.scales),
            "input_centre_norm": float(trainer.scaling.centre.norm()),
            "versions": versions(),
        }
        write_json(run_dir / CONFIG, about)
    metrics = run_dir / METRICS
    kept = []
    if metrics.exists():
        for line in metrics.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # a line cut short by a crash
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
    with replacing(metrics) as scratch:
        scratch.write_text("".join(kept), encoding="utf-8")
