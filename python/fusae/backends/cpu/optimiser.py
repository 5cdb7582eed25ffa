# SPDX-License-Identifier: Apache-2.0
"""The optimiser of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .native import _C, DTYPES, ptr

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
    grad = grad.contiguous()
    u = 0 if rows is None else len(rows)
    # The address of an empty tensor is 0, which would stand for "not given": a gradient of no rows is still row-sparse.
    rows = None if rows is None else rows.contiguous() if u else torch.zeros(1, dtype=torch.int64)
    m, d = param.shape
    root_correction2 = (1 - beta2**step) ** 0.5
    kinds = [_MOMENTS[moment.dtype] for moment in (exp_avg, exp_avg_sq)]
    stochastic = seed is not None and master is None and param.dtype == torch.bfloat16
    key = ((seed or 0) + step * 0x9E3779B97F4A7C15) % 2**64
    _C.adam_rows(
        *map(ptr, (param, exp_avg, exp_avg_sq, grad, rows)), DTYPES[param.dtype], m, d, u,
        1 - lr * weight_decay if decoupled else 1.0, 0.0 if decoupled else weight_decay, 1 - beta1, beta2, 1 - beta2,
        lr / (1 - beta1**step), root_correction2, eps / root_correction2 if masked else eps, masked, project,
        renormalise, torch.get_num_threads(),
        (*kinds, ptr(last_step), step, ptr(master), stochastic, key, first_row),
    )  # fmt: skip
