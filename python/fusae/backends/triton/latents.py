# SPDX-License-Identifier: Apache-2.0
"""Gradients: sums by latent, and the dots that go with them."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import decode as gathers
from ...kernels.entries import Codes, on_device
from ...kernels.sums import ByLatent
from .available import table
from .checks import codes_of


def encode_bwd(
    grad_pre: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    x: Tensor,
    W_enc: Tensor,
    need_x: bool,
    need_W: bool,
    need_b: bool,
    row_sparse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m, d = W_enc.shape
    codes = codes_of(grad_pre, indices, offsets, m)
    grad_x, rows = x.new_empty(0), torch.empty(0, dtype=torch.int64, device=x.device)
    grad_W, grad_b = x.new_empty(0), x.new_empty(0)
    if need_x:
        grad_x = gathers.decode(codes, W_enc, None, x.dtype)
    if need_W or need_b:
        entries = ByLatent(codes, zeros=False)
        if need_b:
            grad_b = entries.coef_sums(W_enc.dtype)
        if need_W and row_sparse:
            rows = entries.touched()
        if need_W:
            grad_W = W_enc.new_empty(len(rows) if row_sparse else m, d)
            entries.sums(x, grad_W, rows if row_sparse else None)
    return grad_x, rows, grad_W, grad_b


def decode_bwd(
    grad_y: Tensor,
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    W_dec: Tensor,
    need_values: bool,
    need_W: bool,
    row_sparse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    codes = codes_of(values, indices, offsets, W_dec.shape[0])
    return _decode_gradients(codes, grad_y, W_dec, need_values, need_W, row_sparse)


def decode_loss_bwd(
    factor: Tensor,
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    W_dec: Tensor,
    mixed: Tensor,
    prefixes: list[int],
    by_rank: bool,
    need_values: bool,
    need_W: bool,
    row_sparse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    codes = codes_of(values, indices, offsets, W_dec.shape[0])
    if len(prefixes) == 1:
        return _decode_gradients(codes, mixed[0], W_dec, need_values, need_W, row_sparse, factor)
    ends = on_device(prefixes, indices, torch.int32)
    return _decode_gradients(codes, mixed, W_dec, need_values, need_W, row_sparse, factor, ends, by_rank)


def _decode_gradients(
    codes: Codes,
    grad: Tensor,
    W_dec: Tensor,
    need_values: bool,
    need_W: bool,
    row_sparse: bool,
    scale: Tensor | None = None,
    prefixes: Tensor | None = None,
    by_rank: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Entries meet the rows of `grad` ``[n, d]``, or with `prefixes` of ``[prefixes, n, d]``, that of their group."""
    values, rows = codes.values, torch.empty(0, dtype=torch.int64, device=grad.device)
    if not need_W:  # one gather of decoder rows, and nothing to sort
        if not need_values:
            return values.new_empty(0), rows, values.new_empty(0)
        dots = gathers.value_gradients(codes, grad, W_dec, values.dtype, scale, prefixes, by_rank)
        return dots, rows, values.new_empty(0)
    entries = ByLatent(codes, zeros=need_values, prefixes=prefixes, by_rank=by_rank)
    if row_sparse:
        rows = entries.touched()
    dots = torch.empty(values.shape, dtype=values.dtype, device=values.device) if need_values else None
    grad_W = W_dec.new_empty(len(rows) if row_sparse else codes.m, W_dec.shape[1])
    flat = grad if prefixes is None else grad.reshape(-1, grad.shape[-1])
    entries.sums(flat, grad_W, rows if row_sparse else None, W_dec, dots, scale)
    return values.new_empty(0) if dots is None else dots, rows, grad_W


TABLE = table(encode_bwd, decode_bwd, decode_loss_bwd)
