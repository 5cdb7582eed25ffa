# SPDX-License-Identifier: Apache-2.0
"""Decoders and losses: gathers by row."""

from __future__ import annotations

from torch import Tensor

from ...kernels import decode as decoder
from ...kernels import decode_loss as loss
from .available import table
from .checks import codes_of


def decode_fwd(
    values: Tensor, indices: Tensor, offsets: Tensor | None, W_dec: Tensor, b_dec: Tensor | None
) -> Tensor:
    codes = codes_of(values, indices, offsets, W_dec.shape[0])
    return decoder.decode(codes, W_dec, b_dec, W_dec.dtype)


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
    codes = codes_of(values, indices, offsets, W_dec.shape[0])
    return loss.decode_loss(codes, W_dec, b_dec, target, prefixes, weights, by_rank, need_mixed, need_dots)


TABLE = table(decode_fwd, decode_loss_fwd)
