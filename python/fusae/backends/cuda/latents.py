# SPDX-License-Identifier: Apache-2.0
"""Gradients: sums by latent, and the dots that go with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .codes import Codes
from .decode import decode, value_gradients
from .native import DTYPES, module, ptr, stream, table, why_not

CHUNK = 256
"""Entries of a latent that one block adds up: more are cut into chunks, whose sums another launch adds in order. It
fixes the order of sums."""


class ByLatent:
    """The entries of codes with a non-zero value in the order of their latents, and sums over those of each.

    With several `prefixes`, an entry's row is one of ``[prefixes, n, d]``, that of its group.
    """

    def __init__(self, codes: Codes, prefixes: list[int] | None = None, by_rank: bool = False) -> None:
        self.codes, storage, device = codes, codes.storage, codes.indices.device

        def empty(dtype: torch.dtype, size: int = storage) -> Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        keys, place = empty(torch.int32).fill_(-1), torch.arange(storage, dtype=torch.int32, device=device)
        self.row, self.sorted, self.order = empty(torch.int64), empty(torch.int32), empty(torch.int32)
        self.start = empty(torch.int64, codes.m + 1)
        if not storage:
            self.start.zero_()
            return
        scratch = empty(torch.uint8, module().sort_scratch(storage, codes.m))
        module().sort_by_latent(
            codes.tuple(), prefixes or [], by_rank, ptr(keys), ptr(place), ptr(self.row), ptr(self.sorted),
            ptr(self.order), ptr(self.start), ptr(scratch), len(scratch), stream(keys),
        )  # fmt: skip

    def touched(self) -> Tensor:
        """The latents that have entries, ascending: one host sync."""
        return self.start.diff().nonzero().view(-1)

    def sums(self, source: Tensor, latents: Tensor | None, scale: Tensor | None = None) -> Tensor:
        """``scale · Σ value · source[row]`` by latent, ``[m, d]`` or ``[u, d]``, in the dtype of `source`."""
        source = source.contiguous()
        d, storage = source.shape[-1], self.codes.storage
        out = source.new_empty(self.codes.m if latents is None else len(latents), d)
        if not storage or (latents is not None and not len(latents)):
            return out.zero_()
        parts = torch.empty(2 * -(-storage // CHUNK), d, dtype=torch.float32, device=out.device)
        if storage <= CHUNK:  # nothing can be hot
            parts = parts[:0]
        module().latent_sums(
            self.codes.tuple(), *map(ptr, (self.row, self.sorted, self.order, self.start, latents)), len(out),
            *map(ptr, (source, scale, out, parts)), DTYPES[out.dtype], d, CHUNK, stream(out),
        )  # fmt: skip
        return out

    def value_sums(self, dtype: torch.dtype) -> Tensor:
        """``Σ value`` by latent, ``[m]``."""
        out = torch.empty(self.codes.m, dtype=dtype, device=self.start.device)
        module().coef_sums(self.codes.tuple(), ptr(self.order), ptr(self.start), ptr(out), DTYPES[dtype], stream(out))
        return out


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
    codes = Codes.of(grad_pre, indices, offsets, W_enc.shape[0])
    grad_x, rows = x.new_empty(0), torch.empty(0, dtype=torch.int64, device=x.device)
    grad_W, grad_b = x.new_empty(0), x.new_empty(0)
    if need_x:
        grad_x = decode(codes, W_enc, None)
    if need_W or need_b:
        entries = ByLatent(codes)
        if need_b:
            grad_b = entries.value_sums(W_enc.dtype)
        if need_W and row_sparse:
            rows = entries.touched()
        if need_W:
            grad_W = entries.sums(x, rows if row_sparse else None)
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
    codes = Codes.of(values, indices, offsets, W_dec.shape[0])
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
    codes = Codes.of(values, indices, offsets, W_dec.shape[0])
    factor = factor.float()
    if len(prefixes) == 1:
        return _decode_gradients(codes, mixed[0], W_dec, need_values, need_W, row_sparse, factor)
    return _decode_gradients(codes, mixed, W_dec, need_values, need_W, row_sparse, factor, prefixes, by_rank)


def _decode_gradients(
    codes: Codes,
    grad: Tensor,
    W_dec: Tensor,
    need_values: bool,
    need_W: bool,
    row_sparse: bool,
    scale: Tensor | None = None,
    prefixes: list[int] | None = None,
    by_rank: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Entries meet the rows of `grad` ``[n, d]``, or with `prefixes` of ``[prefixes, n, d]``, that of their group."""
    rows = torch.empty(0, dtype=torch.int64, device=grad.device)
    grad_values, grad_W = codes.values.new_empty(0), codes.values.new_empty(0)
    grad = grad.contiguous()
    if need_values:
        grad_values = value_gradients(codes, grad, W_dec, scale, prefixes, by_rank)
    if need_W:
        entries = ByLatent(codes, prefixes, by_rank)
        if row_sparse:
            rows = entries.touched()
        grad_W = entries.sums(grad, rows if row_sparse else None, scale)
    return grad_values, rows, grad_W


def _why_not_loss(*args: Any, **kwargs: Any) -> str | None:
    prefixes = kwargs["prefixes"] if "prefixes" in kwargs else args[6]
    if len(prefixes) > module().MAX_GROUPS:
        return f"at most {module().MAX_GROUPS} prefixes, got {len(prefixes)}"
    return why_not(*args, **kwargs)


TABLE = table(encode_bwd, decode_bwd) | table(decode_loss_bwd, why=_why_not_loss)
