# SPDX-License-Identifier: Apache-2.0
"""Checks of `codes_from_dense`."""

from __future__ import annotations

import torch

from ...codes import SparseCodes
from ..cases import Case, Inputs
from ..compare import assert_equal
from ..targets import Target
from .common import grad_like


def codes_from_dense_forward(case: Case, inputs: Inputs, result: SparseCodes) -> None:
    f, capacity = inputs["f"], inputs.get("capacity")
    row, latent = torch.nonzero(f.double(), as_tuple=True)
    count = torch.bincount(row, minlength=f.shape[0])
    storage = len(row) if capacity is None else capacity
    if result.m != f.shape[1] or result.offsets is None or len(result.values) != storage:
        raise AssertionError(f"ragged codes of {f.shape[1]} latents in a storage of {storage} wanted, got {result}")
    used = min(storage, len(row))
    assert_equal(result.offsets, torch.cat([count.new_zeros(1), count.cumsum(0)]), "offsets")
    values, indices = f.new_zeros(storage), torch.zeros(storage, dtype=torch.int32, device=f.device)
    values[:used], indices[:used] = f[row, latent][:used], latent[:used].to(torch.int32)
    assert_equal(result.indices, indices, "indices")
    assert_equal(result.values, values, "values", signed_zero=True)


def codes_from_dense_backward(case: Case, inputs: Inputs, target: Target, gen: torch.Generator) -> None:
    f = inputs["f"].requires_grad_()
    with target.active():
        codes = case.call(inputs)
        used = int(codes.offsets[-1])
        grad = grad_like(codes.values[:, None], case.grad_layout, gen)[:, 0]
        if used > len(grad):  # entries that did not fit have no gradient, and must not pass for zeros
            try:
                torch.autograd.grad(codes.values, f, grad)
            except IndexError:
                return
            raise AssertionError("codes that did not fit their storage have been given a gradient")
        (got,) = torch.autograd.grad(codes.values, f, grad)
    wanted = torch.zeros(f.shape, dtype=f.dtype, device=f.device)
    wanted[f.detach() != 0] = grad[:used]
    assert_equal(got, wanted, "grad f")
