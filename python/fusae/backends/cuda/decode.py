# SPDX-License-Identifier: Apache-2.0
"""Decoders and losses: gathers by row."""

from __future__ import annotations

from torch import Tensor

from .codes import Codes
from .native import DTYPES, module, ptr, stream, table


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


TABLE = table(decode_fwd)
