# SPDX-License-Identifier: Apache-2.0
"""Checks of `decode_loss`."""

from __future__ import annotations

import torch

from ... import reference
from ...ops import DecodeLoss
from .. import oracles
from ..cases import Case, Inputs
from ..compare import assert_equal, assert_grads, assert_within_budget
from ..targets import Target
from .common import check_row_sparse

LEAVES = ("W_dec", "b_dec", "target")


def decode_loss_forward(case: Case, inputs: Inputs, result: DecodeLoss) -> None:
    target, W = inputs["target"], inputs["W_dec"]
    groups, acc = len(inputs.get("prefixes") or [0]), reference.accumulator(W.dtype)
    for name, part, shape, dtype in (
        ("loss", result.loss, (), acc),
        ("sse", result.sse, (groups,), acc),
        ("residual", result.residual, target.shape, W.dtype),
    ):
        if part.shape != shape or part.dtype != dtype:
            raise AssertionError(f"{name}: {list(shape)} {dtype} wanted, got {list(part.shape)} {part.dtype}")
    wanted = case.call(inputs, backend="reference")
    finite = oracles.all_finite(inputs)
    truth = oracles.decode_loss(inputs) if finite else case.call(oracles.double(inputs), backend="reference")
    for name, got, want, true in zip(("loss", "sse", "residual"), result, wanted, truth, strict=True):
        assert_within_budget(got, want, true.reshape(want.shape), name)
    if case.exact:
        assert_equal(result.residual, wanted.residual, "residual")


def decode_loss_backward(case: Case, inputs: Inputs, target: Target, gen: torch.Generator) -> None:
    grad = torch.rand((), generator=gen).to(target.device) * 1e-3  # as small as that of a mean

    def gradients(inputs: Inputs, backend: str | None = None, **options: bool) -> dict[str, torch.Tensor]:
        codes = inputs["codes"].detach()
        leaves = {name: inputs[name].detach().requires_grad_() for name in LEAVES if inputs[name] is not None}
        called = {**inputs, **leaves, "codes": codes, **options}
        leaves = {"values": codes.values.requires_grad_(), **leaves}
        loss = case.call(called, backend).loss
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), grad.to(loss.dtype)), strict=True))

    with target.active():
        got, sparse = gradients(inputs), gradients(inputs, sparse_grad=True)
    wanted = gradients(inputs, "reference")
    if oracles.all_finite(inputs):
        truth = oracles.decode_loss_grads(inputs, float(grad))
    else:
        truth = gradients(oracles.double(inputs), "reference")
    for name, gradient in got.items():
        shape = gradient.shape
        assert_grads(gradient, wanted[name], truth[name].reshape(shape), f"grad {name}")
        if name != "W_dec":
            assert_equal(sparse[name], gradient, f"grad {name} beside a row-sparse one")
    flat = inputs["codes"].detach().flatten()
    used = slice(None) if flat.offsets is None else slice(0, int(flat.offsets[-1]))
    check_row_sparse(sparse["W_dec"], got["W_dec"], flat.values[used], flat.indices[used])
