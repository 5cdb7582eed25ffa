# SPDX-License-Identifier: Apache-2.0
"""Contenders of `decode_loss` and `codes_from_dense`; see `workloads`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import reference
from ..codes import SparseCodes
from ..ops import codes_from_dense, decode, decode_loss
from .bench_inputs import Build, Call, Inputs, codes_of, over


def loss_and_gradients(loss_of: Callable[..., Tensor]) -> Build:
    """Squared error of the reconstruction from given codes, and the gradients of values, W_dec (row-sparse), b_dec."""

    def build(inputs: Inputs, k: int, backend: str) -> Call:
        W_dec, b_dec = inputs.W_dec.clone().requires_grad_(), inputs.b_dec.clone().requires_grad_()

        def call(pair: tuple[SparseCodes, Tensor]) -> tuple[Tensor, ...]:
            codes = pair[0].detach()
            codes.values.requires_grad_()
            loss = loss_of(codes, W_dec, b_dec, pair[1], backend)
            return loss.detach(), *torch.autograd.grad(loss, (codes.values, W_dec, b_dec))

        return over(list(zip(codes_of(inputs, k), inputs.xs, strict=True)), call)

    return build


def error_after(codes: SparseCodes, W_dec: Tensor, b_dec: Tensor, x: Tensor, backend: str) -> Tensor:
    y = decode(codes, W_dec, b_dec, sparse_grad=True, backend=backend)
    return (y - x).to(reference.accumulator(x.dtype)).square().sum()


def error_within(codes: SparseCodes, W_dec: Tensor, b_dec: Tensor, x: Tensor, backend: str) -> Tensor:
    return decode_loss(codes, W_dec, b_dec, x, sparse_grad=True, backend=backend).loss


def from_dense(convert: Callable[[Tensor, str], tuple[Tensor, ...]]) -> Build:
    def build(inputs: Inputs, k: int, backend: str) -> Call:
        return over([codes.to_dense() for codes in codes_of(inputs, k)], lambda f: convert(f, backend))

    return build


def nonzero_fusae(f: Tensor, backend: str) -> tuple[Tensor, ...]:
    codes = codes_from_dense(f, backend=backend)
    return codes.values, codes.indices, codes.offsets


def nonzero_torch(f: Tensor, backend: str) -> tuple[Tensor, ...]:
    rows, latents = f.nonzero(as_tuple=True)
    return f[rows, latents], latents.to(torch.int32), F.pad((f != 0).sum(1).cumsum(0), (1, 0))
