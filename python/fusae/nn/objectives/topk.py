# SPDX-License-Identifier: Apache-2.0
"""Training losses of top-k coders: of a row, of a batch, by magnitude, by group."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from torch import Tensor

from ... import _checks
from ..sums import total
from .base import CoderLoss, Moment, aux_loss, decode_both, rows, variance_of

if TYPE_CHECKING:
    from ..coder import SparseCoder


@dataclasses.dataclass(frozen=True)
class TopK:
    """Normalised squared error, plus AuxK for dead latents (Gao et al. 2024, arXiv:2406.04093).

    For every selection of a fixed number of latents: 'topk', 'abs' (AbsTopK), 'group_max', and 'batch_topk' (Bussmann
    et al. 2024, arXiv:2412.06410).

    Attributes:
        aux_coefficient: weight of the AuxK term. The dead latents' best `k_aux` reconstruct the residual (detached),
            without `b_dec`; normalised by the variance of the residual.

    No host sync. Sums do not depend on the number of threads. With dead latents, a reconstruction in a 16-bit dtype is
    rounded once before `b_dec` is added and once after; without, only after.

    Equivalent to::

        mse = (y - y_hat).square().sum(-1).mean() / variance
        e = (y - y_hat).detach()
        aux = (e - e_hat).square().sum(-1).mean() / (e - e.mean(0)).square().sum(-1).mean()
        loss = mse + aux_coefficient * aux
    """

    aux_coefficient: float = 1 / 32

    def __call__(self, coder: SparseCoder, x: Tensor, target: Tensor | None, moment: Moment) -> CoderLoss:
        x, target = rows(coder, x, target)
        if moment.dead is None:
            codes, aux_reconstruction = coder.encode(x), None
            reconstruction = coder.decode(codes, x)
        else:
            codes, aux_codes = coder.encode(x, moment.dead, moment.k_aux)
            reconstruction, aux_reconstruction = decode_both(coder, codes, aux_codes)
            reconstruction = coder.add_skip(reconstruction, x)
        acc = _checks.accumulator(x.dtype)
        error = reconstruction.to(acc) - target.to(acc)
        sse = total(error.square())
        mse = sse / len(x) / variance_of(target, moment.variance)
        loss, aux = mse, None
        if aux_reconstruction is not None:
            aux = aux_loss(error.detach(), aux_reconstruction, moment.dead)
            loss = mse + self.aux_coefficient * aux
        return CoderLoss(
            loss,
            mse.detach(),
            None if aux is None else aux.detach(),
            sse.detach(),
            codes.detach(),
            reconstruction.detach(),
        )
