# SPDX-License-Identifier: Apache-2.0
"""The training loop of a sparse coder."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..formats.native import FormatError
from ..nn import CoderLoss, CrossLayerTranscoder, DeadLatents, Moment, SparseCoder
from ..nn.init import init_thresholds_, unit_rows_
from ..nn.objectives import Objective
from . import checkpoint, shards
from .average import WeightAverage
from .config import TrainConfig
from .feed import Feed
from .forms import objective
from .interrupt import interruptible
from .measure import Scaling, measure
from .metrics import Interval, MetricsLog, check_tensorboard
from .optimiser import new_optimizer, new_training_coder, stepping_early
from .progress import TrainingDisplay
from .rows import open_data
from .run_dir import CODER, locked, merge, prepare, start_files
from .setup import autocast, device_of, new_feed, open_batches, try_ops


class Trainer:
    """Trains a `SparseCoder` or a `CrossLayerTranscoder`; everything it needs to go on later is in one checkpoint.

    Args:
        config: a `TrainConfig`. To resume, None or a dict of the fields given: `log_every`, `checkpoint_every`,
            `prefetch`, `tensorboard`, `nonfinite` and `device` may change (all of them do with a `TrainConfig`), any
            other must be as it was.
        data: a tensor or array ``[n, d]``, a ``.npy`` path, a folder of activations, or an object with
            ``batches(batch_size, seed, epochs)`` (an iterator of ``[n, d]`` batches with `state_dict` and
            `load_state_dict`; without a length where `config.tokens` is given) and ``shape``. With
            `config.shuffle_rows`, its `batches` takes that too.
        run_dir: where config.json, metrics.jsonl, the checkpoint and the finished coder go; None writes nothing.
        resume: go on from the checkpoint in `run_dir`.
        overwrite: replace a run that is in `run_dir`.
        show: progress on stderr.
        about: plain values to be written into config.json beside what the trainer writes there itself.
        feed: batches that are shared with other trainers, see `Sweep`; whoever made it brings it to its place.

    Attributes:
        coder: the coder in training, of centred and scaled rows; `export()` gives it for plain ones.
        objective: its loss.
        optimizer, dead, feed, config (resolved), step (steps done).
        average: the `WeightAverage` of the coder, or None without `config.ema`.
        scaling: the `Scaling` of the rows.
        place: of a resumed trainer: where its data go on, how many rows were dropped, and after which step.

    metrics.jsonl has a line for every `log_every` steps, over the steps since the last: ``step``, ``tokens`` and
    ``seconds`` so far, mean ``loss``, ``fvu``, ``l0``, ``dead`` latents, ``aux_loss`` (mean over the steps with dead
    latents; null without any), ``grad_norm`` (mean, before clipping; null without), ``lr``, ``k``, ``tokens_per_s``,
    ``wait`` (share of the time spent waiting for data), ``dropped`` (rows left out so far as not finite). Its ``fvu``
    is ``Σ ||x - x̂||² / Σ ||x - mean||²`` of training batches before their step, with the `mean` of the data's first
    `init_rows` rows; that of `fusae.eval` is exact. Forms with further terms in their loss add the mean of each.

    Raises:
        ValueError, TypeError, FileNotFoundError: bad data or configuration, before any work.
        BackendError: the backend asked for cannot run this training, before any work.
    """

    def __init__(
        self,
        config: TrainConfig | dict[str, Any] | None,
        data: Any,
        run_dir: str | Path | None = None,
        *,
        resume: bool = False,
        overwrite: bool = False,
        show: bool = True,
        about: dict[str, Any] | None = None,
        feed: Feed | None = None,
    ) -> None:
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.show, self.about = show, about or {}
        found = self._prepare(config, resume, overwrite)
        if found is not None:
            config = merge(config, found["config"])
        self.source, batches, self.config = self._open(config, data)
        config, self.device = self.config, self._start()
        if config.tensorboard:
            check_tensorboard()
        terms = try_ops(config, self.device)
        self.feed = self._new_feed(batches) if feed is None else feed
        self.step, self.seconds = 0, 0.0
        self.interval = Interval(self.device, terms)
        new = found is None
        self.coder, self.objective = self._new_coder(config.seed if new else None)
        self.optimizer = new_optimizer(self.coder, config)
        latents = config.layers * self.coder.config.m
        self.dead = DeadLatents(latents, config.dead_window, self.device)
        self.average = WeightAverage(self.coder, config.ema) if config.ema else None
        if new:
            rows = min(config.init_rows, self.source.shape[0] or config.init_rows, config.tokens)
            self.scaling = self._measure(rows)
            if config.form == "jumprelu":
                for part in getattr(self.coder, "sources", [self.coder]):
                    init_thresholds_(part, config.threshold_init)
        else:
            self._resume(found, shared=feed is not None)
        if self.run_dir is not None:
            self._start_files(new)

    # What several processes that train one coder do in another way: see `fusae.train.sharded`.

    def _prepare(self, config: Any, resume: bool, overwrite: bool) -> dict[str, Any] | None:
        return prepare(self.run_dir, config, resume, overwrite)

    def _open(self, config: TrainConfig, data: Any) -> tuple[Any, Any, TrainConfig]:
        source = open_data(data)
        return source, *open_batches(config, source)

    def _start(self) -> torch.device:
        return device_of(self.config.device)

    def _new_feed(self, batches: Any) -> Feed:
        return new_feed(self.config, batches, self.device)

    def _new_coder(self, seed: int | None) -> tuple[SparseCoder | CrossLayerTranscoder, Objective]:
        return new_training_coder(self.config, seed=seed, device=self.device), objective(self.config)

    def _measure(self, rows: int) -> Scaling:
        return measure(self.config, self.feed.peek(rows), self.coder)

    def _start_files(self, new: bool) -> None:
        start_files(self, new)

    def _clip(self) -> Tensor:
        return self.optimizer.clip_grad_norm_(self.config.clip_norm)

    def _dead_count(self) -> Tensor:
        return self.dead.mask().sum()

    def _save_coder(self) -> None:
        self.export().save(self.run_dir / CODER)

    def close(self) -> None:
        """Take leave of other processes that train the coder; of use to `fusae.train.sharded`."""

    def _plain(self) -> SparseCoder | CrossLayerTranscoder:
        """The coder in training, of the class that is saved."""
        return self.coder

    part: shards.Part | None = None  # of the latents, that this process holds; None: all of them
    _writes = True  # whether this process is the one that keeps the run's directory
    _interruptible = staticmethod(interruptible)

    def _resume(self, found: dict[str, Any], shared: bool) -> None:
        path = self.run_dir / checkpoint.NAME
        self.step, self.seconds, self.interval.counts = found["step"], found["seconds"], found["interval"]
        self.scaling = Scaling.unknown(self.config, self.coder.b_dec.detach())
        self.scaling.scales, self.scaling.variance = tuple(found["scales"]), found["variance"]
        self.place = found["data"], found["dropped"], self.step
        try:
            if not shared:
                self.feed.load_state_dict(*self.place)
        except (TypeError, AttributeError, KeyError) as error:
            raise FormatError(f"{path}: field 'data' is no place in these data ({error!r})") from error
        checkpoint.load_tensors(self, path)
        self._anneal(max(1, self.step))

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.step * self.config.batch_size

    @property
    def finished(self) -> bool:
        return self.step >= self.config.steps

    def train_step(self, x: Tensor) -> CoderLoss:
        """One step on a batch ``[n, d]`` of plain rows: loss, gradients, optimiser, counters. No host sync."""
        config, coder = self.config, self.coder
        x = self.scaling.apply(x.to(self.device, coder.b_dec.dtype, non_blocking=True))
        d = config.input_width
        x, target = (x[:, :d], x[:, d:]) if config.is_transcoder else (x, x)
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr_at(self.step + 1)
        self._anneal(self.step + 1)
        dead, k_aux = self._dead()
        variance = self.scaling.variance if config.normalise_loss else 1.0
        moment = Moment(dead, k_aux, variance, config.ramp_at(self.step + 1), self.step)
        with autocast(config, self.device):
            result = self.objective(coder, x, target, moment)
        with stepping_early(coder, self.optimizer, config):
            result.loss.backward()
        norm = None if config.clip_norm is None else self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        coder.clamp_()
        if self.average is not None:
            self.average.update(coder)
            self.average.measure(coder, x, config.threshold_decay, config.unit_decoder)
        self.dead.update(result.codes)
        self.step += 1
        mean = self.scaling.mean[d:] if config.is_transcoder else self.scaling.mean
        self.interval.add(target, mean, result, dead, norm)
        return result

    def _anneal(self, step: int) -> None:
        """Give the coder the k of a step."""
        if self.coder.config.k != (k := self.config.k_at(step)):
            self.coder.config = dataclasses.replace(self.coder.config, k=k)

    def _dead(self) -> tuple[Tensor | None, int]:
        """Mask of the dead latents and how many of them AuxK takes; (None, 0) where nothing is dead."""
        k_aux = self.config.k_aux
        if not (k_aux or self.config.preact_coefficient) or self.tokens < self.config.dead_window:
            return None, 0  # nothing can be dead yet, or nothing is done about it
        mask = self.dead.mask()
        if k_aux == 0:
            return mask, 0
        # Counted only where reading costs nothing. Too wide a selection, or one from an empty mask, only wastes work.
        if mask.device.type == "cpu":
            k_aux = min(k_aux, int(mask.sum()))
        return (mask, k_aux) if k_aux else (None, 0)

    def _row(self) -> dict[str, Any]:
        """The metrics since the last row, for metrics.jsonl. Reads from the device once."""
        config, steps = self.config, self.interval.counts["steps"]
        dead = self._dead_count() if self.tokens >= config.dead_window else self.interval.sums.new_zeros(())
        row = self.interval.row(dead, config.clip_norm is not None)
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise FloatingPointError(
                    f"the {name} became {value} in steps {self.step - steps + 1} to {self.step}: {self._advice()}"
                )
        return {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            **row,
            "lr": config.lr_at(self.step),
            "k": config.k_at(self.step),
            "dropped": self.feed.dropped,
        }

    def run(
        self, until: int | None = None, on_log: Callable[[dict[str, Any]], None] | None = None
    ) -> SparseCoder | CrossLayerTranscoder:
        """Train to the end, or to step `until`; Ctrl-C or SIGTERM finishes the step, saves, and returns.

        Args:
            until: stop (and save a checkpoint) after this step.
            on_log: called with every row of metrics.

        Returns:
            `export()`. When the run is `finished` it also lies in ``run_dir/coder`` and the checkpoint is removed.

        Raises:
            FloatingPointError: the training diverged; the last good checkpoint is kept.
        """
        goal = self.config.steps if until is None else min(until, self.config.steps)
        kept = self.run_dir if self._writes else None
        log = MetricsLog(kept, self.config.tensorboard, self.step)
        with (
            locked(kept),
            TrainingDisplay(self.show, self.config.tokens) as display,
            self._interruptible() as stopped,
            contextlib.closing(log),
            contextlib.closing(self.feed),
        ):
            display.tokens(self.tokens)
            while self.step < goal and not stopped.is_set():
                start, waited = time.perf_counter(), self.feed.waited
                try:
                    x = self.feed.next(stopped)
                except StopIteration:
                    self._try_checkpoint(display)
                    raise ValueError(self.ended()) from None
                except ValueError:  # of the data: what was trained so far is good
                    self._try_checkpoint(display)
                    raise
                if x is None:
                    break
                row = self.take(x, start, self.feed.waited - waited)
                display.tokens(self.tokens)
                if row is not None:
                    log.write(row)
                    display.metrics(row, last=self.step == self.config.steps)
                    if log.trouble:
                        display.say(f"warning: {log.trouble}")
                    if on_log is not None:
                        on_log(row)
                if self.step < goal and not stopped.is_set():
                    self.checkpoint_if_due(display)
            self.end(display)
        return self.export()

    def ended(self) -> str:
        """What to say where the data came to an end too early."""
        return f"data: ended after step {self.step} of {self.config.steps}; take fewer tokens or more epochs"

    def checkpoint_if_due(self, display: TrainingDisplay) -> None:
        """Save where `config.checkpoint_every` says so."""
        every = self.config.checkpoint_every
        if every and self.step % every == 0:
            self._try_checkpoint(display)

    def take(self, x: Tensor, start: float, waited: float) -> dict[str, Any] | None:
        """Train on a batch that was `waited` seconds for since `start`; a row of metrics where one is due."""
        self.train_step(x)
        logging = self.step % self.config.log_every == 0 or self.step == self.config.steps
        if logging and self.device.type == "cuda":
            # The row waits for the device anyway; so its time is in the row.
            torch.cuda.synchronize(self.device)
        elapsed = time.perf_counter() - start
        self.seconds += elapsed
        self.interval.passed(elapsed, waited)
        return self._row() if logging else None

    def _try_checkpoint(self, display: TrainingDisplay) -> None:
        """A disk that is full does not end a run that can still go on: the next checkpoint may find room."""
        if self.run_dir is None:
            return
        try:
            self.save_checkpoint()
        except OSError as error:
            display.say(f"warning: no checkpoint of step {self.step:,}: {error.strerror or error}")

    def end(self, display: TrainingDisplay) -> None:
        """Save the finished coder, or a checkpoint to go on from."""
        if self.finished:
            self._check_finite()
        if self.run_dir is None:
            return
        if self.finished:
            self._save_coder()
            if self._writes:
                checkpoint.remove(self.run_dir)
            display.say(f"done: {self.run_dir / CODER}")
        else:
            self.save_checkpoint()
            display.say(
                f"stopped after step {self.step:,} of {self.config.steps:,}; saved. To go on: "
                f"fusae train --resume {self.run_dir}"
            )

    def save_checkpoint(self) -> Path:
        """Write the whole state to ``run_dir/checkpoint.safetensors``, atomically.

        Raises:
            FloatingPointError: the training diverged; the last good checkpoint is kept.
        """
        if self.run_dir is None:
            raise ValueError("save_checkpoint needs a run_dir; this trainer was made without one")
        self._check_finite()
        checkpoint.save(self, self.run_dir / checkpoint.NAME)
        return self.run_dir / checkpoint.NAME

    def _check_finite(self) -> None:
        for name, tensor in checkpoint.tensors(self).items():
            # In parts: bounds the scratch memory beside a large matrix.
            if not torch.stack([torch.isfinite(part).all() for part in tensor.reshape(-1).split(1 << 22)]).all():
                path = None if self.run_dir is None else self.run_dir / checkpoint.NAME
                kept = f"; {path} is of an earlier step" if path is not None and path.exists() else ""
                raise FloatingPointError(
                    f"{name} holds NaN or infinite values after step {self.step}: {self._advice()}{kept}"
                )

    def _advice(self) -> str:
        return f"lower lr (now {self.config.lr:g}), set clip_norm, or look for extreme rows in the data"

    def export(self) -> SparseCoder | CrossLayerTranscoder:
        """The coder of plain inputs, with the averaged weights where there are any: scale and centre are folded in. An
        autoencoder shares its two weight matrices where they are not averaged.

        An average of unit decoder rows is a little shorter: with `unit_decoder` its rows are brought back to unit norm.
        Of a batch top-k the averaged weights have the threshold that was measured for them (see `WeightAverage`).
        """
        trained = self._plain()
        named, weights = dict(trained.named_parameters()), {}
        if self.average is not None and self.average.steps:
            weights = {name: nn.Parameter(value) for name, value in self.average.weights().items()}
            for name, weight in weights.items():
                if self.config.unit_decoder and name.endswith("W_dec"):
                    unit_rows_(weight.data)
        elif (
            len(self.scaling.widths) == 1
        ):  # folding the scale of an autoencoder's rows leaves its matrices as they are
            weights = {name: named[name] for name in ("W_enc", "W_dec")}
        # What is not replaced is copied.
        coder = copy.deepcopy(trained, {id(named[name]): weight for name, weight in weights.items()})
        if self.average is not None and self.average.steps:
            coder.load_state_dict(self.average.thresholds, strict=False)
        coder.sparse_grad = False
        coder.eval()
        coder = self.scaling.fold_into(coder)
        if self.config.weights != "float32":  # a coder is of one dtype
            coder = coder.to(torch.bfloat16)
            coder.config = dataclasses.replace(coder.config, dtype="bfloat16")
        return coder
