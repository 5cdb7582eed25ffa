# SPDX-License-Identifier: Apache-2.0
"""What a run measures of itself: sums that stay on the device between two rows, and the files the rows go to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..nn import CoderLoss
from ..nn.sums import total

METRICS, EVENTS = "metrics.jsonl", "tensorboard"
_SUMS = ("loss", "sse", "total", "active", "aux", "aux_steps", "grad_norm")


class Interval:
    """Sums over the steps since the last row of metrics. `add` never reads from the device, `row` does once.

    Args:
        terms: names of further terms of the loss (``CoderLoss.terms``) whose means become a part of the rows.

    Attributes:
        sums: float64 ``[7 + terms]``, on the device.
        counts: plain numbers: ``steps``, ``tokens``, ``seconds``, and ``waited``, the part of these spent on waiting
            for data.
    """

    def __init__(self, device: torch.device, terms: Sequence[str] = ()) -> None:
        self.terms = tuple(terms)
        self.sums = torch.zeros(len(_SUMS) + len(self.terms), dtype=torch.float64, device=device)
        self.counts = _nothing()

    @torch.no_grad()
    def add(self, x: Tensor, mean: Tensor, result: CoderLoss, dead: Tensor | None, grad_norm: Tensor | None) -> None:
        """Count a step on the rows `x`, as trained on."""
        none = torch.zeros_like(result.sse)
        values = [
            result.loss.detach(),
            result.sse,
            total((x - mean).square()),
            (result.codes.values != 0).sum(),
            none if result.aux is None else result.aux,
            none if dead is None else dead.any(),
            none if grad_norm is None else grad_norm,
            *(result.terms.get(name, none) for name in self.terms),
        ]
        self.sums += torch.stack([v.to(self.sums.device, self.sums.dtype) for v in values])
        self.counts["steps"] += 1
        self.counts["tokens"] += x.shape[0]

    def passed(self, seconds: float, waited: float) -> None:
        self.counts["seconds"] += seconds
        self.counts["waited"] += waited

    def row(self, dead: Tensor, clipped: bool) -> dict[str, Any]:
        """The measured part of a row; begins the next interval. `dead`: how many latents are, on the device.

        ``fvu`` is ``Σ ||x - x̂||² / Σ ||x - mean||²`` of training batches before their step.
        """
        *sums, dead = torch.cat([self.sums, dead.to(self.sums.dtype)[None]]).tolist()
        sum_of = dict(zip((*_SUMS, *self.terms), sums, strict=True))
        now, self.counts = self.counts, _nothing()
        self.sums.zero_()
        seconds = max(now["seconds"], 1e-9)
        return {
            "loss": sum_of["loss"] / now["steps"],
            "fvu": sum_of["sse"] / sum_of["total"] if sum_of["total"] else None,
            "l0": sum_of["active"] / now["tokens"],
            "dead": int(dead),
            "aux_loss": sum_of["aux"] / sum_of["aux_steps"] if sum_of["aux_steps"] else None,
            **{name: sum_of[name] / now["steps"] for name in self.terms},
            "grad_norm": sum_of["grad_norm"] / now["steps"] if clipped else None,
            "tokens_per_s": round(now["tokens"] / seconds, 1),
            "wait": round(now["waited"] / seconds, 4),
        }


def _nothing() -> dict[str, Any]:
    return {"steps": 0, "tokens": 0, "seconds": 0.0, "waited": 0.0}


class MetricsLog:
    """Appends rows to metrics.jsonl, and to TensorBoard events where asked.

    A disk that is full does not end a run: rows wait in memory until they can be written, and `trouble` says so.
    """

    def __init__(self, run_dir: Path | None, tensorboard: bool, step: int) -> None:
        self.path = None if run_dir is None else run_dir / METRICS
        self.trouble: str | None = None
        self._pending: list[str] = []
        self._events: Any = None
        if run_dir is not None and tensorboard:
            # What an earlier process wrote of later steps, after its last checkpoint, is not shown.
            self._events = _event_writer()(run_dir / EVENTS, purge_step=step + 1)

    def write(self, row: dict[str, Any]) -> None:
        if self.path is None:
            return
        self._pending.append(json.dumps(row, allow_nan=False) + "\n")
        try:
            _append(self.path, "".join(self._pending).encode())
            if self._events is not None:
                for name, value in row.items():
                    if name != "step" and value is not None:
                        self._events.add_scalar(name, value, row["step"])
                self._events.flush()
        except OSError as error:
            self.trouble = (
                f"{self.path} could not be written ({error.strerror or error}); trying again with the next row"
            )
            return
        self._pending.clear()
        self.trouble = None

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None


def _append(path: Path, data: bytes) -> None:
    """All of `data`, or nothing."""
    with open(path, "ab", buffering=0) as file:
        before = file.tell()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(before)
            raise


def check_tensorboard() -> None:
    """Raises where `TrainConfig.tensorboard` cannot be honoured, before any work."""
    _event_writer()


def _event_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError(
            f"tensorboard = true needs the package tensorboard ({error}): pip install 'fusae[tensorboard]'",
            name="tensorboard",
        ) from error
    return SummaryWriter
