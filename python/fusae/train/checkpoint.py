# SPDX-License-Identifier: Apache-2.0
"""The whole state of a run in one atomically written file: going on from it gives the bits of never having stopped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _fields
from ..formats.native import FormatError, check_sums, check_tensors, check_version, open_tensors, write_tensors
from . import shards
from .config import TrainConfig

if TYPE_CHECKING:
    from .trainer import Trainer

FORMAT, VERSION, NAME = "fusae.Trainer", 2, "checkpoint.safetensors"
_WANTED = "the checkpoint of an unfinished run"


def save(trainer: Trainer, path: Path) -> None:
    """Weights, their average, moments, counters, random state, place in the data, sums of the open interval."""
    write_tensors(path, tensors(trainer), about(trainer))
    shards.remove_others(path, [])  # of ranks that trained it before


def remove(run_dir: Path) -> None:
    """Remove the checkpoint of a run, and what belongs to it."""
    (run_dir / NAME).unlink(missing_ok=True)
    shards.remove_others(run_dir / NAME, [])


def about(trainer: Trainer) -> dict[str, Any]:
    """Every plain value of the state."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "config": trainer.config.to_dict(),
        "step": trainer.step,
        "seconds": trainer.seconds,
        "scales": list(trainer.scaling.scales),
        "variance": trainer.scaling.variance,
        "interval": trainer.interval.counts,
        "data": trainer.feed.state_dict(),
        "dropped": trainer.feed.dropped,
    }


def tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Every tensor of the state."""
    moments = {
        f"{name}.{key}": value
        for name, param in trainer.coder.named_parameters()
        for key, value in trainer.optimizer.state.get(param, {}).items()
        if isinstance(value, Tensor)
    }
    return {**_tensors(trainer), **moments}


def _tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Every tensor of the state but the moments, to be written, or to be read into."""
    average = {} if trainer.average is None else {**trainer.average.sums, **trainer.average.thresholds}
    return {
        **{name: param.detach() for name, param in trainer.coder.named_parameters()},
        **{f"{name}.average": value for name, value in average.items()},
        **{name: value for name, value in trainer.coder.named_buffers()},
        "centre": trainer.scaling.centre,
        "mean": trainer.scaling.mean,
        "sums": trainer.interval.sums,
        "tokens_since_fired": trainer.dead.tokens_since_fired,
        "rng_state": torch.get_rng_state(),
    }


def read_about(path: Path) -> dict[str, Any]:
    """What a checkpoint says about itself, ``config`` as a `TrainConfig`; no tensor is read."""
    _, about = open_tensors(path, _WANTED)
    check_version(path, about, FORMAT, VERSION)
    for field in ("config", "step", "seconds", "scales", "variance", "interval", "data", "dropped"):
        if field not in about:
            raise FormatError(f"{path}: field {field!r} is missing")
    try:
        return about | {"config": _checked(about)}
    except (TypeError, ValueError) as error:
        raise FormatError(f"{path}: field {error}") from error


def _checked(about: dict[str, Any]) -> TrainConfig:
    """The configuration, after a look at every plain value. ``data`` is for the source of the data to judge."""
    for field in ("config", "interval"):
        if not isinstance(about[field], dict):
            raise TypeError(f"{field!r} must be an object, got {type(about[field]).__name__}")
    try:
        config = TrainConfig.from_dict(about["config"])
    except (TypeError, ValueError) as error:
        raise type(error)(f"'config': {error}") from error
    if config.tokens is None:
        raise ValueError("'config': tokens must be given, got none")
    _fields.whole("'step'", about["step"], 0, config.steps, "the run's steps")
    _fields.number("'seconds'", about["seconds"])
    cross_layer = config.architecture == "cross_layer"
    if cross_layer and (not isinstance(about["variance"], list) or len(about["variance"]) != config.layers):
        raise ValueError(f"'variance' must be {config.layers} numbers, got {about['variance']!r}")
    for variance in about["variance"] if cross_layer else [about["variance"]]:
        _fields.number("'variance'", variance, above=True)
    if not isinstance(about["scales"], list) or len(about["scales"]) != len(config.parts):
        raise ValueError(f"'scales' must be {len(config.parts)} numbers, got {about['scales']!r}")
    for scale in about["scales"]:
        _fields.number("'scales'", scale, above=True)
    _fields.whole("'dropped'", about["dropped"])
    number = _fields.number
    for field, check in (("steps", _fields.whole), ("tokens", _fields.whole), ("seconds", number), ("waited", number)):
        if field not in about["interval"]:
            raise ValueError(f"'interval.{field}' is missing")
        check(f"'interval.{field}'", about["interval"][field])
    return config


def load_tensors(trainer: Trainer, path: Path) -> None:
    """Read the tensors of a checkpoint into a trainer of the same configuration, and restore torch's random state.

    Raises:
        FormatError: a tensor is missing, damaged, or of another shape or dtype; raised before any is taken over.
    """
    file, about = open_tensors(path, _WANTED)
    targets = _tensors(trainer)
    step = about["step"]
    for name, param in trainer.coder.named_parameters() if step else ():
        state = trainer.optimizer.state_of(param)
        state["step"] = step
        targets.update({f"{name}.{key}": value for key, value in state.items() if isinstance(value, Tensor)})
    if shards.FIELD in about or trainer.part is not None:
        shards.load(path, file, about, targets, trainer.part)
    else:
        check_tensors(path, file, {name: (list(target.shape), target.dtype) for name, target in targets.items()})
        check_sums(path, file, about)
        with torch.no_grad():
            for name, target in targets.items():
                if name != "rng_state":
                    target.copy_(file.get_tensor(name))
    if trainer.average is not None:
        trainer.average.steps = step
    torch.set_rng_state(file.get_tensor("rng_state"))
