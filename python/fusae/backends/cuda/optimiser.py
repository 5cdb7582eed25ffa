# SPDX-License-Identifier: Apache-2.0
"""The optimiser of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .native import DTYPES, module, ptr, stream, table, why_not

_MOMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}


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
    m, d = param.shape
    u = 0 if rows is None else len(rows)
    if rows is not None:
        _check_rows(rows, m)
        # The address of an empty tensor is 0, which would stand for "not given".
        rows = rows.contiguous() if u else torch.zeros(1, dtype=torch.int64, device=param.device)
    grad = grad.contiguous()
    root_correction2 = (1 - beta2**step) ** 0.5
    kinds = [_MOMENTS[moment.dtype] for moment in (exp_avg, exp_avg_sq)]
    stochastic = seed is not None and master is None and param.dtype == torch.bfloat16
    key = ((seed or 0) + step * 0x9E3779B97F4A7C15) % 2**64
    module().adam_rows(
        *map(ptr, (param, exp_avg, exp_avg_sq, grad, rows)), DTYPES[param.dtype], m, d, u,
        1 - lr * weight_decay if decoupled else 1.0, 0.0 if decoupled else weight_decay, 1 - beta1, beta2, 1 - beta2,
        # SparseAdam adds eps before the bias correction of the second moment, Adam after it.
        lr / (1 - beta1**step), root_correction2, eps / root_correction2 if masked else eps, masked, project,
        renormalise, (*kinds, ptr(last_step), step, ptr(master), stochastic, key, first_row), stream(param),
    )  # fmt: skip


def _check_rows(rows: Tensor, m: int) -> None:
    """One host sync, beside the one that it took to know how many rows the gradient has."""
    if not rows.numel():
        return
    fine = (rows[0] >= 0) & (rows[-1] < m) & (rows[1:] > rows[:-1]).all()
    if not bool(fine):
        raise IndexError(
            f"grad: rows must lie in [0, {m}) and ascend, each once, got {rows.numel()} rows from "
            f"{int(rows.min())} to {int(rows.max())}; build the gradient with check_invariants=True, or coalesce it"
        )


def _why_not(*args: Any, **kwargs: Any) -> str | None:
    if (reason := why_not(*args, **kwargs)) is not None:
        return reason
    d, renormalise = args[0].shape[1], kwargs["renormalise"] if "renormalise" in kwargs else args[14]
    if renormalise and 4 * d > 96 * 1024:
        return f"rows of at most 24576 elements are renormalised in shared memory, got {d}"
    return None


TABLE = table(adam_rows_, why=_why_not)
