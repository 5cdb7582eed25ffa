# SPDX-License-Identifier: Apache-2.0
"""Several dictionaries on one stream of activations, in one process."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..formats.native import FormatError, read_json, write_json
from ..nn import CrossLayerTranscoder, SparseCoder
from . import checkpoint
from .config import TrainConfig
from .interrupt import interruptible
from .metrics import MetricsLog
from .progress import TrainingDisplay
from .rows import open_data
from .run_dir import CODER, locked
from .setup import device_of, new_feed, open_batches, try_ops
from .trainer import Trainer

SETTINGS = "sweep.json"
# What decides which rows come in which batch: every dictionary sees the same ones.
SHARED = ("batch_size", "epochs", "tokens", "data_seed", "shuffle_rows", "nonfinite")


class Sweep:
    """Trains a dictionary for each of several configurations; every batch is read and checked once for all.

    They may differ in anything but the order of the data: k, form, width, learning rate, seed of the weights. Each has
    an ordinary run directory, with its own metrics, checkpoints and coder, bit for bit that of a `Trainer` alone.

    Args:
        configs: by name (of the run's directory). To resume, None.
        data: as of `Trainer`; rows of one model and site (or sites) for all.
        out: folder of the runs and of sweep.json; None writes nothing.
        resume: go on with the sweep in `out`. Runs that were saved at different steps meet again at the furthest.
        overwrite: replace a sweep that is in `out`.
        show: progress on stderr.

    Attributes:
        trainers: by name; of a resumed sweep those that are neither finished nor failed.
        finished: names of runs that a resumed sweep found finished.
        failed: by name, what was said of runs that diverged; the others go on without them.

    Raises:
        ValueError, TypeError, FileNotFoundError, FileExistsError: bad arguments, before any work.
    """

    def __init__(
        self,
        configs: Mapping[str, TrainConfig] | None,
        data: Any,
        out: str | Path | None = None,
        *,
        resume: bool = False,
        overwrite: bool = False,
        show: bool = True,
    ) -> None:
        self.out, self.show = None if out is None else Path(out), show
        self.finished: list[str] = []
        self.failed: dict[str, str] = {}
        if resume:
            configs, self.failed = _stored(self.out, configs)
        _check(configs)
        if not resume and self.out is not None and (self.out / SETTINGS).exists() and not overwrite:
            raise FileExistsError(f"out: {self.out} holds a sweep; resume it, overwrite it, or take another folder")
        self.source = open_data(data)
        self.configs = dict(configs)
        batches = [self._try(name, config) for name, config in configs.items()][0]
        first = open_batches(next(iter(configs.values())), self.source)[1]
        self.feed = new_feed(first, batches, device_of(first.device))
        self._write()
        self.trainers: dict[str, Trainer] = {}
        for name, config in configs.items():
            folder = None if self.out is None else self.out / name
            begun = resume and (folder / checkpoint.NAME).exists()
            if name in self.failed:
                continue
            if resume and (folder / CODER / "coder.json").exists() and not begun:
                self.finished.append(name)
                continue
            self.trainers[name] = Trainer(
                None if begun else config, self.source, folder, resume=begun, overwrite=overwrite or resume, show=False,
                feed=self.feed,
            )  # fmt: skip
        self.step = min((trainer.step for trainer in self.trainers.values()), default=0)
        if self.step:
            behind = next(trainer for trainer in self.trainers.values() if trainer.step == self.step)
            self.feed.load_state_dict(*behind.place)

    def _try(self, name: str, config: TrainConfig) -> Any:
        """The batches of a configuration; raises, naming the run, where it does not fit the data or cannot be run."""
        try:
            batches, resolved = open_batches(config, self.source)
            try_ops(resolved, device_of(resolved.device))
        except (TypeError, ValueError) as error:
            raise type(error)(f"configs: run {name!r}: {error}") from error
        return batches

    def _write(self) -> None:
        if self.out is not None:
            runs = {name: config.to_dict() for name, config in self.configs.items()}
            write_json(self.out / SETTINGS, {"runs": runs, "failed": self.failed})

    def run(self, until: int | None = None) -> dict[str, SparseCoder | CrossLayerTranscoder]:
        """Train all to the end, or to step `until`; Ctrl-C or SIGTERM finishes the step, saves, and returns.

        Returns:
            `Trainer.export()` of every one of `trainers` that has not failed, by name.

        Raises:
            FloatingPointError: every run diverged; the message names them.
            ValueError: bad rows, or the end of the data; what was trained is saved.
            OSError: a run could not be saved; its last checkpoint and all other runs are.
        """
        trainers = self.trainers
        steps = max((trainer.config.steps for trainer in trainers.values()), default=0)
        goal = steps if until is None else min(until, steps)
        with contextlib.ExitStack() as stack:
            for trainer in trainers.values():
                stack.enter_context(locked(trainer.run_dir))
            logs = {name: MetricsLog(t.run_dir, t.config.tensorboard, t.step) for name, t in trainers.items()}
            for log in logs.values():
                stack.enter_context(contextlib.closing(log))
            batch = next((trainer.config.batch_size for trainer in trainers.values()), 1)
            display = stack.enter_context(TrainingDisplay(self.show, steps * batch))
            stopped = stack.enter_context(interruptible())
            stack.enter_context(contextlib.closing(self.feed))
            while self.step < goal and not stopped.is_set() and len(self.failed) < len(self.configs):
                start, waited = time.perf_counter(), self.feed.waited
                try:
                    x = self.feed.next(stopped)
                except (ValueError, StopIteration) as error:  # what was trained so far is good
                    due = [trainer for _, trainer in self._due()]
                    self._end(display)
                    if isinstance(error, StopIteration):
                        raise ValueError(due[0].ended()) from None
                    raise
                if x is None:
                    break
                waited = self.feed.waited - waited
                for name, trainer in self._due():
                    self._take(name, trainer, x, start, waited, logs[name], display)
                    start, waited = time.perf_counter(), 0.0  # the first one waited for all
                self.step += 1
                display.tokens(self.step * batch)
            troubles = self._end(display)
        if trainers and all(name in self.failed for name in trainers) and not self.finished:
            told = "; ".join(f"{name}: {error}" for name, error in self.failed.items())
            raise FloatingPointError(f"every run of the sweep diverged: {told}")
        if troubles:
            raise troubles[0]
        return {name: trainer.export() for name, trainer in trainers.items() if name not in self.failed}

    def _end(self, display: TrainingDisplay) -> list[OSError]:
        """Save each: none is lost because another cannot be saved. Returns what kept runs from being saved."""
        troubles = []
        for name, trainer in self.trainers.items():
            # One that is ahead lies on disk as it is; the batches are not at its place.
            if name in self.failed or (trainer.step != self.step and not trainer.finished):
                continue
            try:
                trainer.end(display)
            except FloatingPointError as error:
                self._fail(name, error, display)
            except OSError as error:
                display.say(f"warning: {name} could not be saved: {error}")
                troubles.append(error)
        return troubles

    def _fail(self, name: str, error: FloatingPointError, display: TrainingDisplay) -> None:
        self.failed[name] = str(error)
        display.say(f"warning: {name} has diverged and is left behind: {error}")
        self._write()

    def _due(self) -> list[tuple[str, Trainer]]:
        """Those that have not seen the next batch: a run may have been saved further on than another."""
        return [
            (name, trainer)
            for name, trainer in self.trainers.items()
            if trainer.step == self.step and not trainer.finished and name not in self.failed
        ]

    def _take(
        self,
        name: str,
        trainer: Trainer,
        x: Any,
        start: float,
        waited: float,
        log: MetricsLog,
        display: TrainingDisplay,
    ) -> None:
        try:
            row = trainer.take(x, start, waited)
            if row is not None:
                log.write(row)
                display.metrics(row, last=trainer.finished, name=name)
                if log.trouble:
                    display.say(f"warning: {log.trouble}")
            if not trainer.finished:
                trainer.checkpoint_if_due(display)
        except FloatingPointError as error:
            self._fail(name, error, display)


def _stored(out: Path | None, configs: Any) -> tuple[dict[str, TrainConfig], dict[str, str]]:
    if configs is not None:
        raise ValueError("configs must be None to resume: sweep.json has them")
    if out is None:
        raise ValueError("resume needs out, the folder of the sweep")
    path = out / SETTINGS
    values = read_json(path, "the settings of a sweep")
    try:
        runs = {name: TrainConfig.from_dict(fields) for name, fields in values["runs"].items()}
        return runs, dict(values["failed"])
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise FormatError(f"{path}: {error}") from error


def _check(configs: Any) -> None:
    if not isinstance(configs, Mapping) or not configs:
        raise ValueError("configs must be one or more fusae.train.TrainConfig by name, got none")
    names, first = list(configs), None
    for name, config in configs.items():
        if not isinstance(config, TrainConfig):
            raise TypeError(f"configs: {name!r} must be a fusae.train.TrainConfig, got {type(config).__name__}")
        if not isinstance(name, str) or not name or name != Path(name).name or name.startswith("."):
            raise ValueError(f"configs: a name must be the name of a folder, got {name!r}")
        config = dataclasses.replace(config, data_seed=config.seed if config.data_seed is None else config.data_seed)
        first = first or config
        for field in SHARED:
            if getattr(config, field) != getattr(first, field):
                raise ValueError(
                    f"configs: {field} must be the same for all, as they share the batches; {names[0]!r} has "
                    f"{getattr(first, field)!r}, {name!r} has {getattr(config, field)!r}"
                )
