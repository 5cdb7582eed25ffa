# SPDX-License-Identifier: Apache-2.0
"""Sums that come out the same for any number of threads."""

from __future__ import annotations

import torch
from torch import Tensor

# Fewer than torch splits among threads.
_PART = 2**14


def total(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The sum of all of `x` ``[n, d]``, added up in an order that does not depend on the number of threads.

    Equivalent to: ``x.sum(dtype=dtype)``, which on a CPU adds up one part for each thread. A sum along one dimension
    keeps each of its sums on one thread, and so does a sum of few values.
    """
    rows = x.sum(-1, dtype=dtype)
    return torch.stack([part.sum() for part in rows.split(_PART)]).sum()
