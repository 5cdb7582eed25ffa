# SPDX-License-Identifier: Apache-2.0
"""Checks of `topk` and `encode_topk`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import reference
from ...codes import SparseCodes
from .. import oracles
from ..cases import Case, Inputs
from ..compare import assert_equal, assert_grads, assert_topk
from ..targets import Target
from .common import check_row_sparse, grad_like


def topk_forward(case: Case, inputs: Inputs, result: SparseCodes) -> None:
    pre, k = inputs["pre"], inputs["k"]
    if result.batch_shape != pre.shape[:-1]:
        raise AssertionError(f"batch shape {list(pre.shape[:-1])} wanted, got {list(result.batch_shape)}")
    pre, flat = pre.reshape(-1, pre.shape[-1]), result.flatten()
    assert_topk(pre.double(), flat.values, flat.indices, k)
    values, indices = reference.topk_fwd(pre, k)
    assert_equal(flat.indices, indices, "indices")
    assert_equal(flat.values, values, "values", signed_zero=True)


def topk_backward(case: Case, inputs: Inputs, target: Target, gen: torch.Generator) -> None:
    pre = inputs["pre"].requires_grad_()
    with target.active():
        codes = case.call(inputs)
        grad = grad_like(codes.values, case.grad_layout, gen)
        (got,) = torch.autograd.grad(codes.values, pre, grad)
    wanted = torch.zeros_like(pre, memory_format=torch.contiguous_format)
    wanted.scatter_(-1, codes.indices.long(), grad)
    assert_equal(got, wanted, "grad pre")


# --- encode_topk ----------------------------------------------------------------------------------------------------


def _pair(result: Any) -> tuple[SparseCodes, SparseCodes | None]:
    return result if isinstance(result, tuple) else (result, None)


def encode_forward(case: Case, inputs: Inputs, result: Any) -> None:
    main, aux = _pair(result)
    x, k, activation = inputs["x"], inputs["k"], inputs["activation"]
    truth = oracles.scores(inputs, case.exact)
    common = {"score": truth.score, "activation": activation, "band": truth.band}
    for codes, width, mask, what in (
        (main, k, None, "main top-k"),
        (aux, inputs.get("k_aux"), inputs.get("aux_mask"), "auxiliary top-k"),
    ):
        if codes is None:
            continue
        if codes.batch_shape != x.shape[:-1] or codes.m != truth.pre.shape[1] or codes.dtype != x.dtype:
            raise AssertionError(f"{what}: wrong shape or dtype {codes}")
        flat = codes.flatten()
        if mask is None and inputs.get("select") == "group_max":
            _assert_group_max(truth, flat, width, activation)
        else:
            assert_topk(truth.pre, flat.values, flat.indices, width, mask=mask, what=what, **common)
    if not case.exact:
        return
    wanted = _pair(case.call(inputs, backend="reference"))
    for codes, ref, what in ((main, wanted[0], "main"), (aux, wanted[1], "auxiliary")):
        if codes is not None:
            assert_equal(codes.indices, ref.indices, f"{what} indices")
            assert_equal(codes.values, ref.values, f"{what} values", signed_zero=activation == "relu")


def _assert_group_max(truth: oracles.Scores, codes: SparseCodes, k: int, activation: str) -> None:
    """One latent of every group, in the order of the groups: for each group by itself, a top-1."""
    if tuple(codes.indices.shape) != (len(truth.pre), k):
        raise AssertionError(f"group_max: indices [{len(truth.pre)}, {k}] wanted, got {list(codes.indices.shape)}")
    size = truth.pre.shape[1] // k
    local = codes.indices - size * torch.arange(k, dtype=torch.int32, device=codes.device)
    assert_topk(
        truth.pre.reshape(-1, size), codes.values.reshape(-1, 1), local.reshape(-1, 1), 1,
        score=truth.score.reshape(-1, size), activation=activation, band=truth.band, what="group_max",
    )  # fmt: skip


def encode_backward(case: Case, inputs: Inputs, target: Target, gen: torch.Generator) -> None:
    names = [name for name in ("x", "W_enc", "b_enc") if inputs.get(name) is not None]
    leaves = [inputs[name].requires_grad_() for name in names]
    mask, activation = inputs.get("aux_mask"), inputs["activation"]
    with target.active():
        codes = [c for c in _pair(case.call(inputs)) if c is not None]
        outs = [c.values for c in codes]
        grads = [grad_like(v, case.grad_layout, gen) for v in outs]
        got = dict(zip(names, torch.autograd.grad(outs, leaves, grads), strict=True))
        sparse_codes = [c.values for c in _pair(case.call({**inputs, "sparse_grad": True})) if c is not None]
        (sparse,) = torch.autograd.grad(sparse_codes, inputs["W_enc"], grads)

    flat = [c.detach().flatten() for c in codes]
    grads = [g.reshape(c.values.shape) for c, g in zip(flat, grads, strict=True)]
    gated = []
    for c, g, only in zip(flat, grads, (None, mask), strict=False):
        gate = c.values != 0 if activation == "relu" else torch.ones_like(g, dtype=torch.bool)
        gated.append(torch.where(gate if only is None else gate & only[c.indices.long()], g, 0.0))
    d = inputs["W_enc"].shape[1]
    x, W = inputs["x"].detach().reshape(-1, d), inputs["W_enc"].detach()
    arguments = torch.cat(gated, 1), torch.cat([c.indices for c in flat], 1), None
    wanted = encode_reference(*arguments, x, W)
    if oracles.all_finite(inputs) and all(bool(torch.isfinite(c.values).all()) for c in flat):
        selections = list(zip(flat, grads, (None, mask), strict=False))
        truth = oracles.encode_topk_grads(inputs, oracles.scores(inputs, case.exact), selections)
    else:
        truth = encode_reference(arguments[0].double(), *arguments[1:], x.double(), W.double())
    for name in names:
        shape = inputs[name].shape
        assert_grads(got[name], wanted[name].reshape(shape), truth[name].reshape(shape), f"grad {name}")
    check_row_sparse(sparse, got["W_enc"], *arguments[:2])


def encode_reference(grad: Tensor, indices: Tensor, offsets: Tensor | None, x: Tensor, W: Tensor) -> dict[str, Tensor]:
    grad_x, _, grad_W, grad_b = reference.encode_bwd(grad, indices, offsets, x, W, True, True, True, False)
    return {"x": grad_x, "W_enc": grad_W, "b_enc": grad_b}
