# SPDX-License-Identifier: Apache-2.0
"""`selected`: pre-activations that were selected elsewhere, as a function of the encoder. No kernel; private."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from ..codes import SparseCodes
from ._once import once_differentiable


def _joined(main: Tensor, aux: Tensor, offsets: Tensor) -> Tensor:
    """Ragged entries (no unused storage) and fixed-width ones ``[n, w]`` behind those of each row."""
    n, width = aux.shape
    row = torch.repeat_interleave(torch.arange(n, device=main.device), offsets.diff())
    out = aux.new_empty(main.shape[0] + n * width)
    out[torch.arange(main.shape[0], device=main.device) + width * row] = main
    step = torch.arange(n, device=main.device)[:, None] * width
    out[offsets[1:, None] + step + torch.arange(width, device=main.device)] = aux
    return out


class _Selected(torch.autograd.Function):
    @staticmethod
    def forward(x, W_enc, b_enc, values, indices, offsets, aux_values, aux_indices, row_sparse, backend):
        return values.clone(), None if aux_values is None else aux_values.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, W_enc, _, values, indices, offsets, aux_values, aux_indices, ctx.row_sparse, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, W_enc, values, indices, offsets, aux_values, aux_indices)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_aux):
        none = (None,) * 10
        if grad is None and grad_aux is None:
            return none
        x, W_enc, values, indices, offsets, aux_values, aux_indices = ctx.saved_tensors
        # None through padding, which is what has value 0.
        grad = torch.zeros_like(values) if grad is None else torch.where(values != 0, grad, 0.0)
        if grad_aux is not None:
            grad_aux = torch.where(aux_values != 0, grad_aux, 0.0)
            if offsets is None:
                grad, indices = torch.cat([grad, grad_aux], 1), torch.cat([indices, aux_indices], 1)
            else:
                grad, indices = _joined(grad, grad_aux, offsets), _joined(indices, aux_indices, offsets)
                offsets = offsets + aux_values.shape[1] * torch.arange(len(offsets), device=offsets.device)
        need_x, need_W, need_b = ctx.needs_input_grad[:3]
        grad_x, rows, grad_W, grad_b = torch.ops.fusae.encode_bwd.default(
            grad, indices, offsets, x, W_enc, need_x, need_W, need_b, ctx.row_sparse, backend=ctx.backend
        )
        if need_W and ctx.row_sparse:
            grad_W = torch.sparse_coo_tensor(
                rows[None], grad_W, W_enc.shape, is_coalesced=True, check_invariants=False
            )
        return grad_x if need_x else None, grad_W if need_W else None, grad_b if need_b else None, *none[3:]


def selected(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    codes: SparseCodes,
    aux: SparseCodes | None = None,
    *,
    sparse_grad: bool = False,
) -> tuple[SparseCodes, SparseCodes | None]:
    """`codes` over the rows of `W_enc`, their values a function of `x`, `W_enc` and `b_enc` for the backward pass.

    For a selection that several processes make together, each for some rows of `x` and of `W_enc`: what comes out of it
    is only numbers, and this gives them the gradient that `fusae.encode_topk` would have.

    Args:
        x: ``[n, d]``.
        W_enc: ``[m, d]``, dtype of `x`.
        b_enc: ``[m]`` or None, dtype of `x`.
        codes: of n rows, fixed-width or ragged without unused storage, whose values are ``W_enc[i] · x + b_enc[i]``, or
            0 (padding, which has no gradient; its indices may repeat).
        aux: further codes ``[n, k_aux]``, fixed-width.
        sparse_grad: as of `fusae.encode_topk`.

    Returns:
        (codes, aux) with the same numbers.
    """
    rest = (None, None) if aux is None else (aux.values, aux.indices)
    values, aux_values = _Selected.apply(
        x, W_enc, b_enc, codes.values, codes.indices, codes.offsets, *rest, sparse_grad, _dispatch.requested()
    )
    main = SparseCodes(values, codes.indices, codes.m, codes.offsets)
    return main, None if aux is None else SparseCodes(aux_values, aux.indices, aux.m)
