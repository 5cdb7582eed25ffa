# SPDX-License-Identifier: Apache-2.0
"""Training losses of top-k coders: of a row, by magnitude, by group, and of a whole batch."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from torch import Tensor

from ... import _checks, _fields
from ...codes import SparseCodes
from ..sums import total
from .base import CoderLoss, Moment, aux_loss, decode_together, rows, variance_of, wants

if TYPE_CHECKING:
    from ..coder import SparseCoder

# Multi-TopK: the second reconstruction is from this many times k latents.
_MULTI = 4


@dataclasses.dataclass(frozen=True)
class TopK:
    """Normalised squared error, plus AuxK for dead latents (Gao et al. 2024, arXiv:2406.04093).

    For every selection of a fixed number of latents in each row: 'topk', 'abs' (AbsTopK, arXiv:2510.00404) and
    'group_max'.

    Attributes:
        aux_coefficient: weight of the AuxK term. The dead latents' best `k_aux` reconstruct the residual (detached),
            without `b_dec`; normalised by the variance of the residual.
        multi_topk: weight of the error of the reconstruction from the best 4k latents (Multi-TopK; 1/8 in the paper),
            which come from the same pass; at most m of them. Not for 'group_max'.

    No host sync. Sums do not depend on the number of threads. With dead latents or Multi-TopK, a reconstruction in a
    16-bit dtype is rounded once before `b_dec` is added and once after; without, only after.

    Equivalent to::

        mse = (y - y_hat).square().sum(-1).mean() / variance
        e = (y - y_hat).detach()
        aux = (e - e_hat).square().sum(-1).mean() / (e - e.mean(0)).square().sum(-1).mean()
        loss = mse + aux_coefficient * aux + multi_topk * (y - y_hat_4k).square().sum(-1).mean() / variance
    """

    aux_coefficient: float = 1 / 32
    multi_topk: float = 0.0

    def __post_init__(self) -> None:
        _fields.number("aux_coefficient", self.aux_coefficient)
        _fields.number("multi_topk", self.multi_topk)

    def __call__(self, coder: SparseCoder, x: Tensor, target: Tensor | None, moment: Moment) -> CoderLoss:
        wants(coder, self, ("topk", "abs") if self.multi_topk else ("topk", "abs", "group_max"))
        x, target = rows(coder, x, target)
        k, rest = coder.config.k, None
        wide = min(_MULTI * k, coder.config.m) if self.multi_topk else k
        codes, _, aux = coder.select(x, moment.dead, moment.k_aux, wide)
        if self.multi_topk:  # in order of rank
            values, indices = codes.values, codes.indices
            codes, rest = (SparseCodes(values[:, p], indices[:, p], codes.m) for p in (slice(k), slice(k, None)))
        return topk_loss(coder, x, target, moment, codes, aux, self.aux_coefficient, rest, self.multi_topk)


@dataclasses.dataclass(frozen=True)
class BatchTopK:
    """The loss of `TopK` for the n·k largest pre-activations of a batch (Bussmann et al. 2024, arXiv:2412.06410).

    For select 'batch_topk'; with ``select_by_norm`` the ranking is by pre-activation times decoder norm, for a
    crosscoder (``sites``) times the sum of its sites' norms (Minder et al. 2025, arXiv:2504.02922).

    Attributes:
        aux_coefficient: as in `TopK`.
        threshold_decay: of the running mean of the smallest selected score, ``coder.threshold``, which selects in eval
            mode (0.999 in dictionary_learning, 0.99 in SAELens). Every call in training mode updates it; while
            ``moment.step`` is small, the mean is over fewer steps.

    Equivalent to: `TopK` with the codes::

        best = torch.topk(pre.relu().flatten(), n * k)
        f = torch.zeros(n * m).scatter(0, best.indices, best.values).view(n, m)
    """

    aux_coefficient: float = 1 / 32
    threshold_decay: float = 0.999

    def __post_init__(self) -> None:
        _fields.number("aux_coefficient", self.aux_coefficient)
        _fields.number("threshold_decay", self.threshold_decay, 0.0, 1.0)

    def __call__(self, coder: SparseCoder, x: Tensor, target: Tensor | None, moment: Moment) -> CoderLoss:
        wants(coder, self, ("batch_topk",))
        x, target = rows(coder, x, target)
        codes, smallest, aux = coder.select(x, moment.dead, moment.k_aux)
        loss = topk_loss(coder, x, target, moment, codes, aux, self.aux_coefficient)
        if smallest is not None:
            coder.update_threshold_(smallest, self.threshold_decay, moment.step)
        return loss


def topk_loss(
    coder: SparseCoder,
    x: Tensor,
    target: Tensor,
    moment: Moment,
    codes: SparseCodes,
    aux_codes: SparseCodes | None,
    aux_coefficient: float,
    rest: SparseCodes | None = None,
    multi_topk: float = 0.0,
) -> CoderLoss:
    """The loss of selected codes; `rest` are the codes that Multi-TopK has in addition."""
    parts = [part for part in (aux_codes, rest, codes) if part is not None]
    if len(parts) == 1:
        reconstruction = coder.decode(codes, x)
    else:
        *others, reconstruction = decode_together(coder, parts)
        reconstruction = coder.add_skip(reconstruction + coder.b_dec, x)
    acc = _checks.accumulator(x.dtype)
    variance = variance_of(target, moment.variance)
    error = reconstruction.to(acc) - target.to(acc)
    sse = total(error.square())
    mse = sse / len(x) / variance
    loss, aux, terms = mse, None, {}
    if aux_codes is not None:
        aux = aux_loss(error.detach(), others[0], moment.dead)
        loss = loss + aux_coefficient * aux
    if rest is not None:
        multi = total((error + others[-1].to(acc)).square()) / len(x) / variance
        loss, terms["multi_topk"] = loss + multi_topk * multi, multi.detach()
    return CoderLoss(
        loss,
        mse.detach(),
        None if aux is None else aux.detach(),
        sse.detach(),
        codes.detach(),
        reconstruction.detach(),
        terms,
    )
