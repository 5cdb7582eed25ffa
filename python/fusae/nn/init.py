# SPDX-License-Identifier: Apache-2.0
"""Starting points: unit rows, and the centre of the data."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from .sums import total

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
def random_unit_rows_(weight: Tensor, seed: int) -> Tensor:
    """Fill `weight` ``[m, d]`` with random directions: a function of `seed` and shape, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    wide = _checks.accumulator(weight.dtype)
    for rows in weight.split(_CHUNK):
        rows.copy_(unit_rows_(torch.randn(rows.shape, generator=generator, dtype=wide)))
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
