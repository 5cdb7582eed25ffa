# SPDX-License-Identifier: Apache-2.0
"""Decoders and value gradients: gathers of decoder rows.

Both read ``nnz·d`` elements of W_dec and little else: 4.29 GB in bfloat16 at n 8192, d 4096, k 64, which is 1.0 ms at
4.3 TB/s. Rows are read in pieces of 1 KB, 16 bytes a thread, 8 rows in flight in each of up to 32 warps of a
multiprocessor (128 KB, where 30 KB would cover the latency), so 85 % of copy bandwidth is expected, more where latents
repeat: programs are ordered by block of columns, and such a block of W_dec, ``m`` KB, is nearer to the size of L2.

Sums are taken in float32 in the order of the entries, eight at a time. An entry of value 0 reads nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv
from .entries import BLOCK, Codes, contiguous_rows, gather_tile, gathered, group_of, row_entries, used_entries


@triton.jit(do_not_specialize=["n", "m", "width", "storage"])
def decode_kernel(
    values, indices, offsets, weight, bias, out, n, m, width, storage, d, stride,
    RAGGED: tl.constexpr, BIAS: tl.constexpr, N: tl.constexpr, E: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """``out[i] = Σ_e values[e] · weight[indices[e]] + bias`` for N rows and D columns."""
    i = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    cols = tl.program_id(1) * D + tl.arange(0, D)
    first, count = row_entries(offsets, i, i < n, width, storage, RAGGED)
    acc = tl.zeros([N, D], dtype=tl.float32)
    for start in range(0, tl.max(count, axis=0), E):
        place = start + tl.arange(0, E)
        used = place[None, :] < count[:, None]
        at = first[:, None] + place[None, :]
        latent = tl.load(indices + at, mask=used, other=0)
        value = tl.load(values + at, mask=used, other=0.0).to(tl.float32)
        inside = (latent >= 0) & (latent < m)
        rows = gathered(weight, latent.to(tl.int64), stride, cols, d, inside & (value != 0))
        value = tl.where(inside, value, float("nan"))  # no such latent: the row shows it
        acc += tl.sum(value[:, :, None] * rows, axis=1)
    if BIAS:
        acc += tl.load(bias + cols, mask=cols < d, other=0.0).to(tl.float32)[None, :]
    mask = (i < n)[:, None] & (cols < d)[None, :]
    tl.store(out + i[:, None] * d + cols[None, :], acc.to(out.dtype.element_ty), mask=mask)


def decode(codes: Codes, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``[n, d]`` sums of the rows of `weight` ``[m, d]``, in `dtype`."""
    d, weight = weight.shape[1], contiguous_rows(weight)
    out = torch.empty(codes.n, d, dtype=dtype, device=weight.device)
    if not out.numel():
        return out
    tile = gather_tile(d, weight.element_size())
    decode_kernel[(cdiv(codes.n, tile.rows), cdiv(d, tile.columns))](
        codes.values, codes.indices, codes.offsets, weight, None if bias is None else bias.contiguous(), out,
        codes.n, codes.m, codes.width, codes.storage, d, weight.stride(0),
        RAGGED=codes.offsets is not None, BIAS=bias is not None, **tile.sizes,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["n", "m", "width", "storage", "groups"])
