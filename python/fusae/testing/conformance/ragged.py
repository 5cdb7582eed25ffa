# SPDX-License-Identifier: Apache-2.0
"""Checks of `encode_threshold` and `encode_batch_topk`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import reference
from ...codes import SparseCodes
from .. import oracles
from ..cases import Case, Inputs
from ..compare import assert_equal, assert_grads, assert_topk
from ..ragged import assert_batch_topk, assert_threshold
from ..targets import Target
from .common import check_row_sparse, grad_like
from .encode import encode_reference


def _assert_codes(got: SparseCodes, wanted: SparseCodes, what: str) -> None:
    for part in ("offsets", "indices", "values"):
        assert_equal(getattr(got, part), getattr(wanted, part), f"{what} {part}")


def _split(result: Any) -> tuple[SparseCodes, Tensor | None]:
    return result if isinstance(result, tuple) else (result, None)


def _limits(inputs: Inputs, m: int, dtype: torch.dtype) -> Tensor:
    threshold, device = inputs["threshold"], inputs["x"].device
    if isinstance(threshold, Tensor):
        return threshold.detach().to(dtype)
    return torch.full((m,), threshold, dtype=dtype, device=device)


def threshold_forward(case: Case, inputs: Inputs, result: Any) -> None:
    codes, l0 = _split(result)
    truth = oracles.scores(inputs, case.exact)
    bandwidth = inputs.get("bandwidth")
    if (l0 is None) != (bandwidth is None):
        raise AssertionError(f"l0 comes with a bandwidth and only with one, got {l0}")
    if codes.dtype != inputs["x"].dtype:
        raise AssertionError(f"values of {inputs['x'].dtype} wanted, got {codes.dtype}")
    if "capacity" in inputs and len(codes.values) != inputs["capacity"]:
        raise AssertionError(f"a storage of {inputs['capacity']} entries wanted, got {len(codes.values)}")
    assert_threshold(
        truth.pre, codes, _limits(inputs, codes.m, torch.float64), score=truth.score, band=truth.band,
        bandwidth=bandwidth or 0.0, l0=l0,
    )  # fmt: skip
    if case.exact:
        wanted = _split(case.call(inputs, backend="reference"))
        _assert_codes(codes, wanted[0], "threshold")
        if l0 is not None:
            assert_equal(l0, wanted[1], "l0")


def threshold_backward(case: Case, inputs: Inputs, target: Target, gen: torch.Generator) -> None:
    bandwidth, through = inputs.get("bandwidth"), inputs.get("straight_through", False)
    names = [name for name in ("x", "W_enc", "b_enc") if inputs.get(name) is not None]
    if bandwidth is not None and isinstance(inputs["threshold"], Tensor):
        names.append("threshold")
    leaves = [inputs[name].requires_grad_() for name in names]
    with target.active():
        codes, l0 = _split(case.call(inputs))
        outs = [codes.values] if l0 is None else [codes.values, l0]
        grads = [grad_like(out, case.grad_layout, gen) for out in outs]
        got = dict(zip(names, torch.autograd.grad(outs, leaves, grads), strict=True))
        codes_again, l0_again = _split(case.call({**inputs, "sparse_grad": True}))
        again = [codes_again.values] if l0 is None else [codes_again.values, l0_again]
        (sparse,) = torch.autograd.grad(again, inputs["W_enc"], grads)

    codes, (grad, *grad_l0) = codes.detach(), grads
    grad_l0 = grad_l0[0] if grad_l0 else None
    used, d = int(codes.offsets[-1]), inputs["W_enc"].shape[1]
    x, W = inputs["x"].detach().reshape(-1, d), inputs["W_enc"].detach()

    def plain(dtype: torch.dtype) -> dict[str, Tensor]:
        """The reference in `dtype`, on the stored entries."""
        acc, coef, extra = reference.accumulator(dtype), grad.to(dtype), {}
        active = codes.values != 0  # positive, but rounded to 0 in 16 bits: padding
        limits = _limits(inputs, codes.m, acc)
        if bandwidth is not None:
            truth = oracles.scores(inputs, case.exact)
            place = codes.row_ids()[:used], codes.indices[:used].long()
            pre, limit = truth.pre[place], limits.double()[place[1]]
            state = codes.indices.new_zeros(len(codes.indices), dtype=torch.uint8)
            state[:used] = (active[:used] & ~(pre <= limit)) + 2 * ((pre - limit).abs() < bandwidth / 2)
            near = ((pre - limit).abs() <= truth.band) | (((pre - limit).abs() - bandwidth / 2).abs() <= truth.band)
            if not case.exact and bool(near.any()):
                raise ValueError(f"{case}: an entry lies on an edge of the window, no oracle knows its side; change it")
            coef, extra["threshold"] = reference.encode_threshold_bwd(
                codes.indices, codes.offsets, state, coef, grad_l0.to(acc), limits, bandwidth, through, True
            )
        else:
            coef = torch.where(active, coef, 0.0)
        return {**encode_reference(coef, codes.indices, codes.offsets, x.to(dtype), W.to(dtype)), **extra, "coef": coef}

    wanted = plain(x.dtype)
    finite = oracles.all_finite(inputs) and bool(torch.isfinite(codes.values[:used]).all())
    truth = oracles.encode_threshold_grads(inputs, codes, grad, grad_l0) if finite else plain(torch.float64)
    for name in names:
        shape = inputs[name].shape
        assert_grads(got[name], wanted[name].reshape(shape), truth[name].reshape(shape), f"grad {name}")
    check_row_sparse(sparse, got["W_enc"], wanted["coef"][:used], codes.indices[:used])


# --- encode_batch_topk ----------------------------------------------------------------------------------------------


def batch_topk_forward(case: Case, inputs: Inputs, result: Any) -> None:
    codes, smallest, *rest = result
    x, activation = inputs["x"], inputs["activation"]
    truth = oracles.scores(inputs, case.exact)
    size = len(truth.pre) * inputs["k"]
    if codes.dtype != x.dtype or len(codes.values) != size:
        raise AssertionError(f"a storage of {size} {x.dtype} entries wanted, got {codes}")
    common = {"score": truth.score, "activation": activation, "band": truth.band}
    assert_batch_topk(truth.pre, codes, smallest, size, **common)
    if len(rest) != ("aux_mask" in inputs):
        raise AssertionError(f"auxiliary codes come with aux_mask and only with it, got {rest}")
    for aux in rest:
        if aux.batch_shape != x.shape[:-1]:
            raise AssertionError(f"auxiliary codes of shape {list(x.shape[:-1])} wanted, got {aux}")
        flat = aux.flatten()
        assert_topk(truth.pre, flat.values, flat.indices, inputs["k_aux"], mask=inputs["aux_mask"], **common)
    if case.exact:
        wanted = case.call(inputs, backend="reference")
        _assert_codes(codes, wanted[0], "batch top-k")
        assert_equal(smallest, wanted[1], "smallest")
        for aux, ref in zip(rest, wanted[2:], strict=True):
            assert_equal(aux.indices, ref.indices, "auxiliary indices")
            assert_equal(aux.values, ref.values, "auxiliary values")


def batch_topk_backward(case: Case, inputs: Inputs, target: Target, gen: torch.Generator) -> None:
    names = [name for name in ("x", "W_enc", "b_enc") if inputs.get(name) is not None]
    leaves = [inputs[name].requires_grad_() for name in names]
    with target.active():
        codes, _, *aux = case.call(inputs)
        outs = [codes.values, *(a.values for a in aux)]
        grads = [grad_like(out, case.grad_layout, gen) for out in outs]
        got = dict(zip(names, torch.autograd.grad(outs, leaves, grads), strict=True))
        again, _, *aux_again = case.call({**inputs, "sparse_grad": True})
        (sparse,) = torch.autograd.grad([again.values, *(a.values for a in aux_again)], inputs["W_enc"], grads)

    codes, used, d = codes.detach(), int(codes.offsets[-1]), inputs["W_enc"].shape[1]
    x, W = inputs["x"].detach().reshape(-1, d), inputs["W_enc"].detach()
    # Both selections as fixed-width entries, one a row: (row, latent, gradient of the pre-activation).
    row, latent, coef = [codes.row_ids()[:used]], [codes.indices[:used]], [grads[0][:used]]
    if inputs["activation"] == "relu":
        coef = [torch.where(codes.values[:used] != 0, coef[0], 0.0)]
    if aux:
        flat, grad = aux[0].detach().flatten(), grads[1].reshape(-1, inputs["k_aux"])
        live = flat.values != 0 if inputs["activation"] == "relu" else inputs["aux_mask"][flat.indices.long()]
        row.append(torch.arange(len(x), device=x.device).repeat_interleave(inputs["k_aux"]))
        latent.append(flat.indices.flatten())
        coef.append(torch.where(live, grad, 0.0).flatten())
    row, latent, coef = torch.cat(row), torch.cat(latent), torch.cat(coef)
    order = torch.argsort(row, stable=True)
    offsets = torch.searchsorted(row[order].contiguous(), torch.arange(len(x) + 1, device=x.device))
    arguments = coef[order], latent[order], offsets
    wanted = encode_reference(*arguments, x, W)
    truth = encode_reference(arguments[0].double(), *arguments[1:], x.double(), W.double())
    if oracles.all_finite(inputs) and bool(torch.isfinite(codes.values[:used]).all()):
        dense = torch.zeros(len(x), len(W), dtype=torch.float64, device=x.device)
        dense.index_put_((row, latent.long()), coef.double(), accumulate=True)
        truth = oracles.linear_grads(inputs, dense)
    for name in names:
        shape = inputs[name].shape
        assert_grads(got[name], wanted[name].reshape(shape), truth[name].reshape(shape), f"grad {name}")
    check_row_sparse(sparse, got["W_enc"], *arguments[:2])
