# SPDX-License-Identifier: Apache-2.0
"""`decode`: sparse codes times the decoder rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, _dispatch
from ..codes import SparseCodes
from ._once import once_differentiable


def _fwd_fake(values, indices, offsets, W_dec, b_dec, backend=None):
    n = indices.shape[0] if offsets is None else offsets.shape[0] - 1
    return W_dec.new_empty(n, W_dec.shape[1])


def _bwd_fake(grad_y, values, indices, offsets, W_dec, need_values, need_W, row_sparse, backend=None):
    m, d = W_dec.shape
    u = torch.library.get_ctx().new_dynamic_size() if need_W and row_sparse else 0
    return (
        values.new_empty(values.shape if need_values else 0),
        indices.new_empty(u, dtype=torch.int64),
        W_dec.new_empty((u, d) if row_sparse else (m, d)) if need_W else values.new_empty(0),
    )


_fwd = _dispatch.define(
    "decode_fwd(Tensor values, Tensor indices, Tensor? offsets, Tensor W_dec, Tensor? b_dec, *, str? backend=None) "
    "-> Tensor",
    _fwd_fake,
    ("values", "indices"),
)
_bwd = _dispatch.define(
    "decode_bwd(Tensor grad_y, Tensor values, Tensor indices, Tensor? offsets, Tensor W_dec, bool need_values, "
    "bool need_W, bool row_sparse, *, str? backend=None) -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
)


class _Decode(torch.autograd.Function):
    generate_vmap_rule = True  # from those of the raw ops

    @staticmethod
    def forward(values, indices, offsets, W_dec, b_dec, row_sparse, backend):
        return _fwd(values, indices, offsets, W_dec, b_dec, backend=backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        values, indices, offsets, W_dec, b_dec, ctx.row_sparse, ctx.backend = inputs
        ctx.save_for_backward(values, indices, offsets, W_dec)
        ctx.b_dtype = None if b_dec is None else b_dec.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        values, indices, offsets, W_dec = ctx.saved_tensors
        need_values, _, _, need_W, need_b = ctx.needs_input_grad[:5]
        grad_values = grad_W = None
        if need_values or need_W:
            grad_values, rows, grad_W = _bwd(
                grad_y, values, indices, offsets, W_dec, need_values, need_W, ctx.row_sparse, backend=ctx.backend
            )
            if need_W and ctx.row_sparse:
                grad_W = torch.sparse_coo_tensor(
                    rows[None], grad_W, W_dec.shape, is_coalesced=True, check_invariants=False
                )
        grad_b = None
        if need_b:
            grad_b = grad_y.sum(0, dtype=_checks.accumulator(grad_y.dtype)).to(ctx.b_dtype)
        return grad_values if need_values else None, None, None, grad_W if need_W else None, grad_b, None, None


@_dispatch.public("decode_fwd", "decode_bwd")
def decode(
    codes: SparseCodes,
    W_dec: Tensor,
    b_dec: Tensor | None = None,
    *,
    sparse_grad: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``y = Σ_j v_j W_dec[i_j] + b_dec``: the reconstruction from sparse codes.

    Args:
        codes: fixed-width ``[..., k]`` or ragged codes over m latents, values in the dtype of `W_dec`. An entry of
            value 0 contributes nothing. Indices must lie in ``[0, m)``.
        W_dec: ``[m, d]`` decoder, row = latent; float32, bfloat16, float16 or float64, any strides.
        b_dec: ``[d]`` decoder bias, dtype of `W_dec`, or None.
        sparse_grad: give ``W_dec.grad`` as a coalesced ``torch.sparse_coo`` tensor of the touched rows.
        backend: run on this backend or raise (default: the first that can).

    Returns:
        ``[..., d]`` (ragged codes: ``[n, d]``), summed in float32. Gradients reach the values (every stored entry),
        `W_dec` and `b_dec`; there is no forward-mode derivative (``torch.func.jvp``) and no second one. Under
        ``torch.vmap`` a batch of codes of fixed width is one call; ragged codes, a batched `W_dec` and the gradients of
        a batch take one call per element.

    Equivalent to::

        y = codes.to_dense() @ W_dec + b_dec
    """
    codes = _checks.codes("codes", codes)
    W_dec = _checks.dense("W_dec", W_dec)
    if W_dec.ndim != 2 or W_dec.shape[0] != codes.m:
        hint = " (transposed?)" if W_dec.ndim == 2 and W_dec.shape[1] == codes.m else ""
        raise ValueError(
            f"W_dec must have shape [{codes.m}, d], row = latent, to match codes, got {list(W_dec.shape)}{hint}"
        )
    values, W_dec, b_dec = _checks.autocast(codes.values, W_dec, b_dec)
    _checks.floating("W_dec", W_dec)
    _checks.like("codes", values, "W_dec", W_dec)
    d = W_dec.shape[1]
    if b_dec is not None:
        _checks.vector("b_dec", b_dec, d, "one per output dimension")
        _checks.like("b_dec", b_dec, "W_dec", W_dec)
    indices, offsets = codes.indices, codes.offsets
    if offsets is None:
        flat = codes.batch_shape.numel(), values.shape[-1]
        values, indices = values.reshape(flat), indices.reshape(flat)
    y = _Decode.apply(values, indices, offsets, W_dec, b_dec, sparse_grad, _dispatch.requested(backend))
    return y.reshape(*codes.batch_shape, d)
