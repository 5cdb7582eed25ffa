# SPDX-License-Identifier: Apache-2.0
"""Cases of `adam_rows_`."""

from __future__ import annotations

from typing import Any

import torch

from .case import ALL, BF16, FP16, FP32, FP64, Case


def adam_rows_(m: int, d: int, name: str = "", *, sparse: float | None = None, masked: bool = False, step: int = 7,
               zero_rows: bool = False, **options: Any) -> Case:  # fmt: skip
    """``fusae.adam_rows_``. `sparse`: share of rows in a sparse gradient, or None for a dense one; the other keywords
    (betas, eps, weight_decay, decoupled, project, renormalise) go to the op."""
    call = {key: options.pop(key) for key in tuple(options)
            if key in ("betas", "eps", "weight_decay", "decoupled", "project", "renormalise")}  # fmt: skip

    def make(dtype, gen, device):
        state = FP64 if dtype == FP64 else FP32
        param = torch.randn(m, d, generator=gen, dtype=FP64)
        param /= param.norm(dim=1, keepdim=True)
        if zero_rows:
            param[::4] = 0.0
        first = step == 1
        exp_avg = torch.randn(m, d, generator=gen, dtype=FP64) * (0.0 if first else 1e-3)
        exp_avg_sq = torch.rand(m, d, generator=gen, dtype=FP64) * (0.0 if first else 1e-5)
        grad = torch.randn(m, d, generator=gen, dtype=FP64) * 1e-2
        if zero_rows:
            grad[::3], exp_avg[::12] = 0.0, 0.0
        grad = grad.to(dtype).to(device)
        if sparse is not None:
            rows = (torch.rand(m, generator=gen) < sparse).nonzero().flatten().to(device)
            grad = torch.sparse_coo_tensor(rows[None], grad[rows], (m, d), is_coalesced=True, check_invariants=False)
        tensors = {"param": param.to(dtype), "exp_avg": exp_avg.to(state), "exp_avg_sq": exp_avg_sq.to(state)}
        tensors = {key: t.to(device) for key, t in tensors.items()}
        lr = 0.1  # an update as large as the weights: no error of it hides behind their rounding
        return {**tensors, "grad": grad, "lr": lr, "step": step, "masked": masked, **call}

    options.setdefault("dtypes", (FP32, BF16))
    rows = m if not masked else int(m * (sparse or 0))
    return Case("adam_rows_", name or "plain", {"m": m, "d": d}, make, False,
                flops=12 * rows * d, moved=3 * rows * d, moved_fixed=16 * rows * d, **options)  # fmt: skip


ADAM_ROWS = [
    adam_rows_(96, 64, "first_step", step=1, dtypes=ALL),
    adam_rows_(199, 257, dtypes=(FP32, BF16, FP16)),
    adam_rows_(1, 1),
    adam_rows_(5000, 7, "late", step=100_000),
    adam_rows_(300, 63, "l2", weight_decay=0.1, betas=(0.0, 0.9)),
    adam_rows_(300, 63, "adamw", weight_decay=0.1, decoupled=True, eps=1e-3, dtypes=ALL),
    adam_rows_(300, 576, "project", project=True),
    adam_rows_(300, 63, "unit_norm", project=True, renormalise=True, zero_rows=True, dtypes=ALL),
    adam_rows_(300, 63, "renormalise_adamw", renormalise=True, weight_decay=0.1, decoupled=True),
    adam_rows_(300, 96, "sparse_grad", sparse=0.3, dtypes=ALL),
    adam_rows_(300, 96, "sparse_grad_unit_norm", sparse=0.3, project=True, renormalise=True, zero_rows=True),
    adam_rows_(300, 96, "masked", sparse=0.3, masked=True, dtypes=ALL),
    adam_rows_(300, 63, "masked_unit_norm", sparse=0.3, masked=True, project=True, renormalise=True),
    adam_rows_(300, 96, "masked_no_rows", sparse=0.0, masked=True),
    adam_rows_(300, 96, "no_rows", sparse=0.0),
]
