# SPDX-License-Identifier: Apache-2.0
"""Contenders of `adam_rows_`, in its modes; see `workloads`.

``adam_rows``: a dense gradient. ``_sparse``: a row-sparse one, every row moves all the same (dense Adam, exactly).
``_masked``: other rows stay (SparseAdam). ``_lazy``: without momentum, other rows are left alone and made up for later.
``_unit``: decoder rows, projected and renormalised. ``_8bit``: moments of 8 bits, beside float32 ones.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..ops import adam_rows_
from ..ops.adam_rows import moment_width
from .bench_inputs import Build, Call, Inputs, codes_of
from .bench_steps import LR


def _sparse(inputs: Inputs, k: int) -> Tensor:
    """A coalesced gradient of the rows that one batch touches."""
    rows = codes_of(inputs, k)[0].indices.unique().long()
    shape = inputs.W_dec.shape
    return torch.sparse_coo_tensor(rows[None], inputs.W_enc[rows], shape, is_coalesced=True, check_invariants=False)


def _moments(W: Tensor, narrow: bool) -> tuple[Tensor, Tensor]:
    """Written once, so that the memory is there."""
    if narrow:
        shape, dtype = (len(W), moment_width(W.shape[1], torch.uint8)), torch.uint8
    else:
        shape, dtype = W.shape, reference.accumulator(W.dtype)
    return tuple(torch.empty(shape, dtype=dtype, device=W.device).zero_() for _ in range(2))


def ours(*, sparse: bool = False, lazy: bool = False, narrow: bool = False, **options: Any) -> Build:
    def build(inputs: Inputs, k: int, backend: str) -> Call:
        W, step = inputs.W_dec.clone(), itertools.count(1)
        mean, square = _moments(W, narrow)
        grad = _sparse(inputs, k) if sparse else inputs.W_enc.clone()
        given = dict(options)
        if lazy:
            mean = mean.new_empty(0)
            given |= {"last_step": torch.zeros(len(W), dtype=torch.int32, device=W.device), "betas": (0.0, 0.999)}
        if narrow:
            given["seed"] = 0

        def call() -> Tensor:
            adam_rows_(W, mean, square, grad, lr=LR, step=next(step), backend=backend, **given)
            return W

        return call

    return build


def plain(*, sparse: bool = False, beta1: float = 0.9) -> Build:
    """``torch.optim.Adam(fused=True)`` over a dense gradient, which is the sparse one written out with `sparse`."""

    def build(inputs: Inputs, k: int, backend: str) -> Call:
        W = inputs.W_dec.clone().requires_grad_()
        grad = _sparse(inputs, k).to_dense() if sparse else inputs.W_enc.clone()
        optimizer = torch.optim.Adam([W], lr=LR, betas=(beta1, 0.999), fused=True)

        def call() -> Tensor:
            W.grad = grad
            optimizer.step()
            return W

        return call

    return build


def sparse_adam(inputs: Inputs, k: int, backend: str) -> Call:
    W, grad = inputs.W_dec.clone().requires_grad_(), _sparse(inputs, k)
    optimizer = torch.optim.SparseAdam([W], lr=LR)

    def call() -> Tensor:
        W.grad = grad
        optimizer.step()
        return W

    return call


def unit_rows(inputs: Inputs, k: int, backend: str) -> Call:
    """Project the gradient off the rows, a step, renormalise: as other libraries' trainers do it, in four passes."""
    W, grad = inputs.W_dec.clone().requires_grad_(), inputs.W_enc.clone()
    optimizer = torch.optim.Adam([W], lr=LR, fused=True)

    def call() -> Tensor:
        with torch.no_grad():
            along = (grad * W).sum(1, keepdim=True) / W.square().sum(1, keepdim=True)
            W.grad = grad - along * W
            optimizer.step()
            W.div_(W.norm(dim=1, keepdim=True))
        return W

    return call


ADAM: dict[str, dict[str, Build]] = {
    "adam_rows": {"torch Adam(fused)": plain(), "fusae": ours()},
    "adam_rows_sparse": {"torch Adam(fused)": plain(sparse=True), "fusae": ours(sparse=True)},
    "adam_rows_masked": {"torch SparseAdam": sparse_adam, "fusae": ours(sparse=True, masked=True)},
    "adam_rows_lazy": {"torch Adam(fused)": plain(sparse=True, beta1=0.0), "fusae": ours(sparse=True, lazy=True)},
    "adam_rows_unit": {"torch Adam(fused)": unit_rows, "fusae": ours(project=True, renormalise=True)},
    "adam_rows_8bit": {"torch Adam(fused)": plain(), "fusae 8-bit": ours(narrow=True)},
}
