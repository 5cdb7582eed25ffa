# SPDX-License-Identifier: Apache-2.0
"""SAELens' architectures as fused encoders."""

from __future__ import annotations

import torch
from sae_lens.saes.abstopk_sae import AbsTopK
from sae_lens.saes.topk_sae import TopK
from torch import Tensor, nn

from ...codes import SparseCodes
from ...ops import encode_threshold, encode_topk
from .._dense import DENSE, autocasts
from ._base import Encoded, FastSAE, at, sampled_density


class FastStandard(FastSAE):
    """ReLU."""

    def _fusae_aside(self) -> bool:
        return super()._fusae_aside() or type(self.activation_fn) is not nn.ReLU

    def _fusae_threshold(self) -> Tensor | float:
        return 0.0

    def _fusae_encode(self, x: Tensor) -> Encoded | None:
        threshold = self._fusae_threshold()
        if sampled_density(x, self.W_enc, self.b_enc, threshold) > DENSE:
            return None
        return Encoded(in_dtype(encode_threshold(x, self.W_enc.T, self.b_enc, threshold), self.b_enc))


class FastJumpReLU(FastStandard):
    """``relu(pre) * (pre > threshold)``; the threshold gets no gradient, as in the tool."""

    def _fusae_weights(self) -> tuple[Tensor, ...]:
        return self.W_enc, self.b_enc, self.threshold

    def _fusae_threshold(self) -> Tensor:
        # Nothing is above a threshold that is NaN.
        return self.threshold.detach().float().clamp(min=0).nan_to_num(torch.inf, torch.inf)


class _Transcoder:
    def _fusae_finish(self, sae_out: Tensor) -> Tensor:
        return self.hook_sae_recons(sae_out)


class FastTranscoder(_Transcoder, FastStandard):
    pass


class FastJumpReLUTranscoder(_Transcoder, FastJumpReLU):
    pass


class FastTopK(FastSAE):
    """Top-k of the pre-activations (times the norms of decoder rows), then ReLU."""

    _fusae_select, _fusae_activation_fn = "topk", TopK

    def _fusae_scale(self) -> Tensor | None:
        return self.W_dec.norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else None

    def _fusae_fits(self, x: Tensor) -> bool:
        k, kind = getattr(self.activation_fn, "k", None), type(self.activation_fn)
        if kind is not self._fusae_activation_fn or not isinstance(k, int) or isinstance(k, bool):
            return False
        return super()._fusae_fits(x) and 1 <= k <= self.W_enc.shape[1]

    def _fusae_encode(self, x: Tensor) -> Encoded:
        scale = self._fusae_scale()
        activation = "relu" if self._fusae_select == "topk" else "none"
        codes = encode_topk(
            x, self.W_enc.T, self.b_enc, self.activation_fn.k, activation, self._fusae_select, norms=norms_of(scale)
        )
        return Encoded(in_dtype(codes, self.b_enc), scale)


class FastAbsTopK(FastTopK):
    """Top-k by magnitude; values keep their sign."""

    _fusae_select, _fusae_activation_fn = "abs", AbsTopK


class FastGated(FastSAE):
    """A gate and a magnitude of one product: ``relu(product exp(r_mag) + b_mag)`` where ``product + b_gate > 0``."""

    def _fusae_weights(self) -> tuple[Tensor, ...]:
        return self.W_enc, self.b_gate, self.b_mag, self.r_mag

    def _fusae_aside(self) -> bool:
        return super()._fusae_aside() or type(self.activation_fn) is not nn.ReLU

    def _fusae_fits(self, x: Tensor) -> bool:
        # Under autocast the tool rounds ``W_enc * exp(r_mag)``, so its magnitudes are of another product.
        return not autocasts(x.device) and super()._fusae_fits(x)

    def _fusae_encode(self, x: Tensor) -> Encoded | None:
        b_gate = self.b_gate.detach()  # the gate itself has no gradient; a loss of its values has (`extra`)
        if sampled_density(x, self.W_enc, b_gate, 0.0) > DENSE:
            return None
        product = in_dtype(encode_threshold(x, self.W_enc.T, None, -b_gate.float()), b_gate)
        magnitude = product.values * at(self.r_mag.exp(), product) + at(self.b_mag, product)
        codes = SparseCodes(magnitude.relu(), product.indices, product.m, product.offsets)
        return Encoded(codes, extra=product)


def in_dtype(codes: SparseCodes, bias: Tensor) -> SparseCodes:
    """Under autocast, where the tool's product is of 16 bits and its sum with the bias is not."""
    return codes if codes.dtype == bias.dtype else codes.to(bias.dtype)


def norms_of(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale.detach().float()
