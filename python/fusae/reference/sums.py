# SPDX-License-Identifier: Apache-2.0
"""What the references share: the dtype and the order of sums, the order of selection, the entries of codes."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over inputs of `dtype` are taken."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def largest(score: Tensor, k: int) -> Tensor:
    """Indices of the k largest of every row ``[n, k]``, in the order of selection."""
    return torch.sort(score, dim=-1, descending=True, stable=True).indices[:, :k]


def activate(pre: Tensor, activation: str) -> Tensor:
    """'relu' maps everything ``<= 0`` to +0 and keeps NaN; 'none' is the identity."""
    return pre.masked_fill(pre <= 0, 0.0) if activation == "relu" else pre


def rows_of(indices: Tensor, offsets: Tensor | None) -> tuple[Tensor, slice]:
    """Row of every stored entry (flat), and the slice of the storage that is in use."""
    if offsets is None:
        n, k = indices.shape
        return torch.arange(n, device=indices.device).repeat_interleave(k), slice(None)
    used, width = int(offsets[-1]), offsets[1:] - offsets[:-1]
    if int(offsets[0]) != 0 or used > indices.shape[0] or bool((width < 0).any()):
        raise IndexError(
            f"offsets must rise from 0 to at most the storage of {indices.shape[0]} entries, "
            f"got {int(offsets[0])} to {used}" + (", falling between" if bool((width < 0).any()) else "")
        )
    return torch.repeat_interleave(torch.arange(width.shape[0], device=indices.device), width), slice(0, used)


def weighted_rows(coef: Tensor, rows: Tensor) -> Tensor:
    """``coef[i] * rows[i]``, exactly zero where the coefficient is zero (also beside an infinite row)."""
    return (coef[:, None] * rows).masked_fill((coef == 0)[:, None], 0.0)


def latent_sums(
    coef: Tensor, indices: Tensor, rows: Tensor, m: int, dtype: torch.dtype, row_sparse: bool
) -> tuple[Tensor, Tensor]:
    """``out[j] = sum of coef[i] * rows[i] over the entries i of latent j``; touched latents only, with `row_sparse`."""
    total = rows.new_zeros(m, rows.shape[1])
    total.index_add_(0, indices, weighted_rows(coef, rows))
    if not row_sparse:
        return indices.new_empty(0), total.to(dtype)
    touched = torch.unique(indices[coef != 0])
    return touched, total[touched].to(dtype)
