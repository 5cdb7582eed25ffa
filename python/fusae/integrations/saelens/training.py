# SPDX-License-Identifier: Apache-2.0
"""SAELens' training SAEs on fused forward and backward passes.

SAELens' own ``training_forward_pass`` puts the losses together. Its `feature_acts` and `hidden_pre` are tensors that
are written on demand: from the codes, and from the weights as long as they are those of the step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor

from ...codes import SparseCodes
from .._later import Activations, Later
from ._base import FastSAE, lazily, lazy


class PreActivations(Later):
    """``hidden_pre``, computed when it is read. Weights or inputs that have changed since the step are noticed.

    Args:
        shape: of the tensor.
        codes: activations as the step found them, to hold it against.
        make: computes it.
        extra: what the architecture's loss needs besides.
    """

    @staticmethod
    def __new__(
        cls, shape: torch.Size, codes: SparseCodes, make: Callable[[], Tensor], extra: object
    ) -> PreActivations:
        return cls._wrapper(shape, codes.dtype, codes.device)

    def __init__(self, shape: torch.Size, codes: SparseCodes, make: Callable[[], Tensor], extra: object) -> None:
        super().__init__(shape, codes.dtype, codes.device, lambda: self._checked(make))
        device = codes.device.type
        self.known, self.extra = codes, extra
        self.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)

    def _checked(self, make: Callable[[], Tensor]) -> Tensor:
        with torch.autocast(*self.autocast):
            pre = make()
        known = self.known.detach().flatten()
        if known.is_ragged:
            used = slice(known._used())
            rows, latents, then = known.row_ids()[used], known.indices[used].long(), known.values[used]
        else:
            rows = torch.arange(len(known), device=pre.device)[:, None]
            latents, then = known.indices.long(), known.values
        now = pre.detach().reshape(-1, pre.shape[-1])[rows, latents]
        eps = torch.finfo(self.autocast[1] if self.autocast[2] else known.dtype).eps
        wrong = torch.where(then == 0, 0.0, (now - then).abs())  # 0: not above its threshold, and not kept
        if then.numel() and float(wrong.max()) > 128 * eps * float(then.abs().max()):
            raise RuntimeError(
                "hidden_pre was not kept, and weights or inputs have changed since the step: read it before the "
                "optimiser steps, or put a hook on hook_sae_acts_pre"
            )
        return pre


class FastTraining(FastSAE):
    """Methods of an accelerated training SAE."""

    def _fusae_hidden_pre(self, sae_in: Tensor) -> Tensor:
        """What the tool calls hidden_pre, of processed inputs."""
        return sae_in @ self.W_enc + self.b_enc

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self._fusae_aside() or lazy(self) is None:
            return super().encode_with_hidden_pre(x)
        sae_in, encoded = self._fusae_codes(x)
        if encoded is None:
            with self._fusae_given(sae_in):
                return super().encode_with_hidden_pre(x)
        batch = sae_in.shape[:-1]
        acts = self._fusae_handed_out(encoded, batch, True)
        known = Activations(encoded.codes, batch, encoded.scale).scaled()
        shape = (*batch, self.W_enc.shape[1])
        return acts, PreActivations(shape, known, lambda: self._fusae_hidden_pre(sae_in), encoded.extra)

    def _fusae_lazily(self, step_input: TrainStepInput) -> contextlib.AbstractContextManager:
        return lazily(self)

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        if self._fusae_aside():
            return super().training_forward_pass(step_input)
        with self._fusae_lazily(step_input):
            return super().training_forward_pass(step_input)

    def process_state_dict_for_saving(self, state_dict: dict) -> None:
        super().process_state_dict_for_saving(state_dict)
        for name, value in state_dict.items():  # safetensors wants them so
            state_dict[name] = value.contiguous()


def extra_of(hidden_pre: Tensor) -> object:
    """What the fused encoder left for the loss; None where the tool's own code encoded."""
    return hidden_pre.extra if isinstance(hidden_pre, PreActivations) else None


def codes_of(feature_acts: Tensor) -> SparseCodes | None:
    """The codes of activations that nobody has made dense; differentiable."""
    return feature_acts.scaled() if isinstance(feature_acts, Activations) and feature_acts.sparse else None
