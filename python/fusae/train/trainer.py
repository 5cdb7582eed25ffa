# SPDX-License-Identifier: Apache-2.0
"""The training loop of a sparse coder."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..formats.native import FormatError
from ..nn import CoderLoss, DeadLatents, SparseCoder, SparseCoderConfig
from ..nn.sums import total
from ..optim import Adam
from . import checkpoint
from .config import TrainConfig
from .interrupt import interruptible
from .progress import TrainingDisplay
from .rows import open_data
from .run_dir import CODER, METRICS, merge, prepare, start_files

_SUMS = ("loss", "sse", "total", "active", "aux", "aux_steps")


class Trainer:
    """Trains a `SparseCoder`; everything it needs to go on later is in one checkpoint.

    Args:
        config: a `TrainConfig`. To resume, None or a dict of the fields given: `log_every`, `checkpoint_every` and
            `device` may change (all three do with a `TrainConfig`), any other must be as it was.
        data: a tensor or array ``[n, d]``, a ``.npy`` path, a folder of activations, or an object with
            ``batches(batch_size, seed, epochs)`` (an iterator of ``[n, d]`` batches with `state_dict` and
            `load_state_dict`; without a length where `config.tokens` is given) and ``shape``.
        run_dir: where config.json, metrics.jsonl, the checkpoint and the finished coder go; None writes nothing.
        resume: go on from the checkpoint in `run_dir`.
        overwrite: replace a run that is in `run_dir`.
        show: progress on stderr.

    Attributes:
        coder: the coder in training, of inputs scaled by `scale`; `export()` gives it for plain inputs.
        optimizer, dead, config (resolved), step (steps done), scale, mean (``[d]``, scaled), variance (scaled).

    metrics.jsonl has a line for every `log_every` steps, over the steps since the last: ``step``, ``tokens`` and
    ``seconds`` so far, mean ``loss``, ``fvu``, ``l0``, ``dead`` latents, ``aux_loss`` (mean over the steps with dead
    latents; null without any), ``lr``, ``tokens_per_s``. Its ``fvu`` is ``Σ ||x - x̂||² / Σ ||x - mean||²`` of training
    batches before their step, with the `mean` of the data's first `init_rows` rows; that of `fusae.eval` is exact.

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
    ) -> None:
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.show = show
        about = prepare(self.run_dir, config, resume, overwrite)
        if about is not None:
            config = merge(config, about["config"])
        self.source = open_data(data)
        d = int(self.source.shape[1])
        every = config.tokens is not None
        self.batches = self.source.batches(config.batch_size, config.seed, None if every else config.epochs)
        length = None if every else _length(self.batches)
        per_epoch = None if length is None else length // config.epochs * config.batch_size
        self.config = config = config.resolve(d, per_epoch)
        self.device = _device(config.device)
        _try_ops(config, self.device)
        self.step, self.seconds = 0, 0.0
        self.sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=self.device)
        self.interval = _no_steps()
        shape = _shape(config)
        new = about is None
        self.coder = SparseCoder(shape, seed=config.seed if new else None, device=self.device, sparse_grad=True)
        self.optimizer = _optimizer(self.coder, config)
        self.dead = DeadLatents(config.m, config.dead_window, self.device)
        if new:
            self._measure()
        else:
            self.mean = torch.zeros(d, dtype=shape.torch_dtype, device=self.device)
            self.step, self.seconds, self.interval = about["step"], about["seconds"], about["interval"]
            self.scale, self.variance = about["scale"], about["variance"]
            path = self.run_dir / checkpoint.NAME
            try:
                self.batches.load_state_dict(about["data"])
            except (TypeError, AttributeError, KeyError) as error:
                raise FormatError(f"{path}: field 'data' is no place in these data ({error!r})") from error
            checkpoint.load_tensors(self, path)
        if self.run_dir is not None:
            start_files(self, new)

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.step * self.config.batch_size

    @property
    def finished(self) -> bool:
        return self.step >= self.config.steps

    def _measure(self) -> None:
        """Centre, scale and variance of the data, from its first rows; sets `b_dec`."""
        config, rows = self.config, []
        for x in self.source.batches(config.batch_size, config.seed, 1):
            rows.append(self._checked(x, "the first batches"))
            if sum(len(r) for r in rows) >= config.init_rows:
                break
        dtype = self.coder.W_dec.dtype
        x = torch.cat(rows)[: config.init_rows].to(self.device, dtype)
        mean = x.mean(0, dtype=torch.float64).to(dtype)
        variance = float(total((x - mean).square(), torch.float64)) / len(x)
        if not variance > 0:
            raise ValueError(f"data: the first {len(x)} rows are all the same: there is nothing to learn")
        self.scale = 1 / math.sqrt(variance) if config.scale_input else 1.0
        self.variance = variance * self.scale**2
        self.mean = mean * self.scale
        if config.b_dec_init != "zero":
            self.coder.init_b_dec_(x * self.scale, config.b_dec_init)

    def _checked(self, x: Tensor, where: str) -> Tensor:
        d = self.config.d
        if not isinstance(x, Tensor) or x.ndim != 2 or x.shape[1] != d or x.shape[0] == 0:
            shape = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"data: {where}: a batch must have shape [n, {d}], got {shape}")
        # A finite sum means finite values. Data that are on a GPU already are not read back; their loss is.
        if not x.is_cuda and not torch.isfinite(x.sum()):
            bad = (~torch.isfinite(x).all(1)).nonzero()
            if len(bad):
                raise ValueError(
                    f"data: {where}: {len(bad)} of {len(x)} rows hold NaN or infinite values (the first is row "
                    f"{int(bad[0])} of the batch); leave such rows out of the data"
                )
        return x

    def train_step(self, x: Tensor) -> CoderLoss:
        """One step on a batch ``[n, d]`` of unscaled rows: loss, gradients, optimiser, counters. No host sync."""
        config, coder = self.config, self.coder
        x = x.to(self.device, coder.W_dec.dtype) * self.scale
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr_at(self.step + 1)
        dead, k_aux = self._dead()
        with _autocast(config, self.device):
            result = coder.loss(x, dead, k_aux, aux_coefficient=config.aux_coefficient, variance=self.variance)
        result.loss.backward()
        if config.clip_norm is not None:
            self.optimizer.clip_grad_norm_(config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.dead.update(result.codes)
        self.step += 1
        self._account(x, result, dead)
        return result

    def _dead(self) -> tuple[Tensor | None, int]:
        """Mask of the dead latents and how many of them AuxK takes; (None, 0) where nothing is dead."""
        k_aux = self.config.k_aux
        if k_aux == 0 or self.tokens < self.config.dead_window:
            return None, 0  # nothing can be dead yet
        mask = self.dead.mask()
        # Counted only where reading costs nothing. Too wide a selection, or one from an empty mask, only wastes work.
        if mask.device.type == "cpu":
            k_aux = min(k_aux, int(mask.sum()))
        return (mask, k_aux) if k_aux else (None, 0)

    @torch.no_grad()
    def _account(self, x: Tensor, result: CoderLoss, dead: Tensor | None) -> None:
        none = torch.zeros_like(result.sse)
        values = [
            result.loss.detach(),
            result.sse,
            total((x - self.mean).square()),
            (result.codes.values != 0).sum(),
            none if result.aux is None else result.aux,
            none if dead is None else dead.any(),
        ]
        self.sums += torch.stack([v.to(self.sums.dtype) for v in values])
        self.interval["steps"] += 1
        self.interval["tokens"] += x.shape[0]

    def _row(self) -> dict[str, Any]:
        """The metrics since the last row, for metrics.jsonl. Reads from the device once."""
        now = self.interval
        dead = (self.dead.mask().sum() if self.tokens >= self.config.dead_window else self.sums.new_zeros(())).double()
        *sums, dead = torch.cat([self.sums, dead[None]]).tolist()
        loss, sse, centred, active, aux, aux_steps = sums
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss became {loss} in steps {self.step - now['steps'] + 1} to {self.step}: "
                f"{self._advice()}"
            )
        row = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "loss": loss / now["steps"],
            "fvu": sse / centred,
            "l0": active / now["tokens"],
            "dead": int(dead),
            "aux_loss": aux / aux_steps if aux_steps else None,
            "lr": self.config.lr_at(self.step),
            "tokens_per_s": round(now["tokens"] / max(now["seconds"], 1e-9), 1),
        }
        self.sums.zero_()
        self.interval = _no_steps()
        return row

    def run(self, until: int | None = None, on_log: Callable[[dict[str, Any]], None] | None = None) -> SparseCoder:
        """Train to the end, or to step `until`; Ctrl-C or SIGTERM finishes the step, saves, and returns.

        Args:
            until: stop (and save a checkpoint) after this step.
            on_log: called with every row of metrics.

        Returns:
            `export()`. When the run is `finished` it also lies in ``run_dir/coder`` and the checkpoint is removed.

        Raises:
            FloatingPointError: the training diverged; the last good checkpoint is kept.
        """
        config = self.config
        goal = config.steps if until is None else min(until, config.steps)
        with TrainingDisplay(self.show, config.tokens) as display, interruptible() as stopped:
            display.tokens(self.tokens)
            while self.step < goal and not stopped.is_set():
                start = time.perf_counter()
                self.train_step(self._next())
                display.tokens(self.tokens)
                logging = self.step % config.log_every == 0 or self.step == config.steps
                row = self._row_timed(start) if logging else self._timed(start)
                if row is not None:
                    self._log(row)
                    display.metrics(row, last=self.step == config.steps)
                    if on_log is not None:
                        on_log(row)
                due = config.checkpoint_every and self.step % config.checkpoint_every == 0
                if due and self.run_dir is not None and self.step < goal:
                    self.save_checkpoint()
            if self.finished:
                self._check_finite()
            if self.run_dir is None:
                pass
            elif self.finished:
                self.export().save(self.run_dir / CODER)
                (self.run_dir / checkpoint.NAME).unlink(missing_ok=True)
                display.say(f"done: {self.run_dir / CODER}")
            else:
                self.save_checkpoint()
                display.say(
                    f"stopped after step {self.step:,} of {config.steps:,}; saved. To go on: "
                    f"fusae train --resume {self.run_dir}"
                )
        return self.export()

    def _next(self) -> Tensor:
        try:
            x = next(self.batches)
        except StopIteration:
            raise ValueError(
                f"data: ended after step {self.step} of {self.config.steps}; take fewer tokens or more epochs"
            ) from None
        x = self._checked(x, f"step {self.step + 1}")
        if x.shape[0] != self.config.batch_size:
            raise ValueError(
                f"data: step {self.step + 1}: a batch must have batch_size = {self.config.batch_size} rows, "
                f"got {x.shape[0]}"
            )
        return x

    def _timed(self, start: float) -> None:
        elapsed = time.perf_counter() - start
        self.seconds += elapsed
        self.interval["seconds"] += elapsed

    def _row_timed(self, start: float) -> dict[str, Any]:
        if self.device.type == "cuda":  # the row waits for the device anyway; so its time is in the row
            torch.cuda.synchronize(self.device)
        self._timed(start)
        return self._row()

    def _log(self, row: dict[str, Any]) -> None:
        if self.run_dir is not None:
            with open(self.run_dir / METRICS, "a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")

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
            if not torch.stack([torch.isfinite(part).all() for part in tensor.split(4096)]).all():
                path = None if self.run_dir is None else self.run_dir / checkpoint.NAME
                kept = f"; {path} is of an earlier step" if path is not None and path.exists() else ""
                raise FloatingPointError(
                    f"{name} holds NaN or infinite values after step {self.step}: {self._advice()}{kept}"
                )

    def _advice(self) -> str:
        return f"lower lr (now {self.config.lr:g}), set clip_norm, or look for extreme rows in the data"

    def export(self) -> SparseCoder:
        """The coder of plain inputs: the input scale folded into the biases. Shares the two weight matrices."""
        coder = copy.copy(self.coder)
        coder._parameters = dict(self.coder._parameters)
        coder.b_enc = nn.Parameter(self.coder.b_enc.detach().clone())
        coder.b_dec = nn.Parameter(self.coder.b_dec.detach().clone())
        coder.sparse_grad = False
        return coder.fold_input_scale_(self.scale)


