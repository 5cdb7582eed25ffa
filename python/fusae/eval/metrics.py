# SPDX-License-Identifier: Apache-2.0
"""How well sparse codes reconstruct: streaming metrics that add up over batches and merge over workers.

All sums are float64. Variance is taken about the mean of the whole data set, never of a batch: a batch mean fits its
own few rows and flatters the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor


class Codes(Protocol):
    """`fusae.SparseCodes`, or anything with its fields: fixed width ``[n, k]`` or ragged ``[nnz]`` with `offsets`."""

    values: Tensor
    indices: Tensor
    offsets: Tensor | None


class ReconstructionMetrics:
    """FVU, cosine, L0, density and dead latents over any number of batches.

    With rows x, reconstructions x̂ and the mean row x̄ of all rows seen:

    ======================  ===================================================================================
    ``tokens``              rows seen
    ``fvu``                 fraction of variance unexplained, Σ‖x − x̂‖² / Σ‖x − x̄‖² (NaN if all rows are equal)
    ``explained_variance``  1 − fvu
    ``mse``                 Σ‖x − x̂‖² / (tokens · d)
    ``cosine``              mean of cos(x, x̂); a zero vector counts as 0
    ``l2_ratio``            mean of ‖x̂‖ / ‖x‖ over rows with x ≠ 0; below 1 means shrinkage
    ``relative_bias``       Σ‖x̂‖² / Σ x·x̂; below 1: every reconstruction would be better somewhat longer (Rajamanoharan
                            et al. 2024, arXiv 2404.16014); NaN where Σ x·x̂ is 0
    ``l0``                  active latents a row, on average; active means value ≠ 0
    ``latents``             m
    ``dead_latents``        latents active on no row seen
    ``dead_fraction``       dead_latents / m
    ``over_10_percent``     latents active on more than 10 % of the rows
    ``below_1e_5``          latents active on less than 1 in 100,000 rows, the dead included
    ``density_histogram``   ``{"log10_from", "log10_step", "counts"}``: live latents by log10 of their density, in bins
                            that are the same for every data set, so that counts of several runs can be compared; the
                            first bin also takes what is rarer
    ``density``             [m], share of rows on which each latent is active
    ======================  ===================================================================================

    Equivalent to (with all rows at once, in float64)::

        fvu = (x - reconstruction).square().sum() / (x - x.mean(0)).square().sum()
        density = (dense_codes != 0).double().mean(0)
    """

    def __init__(self, latents: int) -> None:
        if not isinstance(latents, int) or latents < 1:
            raise ValueError(f"latents must be an integer of at least 1, got {latents!r}")
        self.latents = latents
        self.tokens = 0
        self._fired = torch.zeros(latents, dtype=torch.int64)
        self._mean: Tensor | None = None  # [d], running mean row
        self._centred = 0.0  # Σ‖x − mean‖²
        self._error = self._cosine = self._ratio = 0.0
        self._squared = self._product = 0.0  # Σ‖x̂‖², Σ x·x̂
        self._nonzero_rows = 0

    def update(self, x: Tensor, reconstruction: Tensor, codes: Codes) -> ReconstructionMetrics:
        """Add rows `x` ``[..., d]``, their reconstruction (same shape) and their codes; returns self."""
        if x.shape != reconstruction.shape:
            raise ValueError(
                f"reconstruction must have the shape of x, {list(x.shape)}, got {list(reconstruction.shape)}"
            )
        width = x.shape[-1]
        if self._mean is not None and width != self._mean.shape[0]:
            raise ValueError(f"x must have width {self._mean.shape[0]} as before, got {width}")
        x = x.detach().reshape(-1, width).double()
        reconstruction = reconstruction.detach().reshape(-1, width).double()
        n = x.shape[0]
        indices = _active_indices(codes, n)
        if indices.numel() and not (0 <= int(indices.min()) and int(indices.max()) < self.latents):
            raise ValueError(
                f"codes.indices must lie in 0..{self.latents - 1}, got {int(indices.min())} to {int(indices.max())}"
            )
        if n == 0:
            return self
        self._fired += torch.bincount(indices, minlength=self.latents).cpu()
        self._error += float((x - reconstruction).square().sum())
        norm, other = x.norm(dim=1), reconstruction.norm(dim=1)
        product = norm * other
        along = (x * reconstruction).sum(1)
        self._cosine += float(torch.where(product == 0, 0.0, along / product).sum())
        self._squared += float(other.square().sum())
        self._product += float(along.sum())
        self._ratio += float(torch.where(norm == 0, 0.0, other / norm).sum())
        self._nonzero_rows += int((norm != 0).sum())
        mean = x.mean(0)
        self._add_rows(n, mean.cpu(), float((x - mean).square().sum()))
        return self

    def _add_rows(self, n: int, mean: Tensor, centred: float) -> None:
        # Chan et al. 1983: the pieces are centred first, so a large common offset cancels nothing.
        if self._mean is None:
            self._mean, self._centred, self.tokens = mean, centred, n
            return
        total, shift = self.tokens + n, mean - self._mean
        self._centred += centred + float(shift.square().sum()) * self.tokens * n / total
        self._mean = self._mean + shift * (n / total)
        self.tokens = total

    def merge(self, other: ReconstructionMetrics) -> ReconstructionMetrics:
        """Add what `other` has seen (of the same dictionary), as if its batches had come here; returns self."""
        if other.latents != self.latents:
            raise ValueError(f"other must be of {self.latents} latents, got {other.latents}")
        if other._mean is None:
            return self
        if self._mean is not None and self._mean.shape != other._mean.shape:
            raise ValueError(f"other must be of width {self._mean.shape[0]}, got {other._mean.shape[0]}")
        self._fired = self._fired + other._fired
        self._error += other._error
        self._cosine += other._cosine
        self._ratio += other._ratio
        self._squared += other._squared
        self._product += other._product
        self._nonzero_rows += other._nonzero_rows
        self._add_rows(other.tokens, other._mean, other._centred)
        return self

    def mean(self) -> Tensor:
        """The mean row ``[d]``, float64."""
        self._require_rows()
        return self._mean.clone()

    def result(self) -> dict[str, Any]:
        """The metrics as plain numbers (JSON); raises `ValueError` if no row was seen."""
        self._require_rows()
        fvu = self._error / self._centred if self._centred > 0 else float("nan")
        dead = int((self._fired == 0).sum())
        density = self._fired.double() / self.tokens
        return {
            "tokens": self.tokens,
            "fvu": fvu,
            "explained_variance": 1.0 - fvu,
            "mse": self._error / (self.tokens * self._mean.shape[0]),
            "cosine": self._cosine / self.tokens,
            "l2_ratio": self._ratio / self._nonzero_rows if self._nonzero_rows else float("nan"),
            "relative_bias": self._squared / self._product if self._product else float("nan"),
            "l0": int(self._fired.sum()) / self.tokens,
            "latents": self.latents,
            "dead_latents": dead,
            "dead_fraction": dead / self.latents,
            "over_10_percent": int((density > 0.1).sum()),
            "below_1e_5": int((density < 1e-5).sum()),
            "density_histogram": density_histogram(density),
            "density": density.tolist(),
        }

    def _require_rows(self) -> None:
        if self._mean is None:
            raise ValueError("no rows were seen: call update() first")


def density_histogram(density: Tensor) -> dict[str, Any]:
    """`ReconstructionMetrics`' histogram of the densities ``[m]`` above 0: quarters of a power of ten, 1e-8 to 1."""
    low, step, bins = -8.0, 0.25, 32
    live = density[density > 0]
    place = ((live.log10() - low) / step).floor().long().clamp(0, bins - 1)
    counts = torch.bincount(place, minlength=bins).tolist()
    return {"log10_from": low, "log10_step": step, "counts": counts}


