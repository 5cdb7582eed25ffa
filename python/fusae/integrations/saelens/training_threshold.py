# SPDX-License-Identifier: Apache-2.0
"""Training steps of SAEs whose latents are active above a threshold: ReLU with a penalty, JumpReLU, gated."""

from __future__ import annotations

import torch
from sae_lens.saes.jumprelu_sae import calculate_pre_act_loss
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

from ...codes import SparseCodes
from ...ops import decode, encode_threshold
from .._dense import DENSE, hooked
from .._later import made
from ._base import Encoded, at, lazy, plain, sampled_density
from .inference import FastGated, FastStandard, in_dtype
from .training import FastTraining, codes_of, extra_of


def row_sums(values: Tensor, codes: SparseCodes) -> Tensor:
    """Sum of the entries of every row, ``[n]``."""
    n = codes.offsets.shape[0] - 1
    return values.new_zeros(n + 1).index_add(0, codes.row_ids(), values)[:n]


class FastStandardTraining(FastTraining, FastStandard):
    """ReLU and an L1 penalty."""

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        codes = codes_of(feature_acts)
        if codes is None or self.cfg.lp_norm != 1:
            return super().calculate_aux_loss(step_input, made(feature_acts), made(hidden_pre), sae_out)
        sparsity = row_sums(codes.values * at(self.W_dec.norm(dim=1), codes), codes)
        return {"l1_loss": (step_input.coefficients["l1"] * sparsity).mean()}


class FastJumpReLUTraining(FastTraining):
    """JumpReLU with straight-through gradients in a window around the threshold."""

    def _fusae_fits(self, x: Tensor) -> bool:
        threshold, m = self.threshold, self.W_enc.shape[-1]
        fits = threshold.dtype == torch.float32 and threshold.shape == (m,) and threshold.device == self.W_enc.device
        return fits and self.bandwidth > 0 and super()._fusae_fits(x)

    def _fusae_encode(self, x: Tensor) -> Encoded | None:
        W_enc, b_enc = self.W_enc, self.b_enc
        threshold = self.threshold.to(b_enc.dtype).float()  # the tool compares in the dtype of the weights
        if sampled_density(x, W_enc, b_enc, threshold.detach() - self.bandwidth / 2) > DENSE:
            return None
        codes, l0 = encode_threshold(
            x, W_enc.T, b_enc, threshold, bandwidth=self.bandwidth, straight_through=self.cfg.jumprelu_ste_to_input
        )
        return Encoded(in_dtype(codes, b_enc), extra=(x, l0))

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        codes, extra, cfg = codes_of(feature_acts), extra_of(hidden_pre), self.cfg
        mode, target_l0 = cfg.jumprelu_sparsity_loss_mode, cfg.target_l0
        known = mode in ("step", "tanh") or (mode == "quadratic" and target_l0 is not None)
        if codes is None or extra is None or not known:
            return super().calculate_aux_loss(step_input, made(feature_acts), made(hidden_pre), sae_out)
        x, l0 = extra
        norms = self.W_dec.norm(dim=1)
        if mode == "tanh":
            per_item = row_sums(torch.tanh(cfg.jumprelu_tanh_scale * codes.values * at(norms, codes)), codes)
        else:
            per_item = l0 if mode == "step" else 2 / target_l0 * (l0 - target_l0) ** 2
        losses = {"l0_loss": (step_input.coefficients["l0"] * per_item).mean().to(codes.dtype)}
        if cfg.pre_act_loss_coefficient is not None:
            losses["pre_act_loss"] = self._fusae_pre_act_loss(x, step_input.dead_neuron_mask, norms)
        return losses

    def _fusae_pre_act_loss(self, x: Tensor, dead: Tensor | None, norms: Tensor) -> Tensor:
        """The tool's loss of the dead latents' pre-activations, from those alone."""
        b_enc = self.b_enc
        if dead is None or not dead.any():
            return b_enc.new_tensor(0.0)
        (dead,) = torch.nonzero(dead, as_tuple=True)
        pre = x @ self.W_enc.T[dead].T + b_enc[dead]
        ones = torch.ones_like(dead, dtype=torch.bool)
        threshold = self.threshold.to(pre.dtype)[dead]
        return calculate_pre_act_loss(self.cfg.pre_act_loss_coefficient, threshold, pre, ones, norms[dead])


class FastGatedTraining(FastTraining, FastGated):
    """Gated, with the penalty and the reconstruction of the gate's own values."""

    def _fusae_hidden_pre(self, sae_in: Tensor) -> Tensor:
        return sae_in @ (self.W_enc * self.r_mag.exp()) + self.b_mag

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self._fusae_aside() or lazy(self) is not None:
            return super().encode_with_hidden_pre(x)
        # Activations rounded as `encode` rounds them, beside the dense pre-activations.
        sae_in, encoded = self._fusae_codes(x)
        if encoded is None:
            with self._fusae_given(sae_in):
                return super().encode_with_hidden_pre(x)
        return self._fusae_handed_out(encoded, sae_in.shape[:-1], False), self._fusae_hidden_pre(sae_in)

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        product, sae_in = extra_of(hidden_pre), step_input.sae_in
        # The tool takes the gate of the raw input.
        changed = self.cfg.normalize_activations in ("constant_norm_rescale", "layer_norm")
        if product is None or changed or hooked(self.hook_sae_input) or not plain(sae_in, self.W_dec):
            return super().calculate_aux_loss(step_input, made(feature_acts), made(hidden_pre), sae_out)
        values = (product.values + at(self.b_gate, product)).relu()
        gate = SparseCodes(values, product.indices, product.m, product.offsets)
        l1 = row_sums(values * at(self.W_dec.norm(dim=1), gate), gate).mean()
        recons = decode(gate, self.W_dec).reshape(*sae_in.shape[:-1], self.W_dec.shape[1]) + self.b_dec
        return {
            "l1_loss": step_input.coefficients["l1"] * l1,
            "auxiliary_reconstruction_loss": (recons - sae_in).pow(2).sum(dim=-1).mean(),
        }
