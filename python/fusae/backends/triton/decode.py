# SPDX-License-Identifier: Apache-2.0
"""Decoders: gathers by row."""

from __future__ import annotations

from torch import Tensor

from ...kernels import decode as kernels
from .available import table
from .checks import codes_of


def decode_fwd(
    values: Tensor, indices: Tensor, offsets: Tensor | None, W_dec: Tensor, b_dec: Tensor | None
) -> Tensor:
    codes = codes_of(values, indices, offsets, W_dec.shape[0])
    return kernels.decode(codes, W_dec, b_dec, W_dec.dtype)


TABLE = table(decode_fwd)
