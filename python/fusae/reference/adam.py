# SPDX-License-Identifier: Apache-2.0
"""The optimiser of rows in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from . import moments
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
    last_step: Tensor | None = None,
    master: Tensor | None = None,
    seed: int | None = None,
    first_row: int = 0,
) -> None:
    """One Adam step of the rows of `param` ``[m, d]`` in place. See `fusae.adam_rows_` for the formula."""
    acc = accumulator(param.dtype)
    m, d = param.shape
    lazy = last_step is not None
    if rows is not None:
        _check_rows(rows, m)
    touched = rows if rows is not None and (masked or lazy) else slice(None)
    if rows is None or masked or lazy:
        g = grad.to(acc)
    else:
        g = torch.zeros(param.shape, dtype=acc, device=param.device)
        g[rows] = grad.to(acc)
    weight = param if master is None else master
    w, square = weight[touched].to(acc), moments.read(exp_avg_sq[touched], d, signed=False)
    mean = moments.read(exp_avg[touched], d, signed=True) if exp_avg.numel() else torch.zeros_like(g)
    if project:
        length2 = (w * w).sum(-1, keepdim=True)
        g = g - torch.where(length2 > 0, (g * w).sum(-1, keepdim=True) / length2, 0.0) * w
    if weight_decay:
        if decoupled:
            w = w * (1 - lr * weight_decay)
        else:
            g = g + weight_decay * w
    keep = beta2
    if lazy:  # with the decay of the steps without a gradient, which was put off
        missed = (step - last_step[touched]).to(torch.float64)
        keep = (beta2**missed).to(acc)[:, None]
        last_step[touched] = step
    mean = mean + (g - mean) * (1 - beta1)
    square = keep * square + (1 - beta2) * g * g
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    # SparseAdam adds eps before the bias correction of the second moment, Adam after it.
    eps = eps / correction2**0.5 if masked else eps
    w = w - (lr / correction1) * mean / ((square / correction2).sqrt() + eps)
    if renormalise:
        length = w.norm(dim=-1, keepdim=True)
        w = torch.where(length > 0, w / length, w)
    lots = (None, None, None)
    if seed is not None:
        lots = moments.random_bits(seed, step, torch.arange(m, device=param.device)[touched] + first_row, d)
    if master is not None:
        master[touched] = w
    stochastic = seed is not None and master is None and param.dtype == torch.bfloat16
    param[touched] = moments.to_bfloat16(w, lots[2]) if stochastic else w.to(param.dtype)
    if exp_avg.numel():
        exp_avg[touched] = moments.write(mean, exp_avg.dtype, lots[0], signed=True)
    exp_avg_sq[touched] = moments.write(square, exp_avg_sq.dtype, lots[1], signed=False)
