# SPDX-License-Identifier: Apache-2.0
"""Gathers by row (`decode_fwd`) and sums by latent (every backward)."""

from __future__ import annotations

import torch
from torch import Tensor

from .native import _C, DTYPES, ptr


def _codes(values: Tensor, indices: Tensor, offsets: Tensor | None) -> tuple[int, ...]:
    """Contiguous codes as the binding takes them."""
    n, width = (indices.shape[0], indices.shape[1]) if offsets is None else (offsets.shape[0] - 1, 0)
    return (ptr(values), ptr(indices), ptr(offsets), DTYPES[values.dtype], n, width, values.numel())


def decode_fwd(
    values: Tensor, indices: Tensor, offsets: Tensor | None, W_dec: Tensor, b_dec: Tensor | None
) -> Tensor:
    values, indices, W_dec = values.contiguous(), indices.contiguous(), W_dec.contiguous()
    offsets = None if offsets is None else offsets.contiguous()
    b_dec = None if b_dec is None else b_dec.contiguous()
    m, d = W_dec.shape
    codes = _codes(values, indices, offsets)
    y = W_dec.new_empty(codes[4], d)
    _C.decode(codes, ptr(W_dec), ptr(b_dec), ptr(y), DTYPES[W_dec.dtype], m, d, torch.get_num_threads())
    return y


def decode_loss_fwd(
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    prefixes: list[int],
    weights: list[float],
    by_rank: bool,
    need_mixed: bool,
    need_dots: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values, indices, W_dec, target = (t.contiguous() for t in (values, indices, W_dec, target))
    offsets = None if offsets is None else offsets.contiguous()
    b_dec = None if b_dec is None else b_dec.contiguous()
    (m, d), groups, codes = W_dec.shape, len(prefixes), _codes(values, indices, offsets)
    sse, residual = torch.empty(groups, dtype=torch.float32), W_dec.new_empty(codes[4], d)
    mixed = W_dec.new_empty((groups, codes[4], d) if need_mixed and groups > 1 else 0)
    # Storage past offsets[-1] is visited by no row.
    dots = torch.zeros(values.shape if need_dots else 0, dtype=torch.float32)
    _C.decode_loss(
        codes, *map(ptr, (W_dec, b_dec, target)), DTYPES[target.dtype], prefixes, by_rank, weights,
        *map(ptr, (sse, residual, mixed, dots)), DTYPES[W_dec.dtype], m, d, torch.get_num_threads(),
    )  # fmt: skip
    return sse, residual, mixed, dots


class _ByLatent:
    """The stored entries of codes sorted by latent, and passes over it. With several prefixes, an entry's row is one of
    ``[prefixes, n, d]``, that of its group."""

    def __init__(
        self,
        coef: Tensor,
        indices: Tensor,
        offsets: Tensor | None,
        m: int,
        prefixes: list[int] | None = None,
        by_rank: bool = False,
    ) -> None:
        self.coef, self.indices = coef.contiguous(), indices.contiguous()
        self.offsets = None if offsets is None else offsets.contiguous()
        self.m = m
        self.start = torch.empty(m + 1, dtype=torch.int64)
        self.order = torch.empty(coef.numel(), dtype=torch.int64)
        self.row = torch.empty(coef.numel(), dtype=torch.int32)
        self.codes = _codes(self.coef, self.indices, self.offsets)
        _C.by_latent(self.codes, m, prefixes or [], by_rank, *map(ptr, (self.start, self.order, self.row)))

    def touched(self) -> Tensor:
        """bool ``[m]``: the latents with a non-zero coefficient."""
        used = self.coef.numel() if self.offsets is None else int(self.offsets[-1])
        mark = torch.zeros(self.m, dtype=torch.bool)
        mark[self.indices.view(-1)[:used][self.coef.view(-1)[:used] != 0].long()] = True
        return mark

    def run(
        self,
        rows: Tensor,
        *,
        latents: Tensor | None = None,
        weight: Tensor | None = None,
        sum: Tensor | None = None,
        dots: Tensor | None = None,
        coef_sum: Tensor | None = None,
        scale: float = 1.0,
    ) -> None:
        """One pass; see ``LatentPassArgs`` in csrc/include/fusae/ops.h."""
        if latents is not None and len(latents) == 0:  # no address would mean all of them
            return
        _C.latent_pass(
            self.codes, *map(ptr, (self.start, self.order, self.row, latents)), 0 if latents is None else len(latents),
            ptr(rows), ptr(weight), scale, DTYPES[rows.dtype], self.m, rows.shape[-1],
            *map(ptr, (sum, dots, coef_sum)), torch.get_num_threads(),
        )  # fmt: skip


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
    grad_x, rows = x.new_empty(0), torch.empty(0, dtype=torch.int64)
    grad_W, grad_b = x.new_empty(0), x.new_empty(0)
    if need_x:
        grad_x = decode_fwd(grad_pre, indices, offsets, W_enc, None)
    if need_W or need_b:
        m, d = W_enc.shape
        x = x.contiguous()
        entries = _ByLatent(grad_pre, indices, offsets, m)
        if need_b:
            grad_b = W_enc.new_zeros(m)
        if need_W and row_sparse:
            rows = entries.touched().nonzero().view(-1)
        if need_W:
            grad_W = W_enc.new_empty(len(rows) if row_sparse else m, d)
        entries.run(
            x,
            latents=rows if need_W and row_sparse else None,
            sum=grad_W if need_W else None,
            coef_sum=grad_b if need_b else None,
        )
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
    entries = _ByLatent(values, indices, offsets, W_dec.shape[0])
    return _decode_gradients(entries, grad_y, values, W_dec, need_values, need_W, row_sparse, 1.0)


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
    entries = _ByLatent(values, indices, offsets, W_dec.shape[0], prefixes, by_rank)
    return _decode_gradients(entries, mixed, values, W_dec, need_values, need_W, row_sparse, float(factor))


def _decode_gradients(
    entries: _ByLatent,
    grad_y: Tensor,
    values: Tensor,
    W_dec: Tensor,
    need_values: bool,
    need_W: bool,
    row_sparse: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_y, W_dec = grad_y.contiguous(), W_dec.contiguous()
    m, d = W_dec.shape
    rows = torch.empty(0, dtype=torch.int64)
    grad_values, grad_W = values.new_empty(0), values.new_empty(0)
    # Storage past offsets[-1] is visited by no latent.
    if need_values:
        grad_values = torch.zeros(values.shape, dtype=values.dtype)
    dots = grad_values if need_values else None
    if not need_W:
        entries.run(grad_y, weight=W_dec, dots=dots, scale=scale)
    elif not row_sparse:
        grad_W = W_dec.new_empty(m, d)
        entries.run(grad_y, weight=W_dec, dots=dots, sum=grad_W, scale=scale)
    else:
        touched = entries.touched()
        rows = touched.nonzero().view(-1)
        grad_W = W_dec.new_empty(len(rows), d)
        entries.run(grad_y, weight=W_dec, latents=rows, dots=dots, sum=grad_W, scale=scale)
        if need_values:  # latents that were stored with value 0 everywhere: no gradient row, but dots
            padding = ((entries.start[1:] > entries.start[:-1]) & ~touched).nonzero().view(-1)
            entries.run(grad_y, weight=W_dec, latents=padding, dots=dots, scale=scale)
    return grad_values, rows, grad_W
