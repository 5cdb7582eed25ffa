# SPDX-License-Identifier: Apache-2.0
"""The average of the weights over the steps of a run, with weights that fall off exponentially."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class WeightAverage:
    """``Σ_t (1 - decay) decay^(T-t) W_t / (1 - decay^T)`` over the weights after steps 1 to T, bias-corrected as Adam's
    moments are (Gao et al. 2024, arXiv:2406.04093, average so with decay 0.999). Costs one pass over the weights a step
    and a copy of them in their dtype.

    Attributes:
        sums: by name of the parameter; the sum before its correction.
        steps: T.

    Equivalent to: ``sum = decay * sum + (1 - decay) * W`` each step, from 0; ``sum / (1 - decay ** T)`` in the end.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.sums = {name: torch.zeros_like(p, requires_grad=False) for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the weights of `module` after a step."""
        torch._foreach_lerp_(list(self.sums.values()), list(module.parameters()), 1 - self.decay)
        self.steps += 1

    def weights(self) -> dict[str, Tensor]:
        """The average, a new tensor for every parameter. At least one step must have been taken."""
        correction = 1 - self.decay**self.steps
        return {name: value / correction for name, value in self.sums.items()}
