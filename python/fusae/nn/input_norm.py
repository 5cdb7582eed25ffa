# SPDX-License-Identifier: Apache-2.0
"""Normalisation of every row by itself, which some dictionaries apply to their input and undo in the output."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .. import _checks
from .config import SparseCoderConfig

_EPS = 1e-5  # added to the standard deviation, and not undone: as OpenAI's code and SAELens have it


@dataclasses.dataclass(frozen=True)
class InputNorm:
    """``normalise(x) = (x - mean) / divisor``, ``restore(y) = y · scale + mean``; each ``[..., 1]``, None: left out."""

    mean: Tensor | None = None
    divisor: Tensor | None = None
    scale: Tensor | None = None

    @classmethod
    def of(cls, config: SparseCoderConfig, x: Tensor | None) -> InputNorm:
        """Of the rows `x` ``[..., d]``, as ``config.input_norm`` says; statistics in the accumulator of their dtype."""
        if config.input_norm == "none":
            return cls()
        x = x.to(_checks.accumulator(x.dtype))
        if config.input_norm == "rms":
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / config.d**0.5
            return cls(None, norm, norm)
        std, mean = torch.std_mean(x, dim=-1, keepdim=True)
        return cls(mean, std + _EPS, std)

    def normalise(self, x: Tensor) -> Tensor:
        if self.divisor is None:
            return x
        return ((x if self.mean is None else x - self.mean) / self.divisor).to(x.dtype)

    def restore(self, y: Tensor) -> Tensor:
        if self.scale is None:
            return y
        restored = y * self.scale.reshape(*y.shape[:-1], 1)
        return (restored if self.mean is None else restored + self.mean.reshape(*y.shape[:-1], 1)).to(y.dtype)
