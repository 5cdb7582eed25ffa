# SPDX-License-Identifier: Apache-2.0
"""The average of the weights over the steps of a run, with weights that fall off exponentially."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..nn import CrossLayerTranscoder, SparseCoder
from ..nn.sums import running_

#: steps between two looks at what the averaged weights of a batch top-k select
EVERY = 16


class WeightAverage:
    """``Σ_t (1 - decay) decay^(T-t) W_t / (1 - decay^T)`` over the weights after steps 1 to T, bias-corrected as Adam's
    moments are (Gao et al. 2024, arXiv:2406.04093, average so with decay 0.999). Costs one pass over the weights a step
    and a copy of them in their dtype.

    A batch top-k has a threshold in use, and that of the weights in training is not the averaged weights' own. So in
    every step of number 1, 1 + `EVERY`, ... the averaged weights select from the batch too, and the smallest score that
    they select goes into a running mean of their own, which spans as many steps as the other one.

    Attributes:
        sums: by name of the parameter; the sum before its correction.
        thresholds: by name of the buffer, of a batch top-k.
        steps: T.

    Equivalent to: ``sum = decay * sum + (1 - decay) * W`` each step, from 0; ``sum / (1 - decay ** T)`` in the end.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.sums = {name: torch.zeros_like(p, requires_grad=False) for name, p in module.named_parameters()}
        self.thresholds = {name: torch.zeros_like(value) for name, value in module.named_buffers()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the weights of `module` after a step."""
        torch._foreach_lerp_(list(self.sums.values()), list(module.parameters()), 1 - self.decay)
        self.steps += 1

    def weights(self) -> dict[str, Tensor]:
        """The average, a new tensor for every parameter. At least one step must have been taken."""
        correction = 1 - self.decay**self.steps
        return {name: value / correction for name, value in self.sums.items()}

    @torch.no_grad()
    def measure(self, coder: SparseCoder | CrossLayerTranscoder, x: Tensor, decay: float, unit_decoder: bool) -> None:
        """Take what the averaged weights select of the batch `x` ``[n, d]`` into their thresholds, where it is time.

        Args:
            coder: whose weights are averaged, in training; has the average in their place meanwhile.
            x: as it is trained on.
            decay: of the running mean, a step.
            unit_decoder: decoder rows of the average are brought back to unit norm before it is used.
        """
        if not self.thresholds or (self.steps - 1) % EVERY:
            return
        correction, kept = 1 - self.decay**self.steps, {}
        try:
            for name, parameter in coder.named_parameters():
                if name.endswith("W_dec") and (unit_decoder or not coder.config.select_by_norm):
                    continue  # selects by norms that are 1 here and there, or not at all
                kept[parameter] = parameter.data
                parameter.data = self.sums[name] / correction
            found = coder.select(x)
        finally:
            for parameter, value in kept.items():
                parameter.data = value
        found = found if isinstance(found, list) else [found]
        for threshold, (_, smallest, _) in zip(self.thresholds.values(), found, strict=True):
            running_(threshold, smallest, decay, self.steps - 1, EVERY)
