# SPDX-License-Identifier: Apache-2.0
"""Starting points: unit rows, the centre of the data, thresholds and firing rates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _checks, _fields
from .sums import total

if TYPE_CHECKING:
    from .coder import SparseCoder

# Rows worked on together: bounds the scratch memory beside a large matrix.
_CHUNK = 4096


@torch.no_grad()
def unit_rows_(weight: Tensor) -> Tensor:
    """Scale every row of `weight` ``[m, d]`` to unit length, in place; norms in float32. A row of length 0 stays.

    Equivalent to: ``weight /= weight.norm(dim=1, keepdim=True)``
    """
    acc = _checks.accumulator(weight.dtype)
    for rows in weight.split(_CHUNK):
        wide = rows.to(acc)
        length = wide.norm(dim=1, keepdim=True)
        rows.copy_(torch.where(length > 0, wide / length, wide))
    return weight


@torch.no_grad()
def random_unit_rows_(weight: Tensor, seed: int, first: int = 0, m: int | None = None) -> Tensor:
    """Fill `weight` ``[m, d]`` with random directions: a function of `seed` and shape, the same on every device.

    `first`, `m`: where `weight` is but the rows from `first` on of a matrix of `m`, those rows of it. The ones before
    are drawn too, a few at a time.
    """
    generator = torch.Generator().manual_seed(seed)
    wide, (count, d) = _checks.accumulator(weight.dtype), weight.shape
    m = count if m is None else m
    for start in range(0, first + count, _CHUNK):
        rows = torch.randn(min(_CHUNK, m - start), d, generator=generator, dtype=wide)
        low, high = max(start, first), min(start + len(rows), first + count)
        if low < high:
            weight[low - first : high - first].copy_(unit_rows_(rows[low - start : high - start]))
    return weight


@torch.no_grad()
def geometric_median(x: Tensor, max_iterations: int = 100, tolerance: float = 1e-5) -> Tensor:
    """The point with the least sum of distances to the rows of `x`, by Weiszfeld's iteration.

    Args:
        x: ``[n, d]`` rows, all finite; worked on in float32 (float64 for float64 rows).
        max_iterations: most iterations.
        tolerance: stop when a step is shorter than this times the mean distance of the rows.

    Returns:
        ``[d]`` float32 (float64 for float64 rows).

    Raises:
        ValueError: `x` has no rows, or rows that are not finite.
    """
    if x.ndim != 2 or x.shape[0] == 0:
        raise ValueError(f"x must have shape [n, d] with at least one row, got {list(x.shape)}")
    x = x.to(_checks.accumulator(x.dtype))
    median = x.mean(0)
    if not torch.isfinite(median).all():
        bad = (~torch.isfinite(x).all(1)).sum()
        raise ValueError(f"x must be finite, got {int(bad)} of {x.shape[0]} rows with NaN or infinite values")
    for _ in range(max_iterations):
        distance = torch.linalg.vector_norm(x - median, dim=1)
        mean = total(distance[:, None]) / len(x)
        # A row that coincides with the estimate would get infinite weight.
        weight = 1 / distance.clamp_min(1e-6 * mean)
        step = (weight @ x) / total(weight[:, None]) - median
        if mean == 0:
            break
        median = median + step
        if step.norm() <= tolerance * mean:
            break
    return median


@torch.no_grad()
def init_thresholds_(coder: SparseCoder, value: float) -> SparseCoder:
    """Set all trained thresholds of `coder` to `value` (at least 0).

    Published, for rows of unit mean squared norm: 0.001 (Gemma Scope, dictionary_learning), with decoder rows of unit
    norm, ``W_enc = W_dec`` and biases 0, which is how a coder starts; 0.1 / √d (Anthropic, January 2025 update).
    """
    _thresholded(coder)
    coder.threshold.fill_(_fields.number("value", value))
    return coder


@torch.no_grad()
def init_firing_rate_(coder: SparseCoder, x: Tensor, rate: float) -> SparseCoder:
    """Set `b_enc` so that every latent of a ReLU or JumpReLU coder fires in a share `rate` of the rows `x` ``[n, d]``.

    Anthropic, January 2025 update: rate 10,000 / m, with elements of `W_enc` uniform in ±1 / √d
    (`init_uniform_encoder_`) and thresholds of 0.1 / √d. There have to be rows that fire and rows that do not. Works on
    4096 latents at a time. With `select_by_norm`, a latent of decoder norm 0 has the score 0 whatever its bias.
    """
    _thresholded(coder, relu=True)
    coder.check_input(x)
    if x.ndim != 2 or x.shape[0] == 0:
        raise ValueError(f"x must have shape [n, {coder.config.d}] with at least one row, got {list(x.shape)}")
    count = round(_fields.number("rate", rate, high=1.0, above=True) * len(x))
    if not 1 <= count < len(x):
        raise ValueError(f"rate must be between 1 / {len(x)} and 1 - 1 / {len(x)} with as many rows, got {rate}")
    acc = _checks.accumulator(x.dtype)
    inputs = (x - coder.b_dec if coder.config.pre_bias else x).to(acc)
    threshold = coder.threshold if coder.config.select == "threshold" else torch.zeros_like(coder.b_enc)
    if coder.config.select_by_norm:  # pre · norm is what is compared
        norms = coder.decoder_norms()
        threshold = threshold / torch.where(norms > 0, norms, 1.0)
    for W, b, limit in zip(*(t.split(_CHUNK) for t in (coder.W_enc, coder.b_enc, threshold)), strict=True):
        best = (W.to(acc) @ inputs.T).topk(count + 1, dim=1).values
        b.copy_(limit - (best[:, -2] + best[:, -1]) / 2)
    return coder


@torch.no_grad()
def init_uniform_encoder_(coder: SparseCoder, seed: int = 0) -> SparseCoder:
    """Fill `W_enc` ``[m, d]`` uniformly in ±1 / √d (Anthropic, January 2025 update); the same on every device."""
    uniform_(coder.W_enc, coder.config.d**-0.5, _fields.whole("seed", seed))
    return coder


@torch.no_grad()
def uniform_(weight: Tensor, bound: float, seed: int) -> Tensor:
    """Fill `weight` ``[m, d]`` uniformly in ±`bound`: a function of `seed` and shape, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    wide = _checks.accumulator(weight.dtype)
    for rows in weight.split(_CHUNK):
        rows.copy_((torch.rand(rows.shape, generator=generator, dtype=wide) * 2 - 1) * bound)
    return weight


def _thresholded(coder: SparseCoder, relu: bool = False) -> None:
    selects = ("threshold", "relu") if relu else ("threshold",)
    if coder.config.select not in selects:
        wanted = " or ".join(map(repr, selects))
        raise ValueError(f"coder must have select {wanted}, got {coder.config.select!r}")
