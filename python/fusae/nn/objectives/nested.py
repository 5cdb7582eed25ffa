# SPDX-License-Identifier: Apache-2.0
"""Training losses of nested reconstructions: from the first latents, or from the first of every row's codes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ... import _checks, _fields
from ...codes import SparseCodes
from .base import CoderLoss, Moment, aux_loss, fit, rows, variance_of, wants

if TYPE_CHECKING:
    from ..coder import SparseCoder


@dataclasses.dataclass(frozen=True)
class Matryoshka:
    """The error of every nested dictionary: of the first ``prefixes[0]`` latents, the first ``prefixes[1]``, up to all.

    Bussmann et al. 2025, arXiv:2503.17547, over a batch top-k; also over 'topk', 'abs' and 'group_max'. One gather of
    decoder rows serves all prefixes. AuxK is that of `TopK`, on the residual of the whole dictionary.

    Attributes:
        prefixes: widths of the nested dictionaries, ascending to m. SAEBench's are m times 1/32, 3/32, 7/32, 15/32, 1.
        weights: of their errors in the loss; None: all 1, as in the paper (dictionary_learning: 1 / their number).
        aux_coefficient: as in `TopK`.
        threshold_decay: as in `BatchTopK`.

    Equivalent to::

        mse = [(y - f[:, :p] @ W_dec[:p] - b_dec).square().sum(-1).mean() / variance for p in prefixes]
        loss = sum(w * e for w, e in zip(weights, mse)) + aux_coefficient * aux
    """

    prefixes: tuple[int, ...]
    weights: tuple[float, ...] | None = None
    aux_coefficient: float = 1 / 32
    threshold_decay: float = 0.999

    def __post_init__(self) -> None:
        check_prefixes(self)
        _fields.number("aux_coefficient", self.aux_coefficient)
        _fields.number("threshold_decay", self.threshold_decay, 0.0, 1.0)

    def __call__(self, coder: SparseCoder, x: Tensor, target: Tensor | None, moment: Moment) -> CoderLoss:
        wants(coder, self, ("batch_topk", "topk", "abs", "group_max"))
        x, target = rows(coder, x, target)
        codes, smallest, aux = coder.select(x, moment.dead, moment.k_aux)
        loss = _nested_loss(coder, x, target, moment, codes, aux, self.aux_coefficient, self.prefixes, self.weights)
        if smallest is not None:
            coder.update_threshold_(smallest, self.threshold_decay, moment.step)
        return loss


@dataclasses.dataclass(frozen=True)
class HierarchicalTopK:
    """The mean error of the reconstructions from a row's best latent, its best two, up to its best k.

    Balagansky et al. 2025, arXiv:2505.24473: one dictionary for every k. For select 'topk' and 'abs', which rank. AuxK
    is that of `TopK`, on the residual of all k.

    Attributes:
        ranks: how many of the best latents each reconstruction has, ascending to k; None: 1 to k, as in the paper. The
            backward pass keeps a row of width d for every rank, so that few ranks take less memory for a large k.
        aux_coefficient: as in `TopK`.

    Equivalent to::

        steps = values[..., None] * W_dec[indices]  # [n, k, d], best latent first
        errors = (y[:, None] - steps.cumsum(1) - b_dec).square().sum(-1)
        loss = errors.mean() / variance + aux_coefficient * aux
    """

    ranks: tuple[int, ...] | None = None
    aux_coefficient: float = 1 / 32

    def __post_init__(self) -> None:
        if self.ranks is not None:
            object.__setattr__(self, "ranks", ascending("ranks", self.ranks))
        _fields.number("aux_coefficient", self.aux_coefficient)

    def __call__(self, coder: SparseCoder, x: Tensor, target: Tensor | None, moment: Moment) -> CoderLoss:
        wants(coder, self, ("topk", "abs"))
        x, target = rows(coder, x, target)
        codes, _, aux = coder.select(x, moment.dead, moment.k_aux)
        k = coder.config.k
        ranks = self.ranks or tuple(range(1, k + 1))
        if ranks[-1] != k:
            raise ValueError(f"ranks must end with the coder's k = {k}, got {list(ranks)}")
        weights = (1 / len(ranks),) * len(ranks)
        return _nested_loss(coder, x, target, moment, codes, aux, self.aux_coefficient, ranks, weights, "rank")


def ascending(name: str, values: Sequence[int]) -> tuple[int, ...]:
    """Whole numbers of at least 1, each larger than the last, as a tuple."""
    if not isinstance(values, (tuple, list)) or not values:
        raise TypeError(f"{name} must be a tuple of ascending whole numbers, got {values!r}")
    for value in values:
        _fields.whole(name, value, 1)
    if any(b <= a for a, b in zip(values, values[1:], strict=False)):
        raise ValueError(f"{name} must ascend, got {list(values)}")
    return tuple(values)


def check_prefixes(objective: object) -> None:
    """`prefixes` and `weights` of an objective as tuples, checked against each other."""
    object.__setattr__(objective, "prefixes", ascending("prefixes", objective.prefixes))
    weights = objective.weights
    if weights is None:
        return
    if not isinstance(weights, (tuple, list)) or len(weights) != len(objective.prefixes):
        raise ValueError(f"weights must be {len(objective.prefixes)} numbers, one for each prefix, got {weights!r}")
    for weight in weights:
        _fields.number("weights", weight)
    object.__setattr__(objective, "weights", tuple(weights))


def nested_terms(prefixes: Sequence[int], mse: Tensor, prefix: str = "mse_") -> dict[str, Tensor]:
    """The errors of all but the whole, by name."""
    return {f"{prefix}{p}": value for p, value in zip(prefixes[:-1], mse.unbind(), strict=False)}


def _nested_loss(
    coder: SparseCoder,
    x: Tensor,
    target: Tensor,
    moment: Moment,
    codes: SparseCodes,
    aux_codes: SparseCodes | None,
    aux_coefficient: float,
    prefixes: Sequence[int],
    weights: Sequence[float] | None,
    nested: str = "latents",
) -> CoderLoss:
    found = fit(coder, codes, x, target, variance_of(target, moment.variance), prefixes, weights, nested)
    loss, aux = found.loss, None
    if aux_codes is not None:
        extra = coder.decode_rows(aux_codes)
        error = -found.residual.to(_checks.accumulator(found.residual.dtype))
        aux = aux_loss(error, extra, moment.dead)
        loss, aux = loss + aux_coefficient * aux, aux.detach()
    terms = nested_terms(prefixes, found.mse)
    return CoderLoss(loss, found.mse[-1], aux, found.sse, codes.detach(), found.reconstruction, terms)
