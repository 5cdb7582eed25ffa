# SPDX-License-Identifier: Apache-2.0
"""Decoders and losses: gathers by row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .codes import Codes
from .native import DTYPES, module, ptr, stream, table, why_not


def decode(codes: Codes, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``[n, d]`` sums of the rows of `weight` ``[m, d]``, in its dtype."""
    d, weight = weight.shape[1], weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = weight.new_empty(codes.n, d)
    module().decode(codes.tuple(), *map(ptr, (weight, bias, out)), DTYPES[out.dtype], d, stream(out))
    return out


def decode_fwd(
    values: Tensor, indices: Tensor, offsets: Tensor | None, W_dec: Tensor, b_dec: Tensor | None
) -> Tensor:
    return decode(Codes.of(values, indices, offsets, W_dec.shape[0]), W_dec, b_dec)


def value_gradients(
    codes: Codes,
    source: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    prefixes: list[int] | None = None,
    by_rank: bool = False,
) -> Tensor:
    """``scale · source[row] · weight[latent]`` of every stored entry, shaped as the values.

    With several `prefixes`, `source` is ``[prefixes, n, d]`` and an entry meets the row of its group.
    """
    source, weight = source.contiguous(), weight.contiguous()
    out = torch.zeros(codes.values.shape, dtype=codes.values.dtype, device=source.device)  # no row has all the storage
    module().dots(
        codes.tuple(), ptr(source), ptr(weight), DTYPES[weight.dtype], prefixes or [], by_rank, ptr(scale), ptr(out),
        DTYPES[out.dtype], weight.shape[1], stream(out),
    )  # fmt: skip
    return out


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
    (m, d), groups, device = W_dec.shape, len(prefixes), W_dec.device
    codes = Codes.of(values, indices, offsets, m)
    W_dec, target = W_dec.contiguous(), target.contiguous()
    b_dec = None if b_dec is None else b_dec.contiguous()
    need_mixed = need_mixed and groups > 1
    squares = torch.empty(groups, codes.n, dtype=torch.float32, device=device)
    residual = W_dec.new_empty(codes.n, d)
    mixed = W_dec.new_empty((groups, codes.n, d) if need_mixed else 0)
    dots = torch.zeros(values.shape if need_dots else 0, dtype=torch.float32, device=device)
    # Where a block's shared memory does not hold the residuals of a row.
    near = module().loss_plan(d, groups, 0, W_dec.element_size(), True, need_dots, module().shared_limit())[0]
    kept = None
    if (need_mixed or need_dots) and not near:
        kept = torch.empty(groups, codes.n, d, dtype=torch.float32, device=device)
    module().decode_loss(
        codes.tuple(), ptr(W_dec), ptr(b_dec), DTYPES[W_dec.dtype], ptr(target), DTYPES[target.dtype], prefixes,
        by_rank, weights, ptr(squares), ptr(residual), ptr(mixed) if need_mixed else 0, ptr(dots) if need_dots else 0,
        ptr(kept), d, stream(W_dec),
    )  # fmt: skip
    return squares.sum(1, dtype=torch.float64).float(), residual, mixed, dots


def _why_not_loss(*args: Any, **kwargs: Any) -> str | None:
    prefixes = kwargs["prefixes"] if "prefixes" in kwargs else args[6]
    if len(prefixes) > module().MAX_GROUPS:
        return f"at most {module().MAX_GROUPS} prefixes, got {len(prefixes)}"
    return why_not(*args, **kwargs)


TABLE = table(decode_fwd) | table(decode_loss_fwd, why=_why_not_loss)