def _no_steps() -> dict[str, Any]:
    return {"steps": 0, "tokens": 0, "seconds": 0.0}


def _length(batches: Any) -> int | None:
    try:
        return len(batches)
    except TypeError:
        return None


def _shape(config: TrainConfig, m: int | None = None) -> SparseCoderConfig:
    return SparseCoderConfig(
        config.d, m or config.m, config.k, select_by_norm=config.select_by_norm, k_aux=config.k_aux,
        dtype="float32" if config.dtype == "bfloat16" else config.dtype,
    )  # fmt: skip


def _autocast(config: TrainConfig, device: torch.device) -> contextlib.AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")


def _try_ops(config: TrainConfig, device: torch.device) -> None:
    """One step with as few latents as will do: a backend that was asked for and cannot run an op says so here."""
    shape = _shape(config, max(config.k, config.k_aux))
    coder = SparseCoder(shape, device=device, sparse_grad=True)
    dead = torch.ones(shape.m, dtype=torch.bool, device=device) if shape.k_aux else None
    with _autocast(config, device):
        loss = coder.loss(torch.ones(2, shape.d, dtype=shape.torch_dtype, device=device), dead, variance=1.0).loss
    loss.backward()
    _optimizer(coder, config).step()


def _optimizer(coder: SparseCoder, config: TrainConfig) -> Adam:
    masked = config.optimizer == "masked"
    unit = config.unit_decoder
    groups = [
        {"params": [coder.W_enc], "masked": masked},
        {"params": [coder.W_dec], "masked": masked, "project": unit, "renormalise": unit},
        {"params": [coder.b_enc, coder.b_dec]},
    ]
    return Adam(groups, config.lr, (config.beta1, config.beta2), config.eps)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:<number>', got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but torch sees no GPU here; use 'cpu' or 'auto'")
    return device
