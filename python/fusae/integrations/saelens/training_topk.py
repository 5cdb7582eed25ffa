# SPDX-License-Identifier: Apache-2.0
"""Training steps of the TopK family, with the auxiliary selection among dead latents in the encoder's pass."""

from __future__ import annotations

import contextlib

import torch
from sae_lens.saes.abstopk_sae import AbsTopK
from sae_lens.saes.batchtopk_sae import BatchTopK
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput, mse_loss
from torch import Tensor

from ...codes import SparseCodes
from ...ops import decode, decode_loss, encode_batch_topk, encode_topk
from .._dense import autocasts, hooked
from ._base import Call, Encoded, FastSAE, lazily, lazy, plain
from .inference import FastTopK, in_dtype, norms_of
from .training import FastTraining, codes_of, extra_of

NORMALISED = ("constant_norm_rescale", "layer_norm")


class FastTopKTraining(FastTraining, FastTopK):
    """Top-k of every row."""

    def _fusae_hidden_pre(self, sae_in: Tensor) -> Tensor:
        pre, scale = super()._fusae_hidden_pre(sae_in), self._fusae_scale()
        return pre if scale is None else pre * scale

    def _fusae_lazily(self, step_input: TrainStepInput) -> contextlib.AbstractContextManager:
        dead = step_input.dead_neuron_mask
        k_aux = 0
        if dead is not None and dead.dtype == torch.bool and dead.shape == self.W_enc.shape[1:]:
            k_aux = min(step_input.sae_in.shape[-1] // 2, int(dead.sum()))
        if not k_aux or self.cfg.normalize_activations in NORMALISED:  # the tool refuses the latter
            return lazily(self)
        return lazily(self, dead, k_aux)

    def _fusae_encode(self, x: Tensor) -> Encoded:
        call = lazy(self)
        if call is None or not call.k_aux:
            return super()._fusae_encode(x)
        scale = self._fusae_scale()
        codes, aux = self._fusae_both(x, norms_of(scale), call)
        if self._fusae_select == "topk":  # the auxiliary ones have no ReLU
            codes = SparseCodes(codes.values.relu(), codes.indices, codes.m, codes.offsets)
        return Encoded(in_dtype(codes, self.b_enc), scale, in_dtype(aux, self.b_enc))

    def _fusae_both(self, x: Tensor, norms: Tensor | None, call: Call) -> tuple[SparseCodes, SparseCodes]:
        return encode_topk(
            x, self.W_enc.T, self.b_enc, self.activation_fn.k, "none", self._fusae_select, norms=norms,
            aux_mask=call.dead, k_aux=call.k_aux,
        )  # fmt: skip

    def calculate_topk_aux_loss(
        self, sae_in: Tensor, sae_out: Tensor, hidden_pre: Tensor, dead_neuron_mask: Tensor | None
    ) -> Tensor:
        aux = extra_of(hidden_pre)
        if aux is None:
            return super().calculate_topk_aux_loss(sae_in, sae_out, hidden_pre, dead_neuron_mask)
        return self._fusae_aux_loss(sae_in, sae_out, aux)

    def _fusae_aux_loss(self, sae_in: Tensor, sae_out: Tensor, aux: SparseCodes) -> Tensor:
        """How far the best of the dead latents are from the error that the live ones leave. (Of fewer dead latents than
        half the width, all are selected.)"""
        residual = (sae_in - sae_out).detach()
        recons = decode(aux, self.W_dec)
        recons = self.reshape_fn_out(recons.reshape(*sae_in.shape[:-1], recons.shape[-1]), self.d_head)
        loss = (recons - residual).pow(2).sum(dim=-1).mean()
        return self.cfg.aux_loss_coefficient * (aux.values.shape[-1] / (sae_in.shape[-1] // 2)) * loss


class FastAbsTopKTraining(FastTopKTraining):
    """Top-k by magnitude."""

    _fusae_select, _fusae_activation_fn = "abs", AbsTopK

    def calculate_abstopk_aux_loss(
        self, sae_in: Tensor, sae_out: Tensor, hidden_pre: Tensor, dead_neuron_mask: Tensor | None
    ) -> Tensor:
        aux = extra_of(hidden_pre)
        if aux is None:
            return super().calculate_abstopk_aux_loss(sae_in, sae_out, hidden_pre, dead_neuron_mask)
        return self._fusae_aux_loss(sae_in, sae_out, aux)


class FastBatchTopKTraining(FastTopKTraining):
    """The n·k largest of a batch, and the running threshold for inference."""

    _fusae_activation_fn = BatchTopK

    def _fusae_fits(self, x: Tensor) -> bool:
        k = getattr(self.activation_fn, "k", None)
        if type(self.activation_fn) is not BatchTopK or not isinstance(k, (int, float)) or k != int(k):
            return False  # a fraction of a latent per row: the tool's own code
        return FastSAE._fusae_fits(self, x) and 1 <= k <= self.W_enc.shape[1]

    def _fusae_encode(self, x: Tensor) -> Encoded:
        call = lazy(self)
        if call is not None and call.k_aux:
            return super()._fusae_encode(x)
        scale = self._fusae_scale()
        codes, _ = encode_batch_topk(x, self.W_enc.T, self.b_enc, int(self.activation_fn.k), norms=norms_of(scale))
        return Encoded(in_dtype(codes, self.b_enc), scale)

    def _fusae_both(self, x: Tensor, norms: Tensor | None, call: Call) -> tuple[SparseCodes, SparseCodes]:
        codes, _, aux = encode_batch_topk(
            x, self.W_enc.T, self.b_enc, int(self.activation_fn.k), "none", norms=norms, aux_mask=call.dead,
            k_aux=call.k_aux,
        )  # fmt: skip
        return codes, aux

    def update_topk_threshold(self, acts_topk: Tensor) -> None:
        codes = codes_of(acts_topk)
        super().update_topk_threshold(acts_topk if codes is None else codes.values)


class _PartOfLoss(torch.autograd.Function):
    """A number that is part of the loss but has no gradient of its own, and says so."""

    @staticmethod
    def forward(ctx, value: Tensor, loss: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> None:
        raise RuntimeError(
            "the levels of this loss were computed together, and only their sum `loss` has gradients; for gradients of "
            "one alone or of sae_out, put a hook on hook_sae_recons"
        )


class FastMatryoshkaTraining(FastBatchTopKTraining):
    """BatchTopK with reconstructions from nested prefixes of the latents, all of them in one pass."""

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        levels = not self._fusae_aside() and self._fusae_levels(step_input)
        return levels or super().training_forward_pass(step_input)

    def _fusae_levels(self, step_input: TrainStepInput) -> TrainStepOutput | None:
        """The whole step, where reconstructions are wanted for their errors alone."""
        sae_in, cfg = step_input.sae_in, self.cfg
        widths, m = cfg.matryoshka_widths, self.W_enc.shape[1]
        if (
            cfg.normalize_activations in NORMALISED
            or (cfg.use_matryoshka_aux_loss and step_input.dead_neuron_mask is not None)
            or hooked(self.hook_sae_input)
            or hooked(self.hook_sae_recons)
            or hooked(self.hook_sae_acts_post)
            or self.mse_loss_fn is not mse_loss
            or autocasts(sae_in.device)
            or not self._fusae_fits(sae_in)
            or not plain(sae_in, self.b_dec)
            or sae_in.ndim != 2
            or not len(sae_in)
            or not widths
            or widths[-1] != m
        ):
            return None
        with self._fusae_lazily(step_input):
            acts, hidden_pre = self.encode_with_hidden_pre(sae_in)
        n = len(sae_in)
        total, sse, residual = decode_loss(acts.codes, self.W_dec, self.b_dec, sae_in, widths)
        sse, loss = sse / n, total / n
        aux = self.calculate_aux_loss(step_input, acts, hidden_pre, sae_in - residual)
        names = ["mse_loss", *aux, *(f"inner_mse_loss_{width}" for width in widths[:-1])]
        if total.requires_grad:
            *levels, sae_out = (_PartOfLoss.apply(part, loss) for part in (*sse.unbind(), sae_in - residual))
        else:
            *levels, sae_out = *sse.unbind(), sae_in - residual
        parts = [levels[-1], *aux.values(), *levels[:-1]]
        output = TrainStepOutput(
            sae_in=sae_in, sae_out=sae_out, feature_acts=acts, hidden_pre=hidden_pre,
            loss=sum(aux.values(), start=loss), losses=dict(zip(names, parts, strict=True)),
        )  # fmt: skip
        self.update_topk_threshold(acts)
        output.metrics["topk_threshold"] = self.topk_threshold
        return output
