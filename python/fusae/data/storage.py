# SPDX-License-Identifier: Apache-2.0
"""How rows are stored: float32, float16, bfloat16 or int8 with scales, and what that loses.

int8: each row has one scale for each site (`fusae.data.collect` over several sites concatenates their rows, whose norms
may differ tenfold): ``scale = max|x| / 127`` over the row's values of that site, ``stored = round(x / scale)``,
half to even, and ``x ≈ stored · scale``.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .shards import Layout

# numpy has no bfloat16: its bits are stored.
STORED = {name: np.dtype(code) for name, code in
          (("float32", "<f4"), ("float16", "<f2"), ("bfloat16", "<u2"), ("int8", "|i1"))}  # fmt: skip
ROWS, SCALES, POSITIONS = "rows", "scales", "positions"


def layout_of(dtype: str, widths: Sequence[int]) -> Layout:
    """The arrays that hold rows of sites of `widths` in `dtype`, with where they came from."""
    layout = {ROWS: (sum(widths), STORED[dtype]), POSITIONS: (2, np.dtype("<i4"))}
    return {**layout, SCALES: (len(widths), np.dtype("<f4"))} if dtype == "int8" else layout


def encode(x: Tensor, dtype: str, widths: Sequence[int]) -> dict[str, np.ndarray]:
    """The stored arrays of rows ``[n, Σ widths]``, fp32, finite, on the CPU. Raises `ValueError` for an overflow."""
    if dtype == "int8":
        scales = torch.stack([part.abs().amax(1) for part in x.split(list(widths), 1)], 1) / 127.0
        per_value = scales.repeat_interleave(torch.tensor(list(widths)), dim=1)
        # A row of zeros has scale 0, and so has one whose scale underflows: both are stored as zeros.
        rows = torch.where(per_value > 0, x / per_value, 0.0).round_().clamp_(-127, 127).to(torch.int8)
        return {ROWS: rows.numpy(), SCALES: scales.numpy()}
    rows = x.to(getattr(torch, dtype))
    if dtype != "float32" and not bool(rows.isfinite().all()):
        other = "'bfloat16' or 'float32'" if dtype == "float16" else "'float32'"
        raise ValueError(
            f"dtype: a value of {float(x.abs().max()):.3g} does not fit {dtype} ({torch.finfo(rows.dtype).max:.6g}); "
            f"pass dtype={other}, or a lower outlier_factor"
        )
    rows = rows.contiguous()
    return {ROWS: rows.view(torch.int16).numpy().view(np.uint16) if dtype == "bfloat16" else rows.numpy()}


def decode(rows: np.ndarray, scales: np.ndarray | None, dtype: str, widths: Sequence[int]) -> Tensor:
    """The fp32 rows ``[n, Σ widths]`` that stored ones stand for. float32 shares the memory of `rows`.

    One thread does it: this runs beside a training step, and a parallel op would bring threads of its own.
    """
    if dtype == "float32":
        return torch.from_numpy(rows)
    if dtype == "float16":
        x = torch.empty(rows.shape)
        # Four times as fast as numpy's conversion; torch uses one thread for less than 2^15 values.
        pieces = max(1, ((1 << 15) - 1) // rows.shape[1])
        for to, part in zip(x.split(pieces), torch.from_numpy(rows).split(pieces), strict=True):
            to.copy_(part)
        return x
    if dtype == "bfloat16":
        bits = np.left_shift(rows, 16, dtype=np.uint32, casting="unsafe")
        return torch.from_numpy(bits.view(np.float32))
    assert scales is not None
    x = np.empty(rows.shape, np.float32)
    stops = np.cumsum(widths)
    for site, (stop, width) in enumerate(zip(stops, widths, strict=True)):
        inside = slice(stop - width, stop)
        np.multiply(rows[:, inside], scales[:, site : site + 1], out=x[:, inside])
    return torch.from_numpy(x)


class StorageLoss:
    """FVU of storage, ``Σ‖x − stored(x)‖² / Σ‖x − mean‖²``, streaming in float64; a state of plain values."""

    def __init__(self, width: int) -> None:
        self.rows, self.error, self.spread = 0, 0.0, 0.0
        self.mean = torch.zeros(width, dtype=torch.float64)

    def add(self, x: Tensor, stored: Tensor) -> None:
        """Rows ``[n, d]`` in fp32 and what their stored form stands for."""
        # Few rows at a time: what is made of them in float64 stays in cache, which makes this ten times as fast.
        for part, of_part in zip(x.split(256), stored.split(256), strict=True):
            if len(part):
                self._add(part, of_part)

    def _add(self, x: Tensor, stored: Tensor) -> None:
        before = self.rows
        self.rows += len(x)
        error = (x - stored).double().view(-1)
        self.error += float(error.dot(error))
        x = x.double()
        mean = x.mean(0)
        x = x.sub_(mean).view(-1)
        # The sum about the common mean, from those about two means (Chan, Golub and LeVeque 1979).
        shift = mean - self.mean
        self.spread += float(x.dot(x) + shift.dot(shift) * (before * len(stored) / self.rows))
        self.mean += shift * (len(stored) / self.rows)

    @property
    def fvu(self) -> float:
        """0 without loss; infinite for rows that are all the same and not stored exactly."""
        return self.error / self.spread if self.spread else (float("inf") if self.error else 0.0)

    def state_dict(self) -> dict[str, Any]:
        mean = base64.b64encode(self.mean.numpy().astype("<f8").tobytes()).decode()
        return {"rows": self.rows, "error": self.error, "spread": self.spread, "mean": mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows, self.error, self.spread = state["rows"], state["error"], state["spread"]
        mean = np.frombuffer(base64.b64decode(state["mean"]), "<f8").copy()
        if len(mean) != len(self.mean):
            raise ValueError(f"state: mean has {len(mean)} values, wanted {len(self.mean)}")
        self.mean = torch.from_numpy(mean)
