# SPDX-License-Identifier: Apache-2.0
"""Checks of `decode`."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import reference
from .. import oracles
from ..cases import Case, Inputs
from ..compare import assert_equal, assert_grads, assert_within_budget
from ..targets import Target
from .common import check_row_sparse, grad_like


def _reference_decode(inputs: Inputs) -> Tensor:
    codes = inputs["codes"].flatten()
    return reference.decode_fwd(codes.values, codes.indices, codes.offsets, inputs["W_dec"], inputs["b_dec"])


def decode_forward(case: Case, inputs: Inputs, result: Tensor) -> None:
    codes, d = inputs["codes"], inputs["W_dec"].shape[1]
    if result.shape != (*codes.batch_shape, d):
        raise AssertionError(f"shape {[*codes.batch_shape, d]} wanted, got {list(result.shape)}")
    result, wanted = result.reshape(-1, d), _reference_decode(inputs)
    finite = oracles.all_finite(inputs)
    truth = oracles.decode(inputs) if finite else _reference_decode(oracles.double(inputs))
    assert_within_budget(result, wanted, truth, "y")
    if case.exact:
        assert_equal(result, wanted, "y")


def decode_backward(case: Case, inputs: Inputs, target: Target, gen: torch.Generator) -> None:
    codes = inputs["codes"]
    leaves = {"values": codes.values.requires_grad_(), "W_dec": inputs["W_dec"].requires_grad_()}
    if inputs["b_dec"] is not None:
        leaves["b_dec"] = inputs["b_dec"].requires_grad_()
    with target.active():
        y = case.call(inputs)
        grad = grad_like(y, case.grad_layout, gen)
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
    check_row_sparse(sparse, got["W_dec"], flat.values[used], flat.indices[used])
