# SPDX-License-Identifier: Apache-2.0
"""What a loss asks of a decoder."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..codes import SparseCodes
from ..ops import decode, decode_loss
from ..ops.decode_loss import DecodeLoss


class Decoding:
    """Of a module with `W_dec` ``[m, d_out]``, `b_dec` ``[d_out]`` and `sparse_grad`. One that holds a part of the
    latents only overrides both."""

    W_dec: Tensor
    b_dec: Tensor
    sparse_grad: bool

    def decode_rows(self, codes: SparseCodes) -> Tensor:
        """``Σ_j v_j W_dec[i_j]`` ``[..., d_out]``, without `b_dec`."""
        return decode(codes, self.W_dec, sparse_grad=self.sparse_grad)

    def decode_loss(
        self,
        codes: SparseCodes,
        target: Tensor,
        prefixes: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        nested: str = "latents",
    ) -> DecodeLoss:
        """`fusae.decode_loss` of this decoder."""
        return decode_loss(
            codes, self.W_dec, self.b_dec, target, prefixes, weights, nested=nested, sparse_grad=self.sparse_grad
        )
