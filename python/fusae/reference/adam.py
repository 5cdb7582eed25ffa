# SPDX-License-Identifier: Apache-2.0
"""The optimiser of rows in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .sums import accumulator


def _check_rows(rows: Tensor, m: int) -> None:
    """A sparse gradient is not checked when it is built: its rows may be out of range, unordered or repeated."""
    if rows.numel() and (int(rows[0]) < 0 or int(rows[-1]) >= m or not bool((rows[1:] > rows[:-1]).all())):
        raise IndexError(
            f"grad: rows must lie in [0, {m}) and ascend, each once, got {rows.numel()} rows from "
            f"{int(rows.min())} to {int(rows.max())}; build the gradient with check_invariants=True, or coalesce it"
        )


def adam_rows_(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    rows: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    decoupled: bool,
    masked: bool,
    project: bool,
    renormalise: bool,
) -> None:
    """One Adam step of the rows of `param` ``[m, d]`` in place. See `fusae.adam_rows_` for the formula."""
    acc = accumulator(param.dtype)
    if rows is not None:
        _check_rows(rows, param.shape[0])
    touched = slice(None) if rows is None or not masked else rows
    if rows is None or masked:
        g = grad.to(acc)
    else:
        g = torch.zeros(param.shape, dtype=acc, device=param.device)
        g[rows] = grad.to(acc)
    w, mean, square = param[touched].to(acc), exp_avg[touched].to(acc), exp_avg_sq[touched].to(acc)
    if project:
        length2 = (w * w).sum(-1, keepdim=True)
        g = g - torch.where(length2 > 0, (g * w).sum(-1, keepdim=True) / length2, 0.0) * w
    if weight_decay:
        if decoupled:
            w = w * (1 - lr * weight_decay)
        else:
            g = g + weight_decay * w
    mean = mean + (g - mean) * (1 - beta1)
    square = beta2 * square + (1 - beta2) * g * g
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    # SparseAdam adds eps before the bias correction of the second moment, Adam after it.
    eps = eps / correction2**0.5 if masked else eps
    w = w - (lr / correction1) * mean / ((square / correction2).sqrt() + eps)
    if renormalise:
        length = w.norm(dim=-1, keepdim=True)
        w = torch.where(length > 0, w / length, w)
    param[touched] = w.to(param.dtype)
    exp_avg[touched] = mean.to(exp_avg.dtype)
    exp_avg_sq[touched] = square.to(exp_avg_sq.dtype)
