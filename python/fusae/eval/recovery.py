# SPDX-License-Identifier: Apache-2.0
"""How alike two dictionaries are: against a known one (MMCS, MCC), and between training runs (PW-MCC).

Only directions count: rows are compared by cosine, so permuted or rescaled latents change nothing. A row of length 0
has cosine 0 with everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

# Rows compared at a time by `best_cosines`: bounds its scratch memory.
_CHUNK = 4096


def best_cosines(dictionary: Tensor, truth: Tensor) -> Tensor:
    """For every row of `truth`, its cosine with the closest row of `dictionary`.

    Args:
        dictionary: ``[m, d]`` decoder rows, any float dtype; compared in float32 (float64 where one is float64).
        truth: ``[t, d]`` true directions.

    Returns:
        ``[t]``, each in [-1, 1]. Several true directions may share one closest row.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Equivalent to: ``(normalize(truth, dim=1) @ normalize(dictionary, dim=1).T).amax(1)``
    """
    rows, directions = _unit_pair(dictionary, truth)
    return torch.cat([(part @ rows.T).amax(1) for part in directions.split(_CHUNK)]).clamp(-1, 1)


def mmcs(dictionary: Tensor, truth: Tensor) -> float:
    """Mean max cosine similarity: the mean of `best_cosines` (Sharkey et al. 2022). 1: every direction was found.

    One-sided: rows of `dictionary` that are no true direction cost nothing, and one row may serve many directions.
    """
    return float(best_cosines(dictionary, truth).double().mean())


def match(dictionary: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The one-to-one assignment of rows to true directions with the largest sum of ``|cos|`` (Hungarian algorithm).

    Args:
        dictionary: ``[m, d]``, as in `best_cosines`.
        truth: ``[t, d]``.

    Returns:
        ``(rows, directions, cosines)``, each ``[min(m, t)]``: row ``rows[i]`` of `dictionary` is matched with row
        ``directions[i]`` of `truth`; int64, int64, and the signed cosine. Ordered by direction.

    Holds all ``[m, t]`` cosines in float64. Time is cubic at worst: 2 s for two random dictionaries of 4,000 rows.

    Raises:
        ImportError: scipy is not installed.
        TypeError, ValueError: as `best_cosines`.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError(f"matching dictionaries needs scipy ({error}): pip install 'fusae[match]'") from error
    rows, directions = _unit_pair(dictionary, truth)
    cosines = (directions @ rows.T).clamp(-1, 1).cpu()
    matched = linear_sum_assignment(cosines.abs().double().numpy(), maximize=True)
    found, latents = (torch.from_numpy(side).long() for side in matched)  # scipy orders by the first axis, directions
    return latents, found, cosines[found, latents]


def mcc(dictionary: Tensor, truth: Tensor) -> float:
    """Mean correlation coefficient: the mean ``|cos|`` of `match`, over the ``min(m, t)`` matched pairs.

    Symmetric. A sign does not count (a top-k latent cannot be negative, an AbsTopK or ICA component can).
    """
    return float(match(dictionary, truth)[2].abs().double().mean())


def pw_mcc(dictionaries: Sequence[Tensor]) -> float:
    """Pairwise MCC: the mean `mcc` over all pairs of dictionaries ``[m, d]``, say of runs that differ in their seed.

    How much of what was found does not depend on the run (Song et al. 2025, arXiv:2505.20254).
    """
    if len(dictionaries) < 2:
        raise ValueError(f"dictionaries must be at least two, got {len(dictionaries)}")
    scores = [mcc(a, b) for a, b in combinations(dictionaries, 2)]
    return sum(scores) / len(scores)


def _unit_pair(dictionary: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Both with rows of unit length, in one dtype and on one device."""
    for name, rows in (("dictionary", dictionary), ("truth", truth)):
        if not isinstance(rows, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(rows).__name__}")
        if rows.ndim != 2 or 0 in rows.shape:
            raise ValueError(f"{name} must have shape [rows, d] with at least one row, got {list(rows.shape)}")
        if not rows.is_floating_point():
            raise TypeError(f"{name} must be of a float dtype, got {rows.dtype}")
    if dictionary.shape[1] != truth.shape[1]:
        raise ValueError(
            f"dictionary must have rows of the width of truth, {truth.shape[1]}, got {dictionary.shape[1]} "
            "(transposed?)"
        )
    wide = torch.float64 if torch.float64 in (dictionary.dtype, truth.dtype) else torch.float32
    return _unit("dictionary", dictionary, wide, dictionary.device), _unit("truth", truth, wide, dictionary.device)


def _unit(name: str, rows: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Normalised in float64: the squares of small float32 values underflow.
    wide = rows.detach().to(device, torch.float64)
    length = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    if not torch.isfinite(length).all():
        bad = (~torch.isfinite(length)).nonzero()[:, 0]
        raise ValueError(f"{name} holds NaN or infinite values in {len(bad)} rows (the first is row {int(bad[0])})")
    return torch.where(length > 0, wide / length, 0.0).to(dtype)
