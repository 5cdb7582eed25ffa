# SPDX-License-Identifier: Apache-2.0
"""`check_forward` and `check_backward`: does a target agree with the truth on a case? If not: ``AssertionError``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _dispatch, reference
from ..codes import SparseCodes
from . import oracles
from .cases import Case, Inputs
from .compare import assert_equal, assert_grads, assert_topk, assert_within_budget
from .patterns import LAYOUTS
from .targets import Target

ADAM_STATE = ("param", "exp_avg", "exp_avg_sq")


def accepts(case: Case, target: Target, dtype: torch.dtype) -> bool:
    """False if the target refuses float64 for this case, with a reason that says so. It may refuse nothing else."""
    if dtype != torch.float64:
        return True
    with target.active():
        try:
            case.call(case.inputs(dtype, device=target.device))
        except _dispatch.BackendError as error:
            if "float64" not in str(error):
                raise AssertionError(f"{target} refuses {case} in float64 without naming the dtype: {error}") from error
            return False
    return True


def check_forward(case: Case, target: Target, dtype: torch.dtype, seed: int = 0) -> None:
    """Run the public op on the target and compare with the reference in that dtype and with float64."""
    inputs = case.inputs(dtype, seed, target.device)
    with target.active():
        result = case.call(inputs)
    if result is None:  # an in-place op: what it was given is the result, the same seed gives the inputs back
        inputs, result = case.inputs(dtype, seed, target.device), inputs
    _FORWARD[case.op](case, inputs, result)


def check_backward(case: Case, target: Target, dtype: torch.dtype, seed: int = 0) -> None:
    """Gradients of the public op on the target, dense and row-sparse, against float64 autograd."""
    inputs = case.inputs(dtype, seed, target.device)
    _BACKWARD[case.op](case, inputs, target, torch.Generator().manual_seed(seed + 1))


# --- topk -----------------------------------------------------------------------------------------------------------


def _topk_forward(case: Case, inputs: Inputs, result: SparseCodes) -> None:
    pre, k = inputs["pre"], inputs["k"]
    if result.batch_shape != pre.shape[:-1]:
        raise AssertionError(f"batch shape {list(pre.shape[:-1])} wanted, got {list(result.batch_shape)}")
    pre, flat = pre.reshape(-1, pre.shape[-1]), result.flatten()
    assert_topk(pre.double(), flat.values, flat.indices, k)
    values, indices = reference.topk_fwd(pre, k)
    assert_equal(flat.indices, indices, "indices")
    assert_equal(flat.values, values, "values", signed_zero=True)


def _topk_backward(case: Case, inputs: Inputs, target: Target, gen: torch.Generator) -> None:
    pre = inputs["pre"].requires_grad_()
    with target.active():
        codes = case.call(inputs)
        grad = _grad_like(codes.values, case.grad_layout, gen)
        (got,) = torch.autograd.grad(codes.values, pre, grad)
    wanted = torch.zeros_like(pre, memory_format=torch.contiguous_format)
    wanted.scatter_(-1, codes.indices.long(), grad)
    assert_equal(got, wanted, "grad pre")


# --- encode_topk ----------------------------------------------------------------------------------------------------


def _pair(result: Any) -> tuple[SparseCodes, SparseCodes | None]:
    return result if isinstance(result, tuple) else (result, None)


def _encode_forward(case: Case, inputs: Inputs, result: Any) -> None:
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
        assert_topk(truth.pre, flat.values, flat.indices, width, mask=mask, what=what, **common)
    if not case.exact:
        return
    wanted = _pair(case.call(inputs, backend="reference"))
    for codes, ref, what in ((main, wanted[0], "main"), (aux, wanted[1], "auxiliary")):
        if codes is not None:
            assert_equal(codes.indices, ref.indices, f"{what} indices")
            assert_equal(codes.values, ref.values, f"{what} values", signed_zero=activation == "relu")


def _encode_backward(case: Case, inputs: Inputs, target: Target, gen: torch.Generator) -> None:
    names = [name for name in ("x", "W_enc", "b_enc") if inputs.get(name) is not None]
    leaves = [inputs[name].requires_grad_() for name in names]
    mask, activation = inputs.get("aux_mask"), inputs["activation"]
    with target.active():
        codes = [c for c in _pair(case.call(inputs)) if c is not None]
        outs = [c.values for c in codes]
        grads = [_grad_like(v, case.grad_layout, gen) for v in outs]
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
    wanted = _encode_reference(*arguments, x, W)
    if oracles.all_finite(inputs) and all(bool(torch.isfinite(c.values).all()) for c in flat):
        selections = list(zip(flat, grads, (None, mask), strict=False))
        truth = oracles.encode_topk_grads(inputs, oracles.scores(inputs, case.exact), selections)
    else:
        truth = _encode_reference(arguments[0].double(), *arguments[1:], x.double(), W.double())
    for name in names:
        shape = inputs[name].shape
        assert_grads(got[name], wanted[name].reshape(shape), truth[name].reshape(shape), f"grad {name}")
    _check_row_sparse(sparse, got["W_enc"], *arguments[:2])


def _encode_reference(grad: Tensor, indices: Tensor, offsets: None, x: Tensor, W: Tensor) -> dict[str, Tensor]:
    grad_x, _, grad_W, grad_b = reference.encode_bwd(grad, indices, offsets, x, W, True, True, True, False)
    return {"x": grad_x, "W_enc": grad_W, "b_enc": grad_b}


def _check_row_sparse(sparse: Tensor, dense: Tensor, coef: Tensor, latents: Tensor) -> None:
    """A row-sparse gradient holds the dense one, its rows ascending, exactly those with a non-zero coefficient."""
    if sparse.layout != torch.sparse_coo or not sparse.is_coalesced():
        raise AssertionError(f"a coalesced sparse_coo gradient wanted, got {sparse.layout}")
    wanted = torch.unique(latents[coef != 0]).long()
    assert_equal(sparse.indices()[0], wanted, "rows of the sparse gradient")
    assert_equal(sparse.values(), dense[wanted], "values of the sparse gradient")


# --- decode ---------------------------------------------------------------------------------------------------------


def _reference_decode(inputs: Inputs) -> Tensor:
    codes = inputs["codes"].flatten()
    return reference.decode_fwd(codes.values, codes.indices, codes.offsets, inputs["W_dec"], inputs["b_dec"])


def _decode_forward(case: Case, inputs: Inputs, result: Tensor) -> None:
    codes, d = inputs["codes"], inputs["W_dec"].shape[1]
    if result.shape != (*codes.batch_shape, d):
        raise AssertionError(f"shape {[*codes.batch_shape, d]} wanted, got {list(result.shape)}")
    result, wanted = result.reshape(-1, d), _reference_decode(inputs)
    finite = oracles.all_finite(inputs)
    truth = oracles.decode(inputs) if finite else _reference_decode(oracles.double(inputs))
    assert_within_budget(result, wanted, truth, "y")
    if case.exact:
        assert_equal(result, wanted, "y")


def _decode_backward(case: Case, inputs: Inputs, target: Target, gen: torch.Generator) -> None:
    codes = inputs["codes"]
    leaves = {"values": codes.values.requires_grad_(), "W_dec": inputs["W_dec"].requires_grad_()}
    if inputs["b_dec"] is not None:
        leaves["b_dec"] = inputs["b_dec"].requires_grad_()
    with target.active():
        y = case.call(inputs)
        grad = _grad_like(y, case.grad_layout, gen)
        got = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad), strict=True))
        again = case.call({**inputs, "sparse_grad": True})
        (sparse,) = torch.autograd.grad(again, inputs["W_dec"], grad)

    flat, W = codes.detach().flatten(), inputs["W_dec"].detach()
    grad = grad.reshape(-1, W.shape[1])

    def plain(grad: Tensor, values: Tensor, W: Tensor) -> dict[str, Tensor]:
        values_, _, W_ = reference.decode_bwd(grad, values, flat.indices, flat.offsets, W, True, True, False)
        return {
            "values": values_,
            "W_dec": W_,
            "b_dec": grad.sum(0, dtype=reference.accumulator(grad.dtype)).to(grad.dtype),
        }

    wanted = plain(grad, flat.values, W)
    truth = oracles.decode_grads(inputs, grad) if oracles.all_finite(inputs) else plain(
        grad.double(), flat.values.double(), W.double()
    )  # fmt: skip
    for name, leaf in leaves.items():
        shape = leaf.shape
        assert_grads(got[name], wanted[name].reshape(shape), truth[name].reshape(shape), f"grad {name}")
    used = slice(None) if flat.offsets is None else slice(0, int(flat.offsets[-1]))
    _check_row_sparse(sparse, got["W_dec"], flat.values[used], flat.indices[used])


# --- adam_rows_ -----------------------------------------------------------------------------------------------------


def _adam_forward(case: Case, inputs: Inputs, result: Inputs) -> None:
    truth = oracles.adam_rows(inputs)
    wanted = {**inputs, **{name: inputs[name].clone() for name in ADAM_STATE}}
    case.call(wanted, backend="reference")
    for name in ADAM_STATE:
        assert_grads(result[name], wanted[name], truth[name], name)
    if inputs["masked"]:
        untouched = torch.ones(len(inputs["param"]), dtype=torch.bool, device=inputs["param"].device)
        untouched[inputs["grad"].coalesce().indices()[0]] = False
        for name in ADAM_STATE:
            assert_equal(result[name][untouched], inputs[name][untouched], f"untouched rows of {name}")


def _grad_like(t: Tensor, layout: str, gen: torch.Generator) -> Tensor:
    return LAYOUTS[layout](torch.randn(t.shape, generator=gen).to(t.dtype).to(t.device))


_FORWARD = {
    "topk": _topk_forward,
    "encode_topk": _encode_forward,
    "decode": _decode_forward,
    "adam_rows_": _adam_forward,
}
_BACKWARD = {"topk": _topk_backward, "encode_topk": _encode_backward, "decode": _decode_backward}