def measure(
    rows: Any,
    encode: Callable[[Tensor], Codes],
    decode: Callable[..., Tensor],
    latents: int,
    *,
    split: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    batch_size: int = 4096,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> ReconstructionMetrics:
    """`ReconstructionMetrics` of a dictionary over all of some rows, with a progress bar.

    Args:
        rows: something with a length and ``take(slice)`` (`fusae.data.Activations`, `fusae.train.Rows`), or an iterable
            of batches ``[n, d]``. Rows with NaN or infinite values are an error.
        encode: maps rows ``[n, d]`` (fp32) to codes.
        decode: maps codes to ``[n, d]``.
        latents: m.
        split: for transcoders: maps rows to (input, target). `encode` is then given the input, `decode` (codes, input),
            and the metrics are those of the target.
    """
    from ..data.progress import token_progress

    metrics = ReconstructionMetrics(latents)
    with token_progress(progress) as bar, torch.inference_mode():
        task = bar.add_task("reconstruction", total=len(rows))
        for x in _batches(rows, batch_size):
            if not torch.isfinite(x.sum()) and not torch.isfinite(x).all():
                bad = int((~torch.isfinite(x).all(1)).sum())
                raise ValueError(f"rows: {bad} of rows {metrics.tokens} to {metrics.tokens + len(x) - 1} hold NaN or "
                                 "infinite values; leave such rows out")  # fmt: skip
            x = x.to(device)
            bar.update(task, advance=x.shape[0])
            if split is None:
                codes = encode(x)
                metrics.update(x, decode(codes), codes)
            else:
                x, target = split(x)
                codes = encode(x)
                metrics.update(target, decode(codes, x), codes)
    return metrics


def _batches(rows: Any, batch_size: int) -> Iterator[Tensor]:
    if not hasattr(rows, "take"):
        yield from rows
        return
    for start in range(0, len(rows), batch_size):
        yield rows.take(slice(start, start + batch_size))


def _active_indices(codes: Codes, n: int) -> Tensor:
    """The latent of every active entry, int64 ``[entries]``."""
    values, indices = codes.values.detach(), codes.indices
    offsets = getattr(codes, "offsets", None)
    if offsets is not None:
        rows = offsets.shape[0] - 1
        values, indices = values[: int(offsets[-1])], indices[: int(offsets[-1])]  # storage may be longer
    else:
        rows = values.numel() // max(values.shape[-1], 1)
    if rows != n:
        raise ValueError(f"codes must have {n} rows as x, got {rows}")
    return indices[values != 0].reshape(-1).long()
