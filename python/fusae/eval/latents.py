# SPDX-License-Identifier: Apache-2.0
"""What is said of a single latent besides its passages: how its activations are spread, and which latents are alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class ActivationHistograms:
    """Histograms of the activations of some latents: equal bins from 0 to a power of two, over any number of batches.

    The range of a latent doubles when a value does not fit, and then pairs of bins become one. So every histogram is
    that of all values, however they were split into batches, and two objects merge exactly. Values count by their size;
    0 and what is not finite do not count.
    """

    def __init__(self, latents: int, bins: int = 64) -> None:
        if latents < 0 or bins < 2 or bins % 2:
            raise ValueError(f"latents must be at least 0 and bins even and at least 2, got {latents} and {bins}")
        self.bins = bins
        self.counts = np.zeros((latents, bins), dtype=np.int64)
        self._exponent = np.full(latents, -126)  # the range ends at 2 ** this

    def update(self, values: np.ndarray) -> ActivationHistograms:
        """Add dense activations ``[rows, latents]``; returns self."""
        if values.ndim != 2 or values.shape[1] != len(self.counts):
            raise ValueError(f"values must have shape [rows, {len(self.counts)}], got {list(values.shape)}")
        rows, columns = np.nonzero(np.isfinite(values) & (values != 0))
        sizes = np.abs(values[rows, columns].astype(np.float64))
        if not len(sizes):
            return self
        # 2 ** exponent is above the value: frexp gives a mantissa below 1.
        self._widen(columns, np.frexp(sizes)[1])
        place = np.floor(np.ldexp(sizes, -self._exponent[columns]) * self.bins).astype(np.int64)
        flat = np.bincount(columns * self.bins + place, minlength=self.counts.size)
        self.counts += flat.reshape(self.counts.shape)
        return self

    def merge(self, other: ActivationHistograms) -> ActivationHistograms:
        """Add what `other` has seen of the same latents; returns self. `other` may end with wider bins."""
        if other.counts.shape != self.counts.shape:
            raise ValueError(f"other must have counts {list(self.counts.shape)}, got {list(other.counts.shape)}")
        every = np.arange(len(self.counts))
        self._widen(every, other._exponent)
        other._widen(every, self._exponent)
        self.counts += other.counts
        return self

    def _widen(self, columns: np.ndarray, exponents: np.ndarray) -> None:
        wanted = self._exponent.copy()
        np.maximum.at(wanted, columns, exponents)
        for latent in np.flatnonzero(wanted > self._exponent):
            if self.counts[latent].any():
                for _ in range(int(wanted[latent] - self._exponent[latent])):
                    pairs = self.counts[latent].reshape(-1, 2).sum(1)
                    self.counts[latent] = np.concatenate([pairs, np.zeros_like(pairs)])
        self._exponent = wanted

    def result(self) -> list[dict[str, Any]]:
        """One ``{"width": of a bin, "counts": [from 0 on, without the empty bins at the end]}`` a latent."""
        out = []
        for counts, exponent in zip(self.counts, self._exponent, strict=True):
            used = np.flatnonzero(counts)
            end = int(used[-1]) + 1 if len(used) else 0
            width = math.ldexp(1.0, int(exponent)) / self.bins if end else 0.0
            out.append({"width": width, "counts": counts[:end].tolist()})
        return out


def nearest_latents(W_dec: Tensor, latents: Sequence[int], top: int = 5) -> list[list[dict[str, Any]]]:
    """The latents whose decoder rows point most nearly where each of `latents` does.

    Args:
        W_dec: ``[m, d]``, any floating dtype; compared in fp32.
        latents: which ones.
        top: how many others for each (fewer if m is smaller).

    Returns one list a latent, nearest first, of ``{"latent": int, "cosine": float}``; a zero row has cosine 0.

    Equivalent to::

        cosine = torch.nn.functional.normalize(W_dec) @ torch.nn.functional.normalize(W_dec[latents]).T
        nearest = cosine.topk(top, dim=0)  # less the latent itself
    """
    if W_dec.ndim != 2:
        raise ValueError(f"W_dec must have shape [m, d], got {list(W_dec.shape)}")
    m = W_dec.shape[0]
    if top < 0 or any(not 0 <= latent < m for latent in latents):
        raise ValueError(f"top must be at least 0 and latents lie in 0..{m - 1}, got {top} and {list(latents)}")
    result = []
    with torch.inference_mode():
        unit = torch.nn.functional.normalize(W_dec.detach().float(), dim=1)
        for part in torch.tensor(list(latents), dtype=torch.int64, device=W_dec.device).split(64):
            cosine = unit[part] @ unit.T  # 64 rows at a time: [latents, m] may be large
            cosine[torch.arange(len(part)), part] = -math.inf
            values, indices = cosine.topk(min(top, m - 1), dim=1)
            result += [
                [{"latent": j, "cosine": c} for j, c in zip(js, cs, strict=True)]
                for js, cs in zip(indices.tolist(), values.tolist(), strict=True)
            ]
    return result
