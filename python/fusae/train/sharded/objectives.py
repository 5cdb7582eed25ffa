# SPDX-License-Identifier: Apache-2.0
"""The losses of forms whose penalties are sums over latents, each of which is on one rank."""

from __future__ import annotations

from torch import Tensor

from ...nn.objectives import CoderLoss, JumpReLU, Moment, Objective
from ...nn.objectives.base import fit, rows, variance_of
from ...nn.objectives.nested import nested_terms
from ..config import TrainConfig
from ..forms import objective
from .coder import ShardedCoder


class Penalised:
    """The loss of a `ReLU` or `JumpReLU` whose penalty is a sum over latents, of those of all ranks."""

    def __init__(self, form: Objective) -> None:
        self.form = form

    def __call__(self, coder: ShardedCoder, x: Tensor, target: Tensor | None, moment: Moment) -> CoderLoss:
        x, target = rows(coder, x, target)
        codes, charge, terms = self.form.choose(coder, x, moment)
        charge, terms = coder.summed(charge), {name: coder.summed(value) for name, value in terms.items()}
        prefixes = self.form.prefixes if isinstance(self.form, JumpReLU) else None
        weights = self.form.weights if prefixes else None
        found = fit(coder, codes, x, target, variance_of(target, moment.variance), prefixes, weights)
        if prefixes:
            terms |= nested_terms(prefixes, found.mse)
        return CoderLoss(
            found.loss + charge, found.mse[-1], None, found.sse, codes.detach(), found.reconstruction, terms
        )


def sharded_objective(config: TrainConfig) -> Objective:
    """`fusae.train.forms.objective` for a `ShardedCoder`."""
    form = objective(config)
    return Penalised(form) if config.form in ("relu", "jumprelu") else form
