# SPDX-License-Identifier: Apache-2.0
"""What a run has to know of its data before the first step."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..nn import SparseCoder
from ..nn.sums import total
from .config import TrainConfig


class Measured(NamedTuple):
    """``x`` is trained on as ``scale · (x - centre)``; of such rows, `mean` ``[d]`` and `variance` are the mean and the
    mean squared distance from it."""

    centre: Tensor
    scale: float
    mean: Tensor
    variance: float


@torch.no_grad()
def measure(config: TrainConfig, rows: Tensor, coder: SparseCoder) -> Measured:
    """Centre, scale and variance from the first rows ``[n, d]`` of the data; sets `b_dec` of the coder.

    Raises:
        ValueError: all rows are the same.
    """
    x = rows.to(coder.W_dec.device, coder.W_dec.dtype)
    mean = x.mean(0, dtype=torch.float64).to(x.dtype)
    variance = float(total((x - mean).square(), torch.float64)) / len(x)
    if not variance > 0:
        raise ValueError(f"data: the first {len(x)} rows are all the same: there is nothing to learn")
    centre = mean if config.centre_input else torch.zeros_like(mean)
    scale = 1 / math.sqrt(variance) if config.scale_input else 1.0
    if config.b_dec_init != "zero":
        coder.init_b_dec_((x - centre) * scale, config.b_dec_init)
    return Measured(centre, scale, (mean - centre) * scale, variance * scale**2)
