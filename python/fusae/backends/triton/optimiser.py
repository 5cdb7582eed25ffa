# SPDX-License-Identifier: Apache-2.0
"""The optimiser of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels import adam_rows as kernels
from .available import table, why_not


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
    last_step: None = None,
    master: None = None,
    seed: int | None = None,
    first_row: int = 0,
) -> None:
    if rows is not None:
        _check_rows(rows, param.shape[0])
    root_correction2 = (1 - beta2**step) ** 0.5
    numbers = kernels.Step(
        decay=1 - lr * weight_decay if decoupled else 1.0,
        l2=0.0 if decoupled else weight_decay,
        rise=1 - beta1,
        beta2=beta2,
        add2=1 - beta2,
        step_size=lr / (1 - beta1**step),
        root_correction2=root_correction2,
        # SparseAdam adds eps before the bias correction of the second moment, Adam after it.
        eps=eps / root_correction2 if masked else eps,
    )
    kernels.adam_rows_(param, exp_avg, exp_avg_sq, grad, rows, numbers, masked, project, renormalise)


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
    """Only the modes that there is a kernel for: moments in float32, rounding to nearest, every step taken at once."""
    if (reason := why_not(*args, **kwargs)) is not None:
        return reason
    param, exp_avg, exp_avg_sq = args[:3]
    last_step, master, seed = (*args[15:18], *(None,) * 3)[:3]
    if exp_avg.dtype != torch.float32 or exp_avg_sq.dtype != torch.float32 or not exp_avg.numel() == param.numel():
        return "moments must be float32 and both there"
    if kwargs.get("last_step", last_step) is not None:
        return "there is no kernel of lazy steps"
    if kwargs.get("master", master) is not None:
        return "there is no kernel of 16-bit weights with a master"
    if kwargs.get("seed", seed) is not None and param.dtype == torch.bfloat16:
        return "there is no kernel of stochastic rounding"
    return None


TABLE = table(adam_rows_, why=_why_not)