def dots_kernel(
    dots, source, indices, offsets, weight, prefixes, n, m, width, storage, groups, d, stride_source, stride,
    RAGGED: tl.constexpr, GROUPED: tl.constexpr, BY_RANK: tl.constexpr,
    N: tl.constexpr, E: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """``dots[block, e] = source[row of e] · weight[indices[e]]`` over a block of D columns, for the entries of N rows.

    GROUPED: the row is ``group·n + row``.
    """
    i = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    cols = tl.program_id(1) * D + tl.arange(0, D)
    first, count = row_entries(offsets, i, i < n, width, storage, RAGGED)
    mask = (i < n)[:, None] & (cols < d)[None, :]
    if not GROUPED:
        met = tl.load(source + i[:, None] * stride_source + cols[None, :], mask=mask, other=0.0)
        met = met.to(tl.float32)[:, None, :]
    for start in range(0, tl.max(count, axis=0), E):
        place = start + tl.arange(0, E)
        used = place[None, :] < count[:, None]
        at = first[:, None] + place[None, :]
        latent = tl.load(indices + at, mask=used, other=-1)
        inside = (latent >= 0) & (latent < m)
        rows = gathered(weight, latent.to(tl.int64), stride, cols, d, inside)
        if GROUPED:
            group = group_of(prefixes, groups, latent, place[None, :] + tl.zeros_like(latent), BY_RANK)
            met = gathered(source, group.to(tl.int64) * n + i[:, None], stride_source, cols, d, inside)
        dot = tl.sum(met * rows, axis=2)
        tl.store(dots + tl.program_id(1).to(tl.int64) * storage + at, dot, mask=used)


@triton.jit(do_not_specialize=["n", "m", "width", "storage", "blocks"])
def join_dots_kernel(out, dots, scale, indices, offsets, n, m, width, storage, blocks,
                     RAGGED: tl.constexpr, SCALED: tl.constexpr, B: tl.constexpr):  # fmt: skip
    """``out[e] = scale · Σ_block dots[block, e]``, blocks in order; 0 where there is no entry or no such latent."""
    e = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    used = e < used_entries(offsets, n, width, storage, RAGGED)
    latent = tl.load(indices + e, mask=used, other=-1)
    used &= (latent >= 0) & (latent < m)
    total, at = tl.zeros([B], dtype=tl.float32), e
    for _ in range(0, blocks):
        total += tl.load(dots + at, mask=used, other=0.0)
        at += storage
    if SCALED:
        total *= tl.load(scale).to(tl.float32)
        total = tl.where(used, total, 0.0)
    tl.store(out + e, total.to(out.dtype.element_ty), mask=e < storage)


def join_dots(dots: Tensor, codes: Codes, out: Tensor, scale: Tensor | None = None) -> Tensor:
    """The dots over all columns into `out`, from those over blocks of them ``[blocks, storage]``."""
    if out.numel():
        join_dots_kernel[(cdiv(codes.storage, BLOCK),)](
            out, dots, scale, codes.indices, codes.offsets, codes.n, codes.m, codes.width, codes.storage, dots.shape[0],
            RAGGED=codes.offsets is not None, SCALED=scale is not None, B=BLOCK,
        )  # fmt: skip
    return out


def value_gradients(
    codes: Codes,
    source: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
    scale: Tensor | None = None,
    prefixes: Tensor | None = None,
    by_rank: bool = False,
) -> Tensor:
    """``scale · source[row] · weight[latent]`` of every stored entry, shaped as the values.

    With several `prefixes` (int32), `source` is ``[prefixes, n, d]`` and an entry meets the row of its group.
    """
    d, weight = weight.shape[1], contiguous_rows(weight)
    source = contiguous_rows(source) if prefixes is None else source.reshape(-1, d)
    tile = gather_tile(d, weight.element_size())
    dots = torch.empty(cdiv(d, tile.columns), codes.storage, dtype=torch.float32, device=weight.device)
    if codes.n and codes.storage:
        dots_kernel[(cdiv(codes.n, tile.rows), dots.shape[0])](
            dots, source, codes.indices, codes.offsets, weight, prefixes,
            codes.n, codes.m, codes.width, codes.storage, 1 if prefixes is None else len(prefixes), d,
            source.stride(0), weight.stride(0),
            RAGGED=codes.offsets is not None, GROUPED=prefixes is not None, BY_RANK=by_rank, **tile.sizes,
        )  # fmt: skip
    return join_dots(dots, codes, torch.empty(codes.values.shape, dtype=dtype, device=weight.device), scale)
