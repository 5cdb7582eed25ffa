# SPDX-License-Identifier: Apache-2.0
"""Dictionaries of dictionary_learning: `encode` gives dense activations as ever, `forward` alone never writes them."""

from __future__ import annotations

from abc import ABC
from typing import Any, NamedTuple

import torch
from dictionary_learning.dictionary import (
    AutoEncoder,
    AutoEncoderNew,
    GatedAutoEncoder,
    IdentityDict,
    JumpReluAutoEncoder,
)
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from torch import Tensor, nn

from ...codes import SparseCodes
from ...ops import decode, encode_batch_topk, encode_threshold, encode_topk
from .._dense import DENSE, autocasts, decode_dense, dense_of, eager, hooked, mostly_zero, sampled
from .._rows import latent_major_, row_major_
from .._swap import Adapter, Swapped


class Weights(NamedTuple):
    """As they are at this moment, row = latent."""

    W_enc: Tensor  # [m, d]
    b_enc: Tensor | None  # [m]
    W_dec: Tensor  # [m, d]
    b_dec: Tensor  # [d]
    b_pre: Tensor | None  # [d], taken from the input


# ABC first, as in the tool's `Dictionary`: Python swaps classes whose objects are laid out by the same bases.
class FastDictionary(ABC, Swapped):
    """Methods that the accelerated dictionaries share. A kind adds `_fusae_weights` and `_fusae_select`."""

    def _fusae_weights(self) -> Weights:
        bias = self.b_dec
        return Weights(self.encoder.weight, self.encoder.bias, self.decoder.weight.T, bias, bias)

    def _fusae_select(self, x: Tensor, weights: Weights) -> SparseCodes | None:
        """Codes of centred rows ``[n, d]``; None where the tool's own code does better."""
        raise NotImplementedError

    def _fusae_aside(self, *tensors: Any) -> bool:
        """Whether the tool's own code has to run: it is transformed or watched, or these are no ordinary tensors."""
        if not eager():
            return True
        linear = [part for part in (getattr(self, "encoder", None), getattr(self, "decoder", None)) if part is not None]
        odd = any(type(t) not in (Tensor, nn.Parameter) or t.layout != torch.strided for t in tensors)
        return odd or any(type(part) is not nn.Linear or hooked(part) for part in linear)

    def _fusae_centred(self, x: Tensor, weights: Weights) -> Tensor | None:
        """Centred rows ``[n, d]`` of `x`, or None where fused code cannot take them as they are."""
        x = x if weights.b_pre is None else x - weights.b_pre
        W_enc, device = weights.W_enc, x.device
        if device.type == "meta" or x.ndim < 1 or x.shape[-1] != W_enc.shape[1] or device != W_enc.device:
            return None
        if autocasts(device):
            if not hasattr(self, "encoder"):  # autocast meets its matrix products, but not their biases
                return None
        elif x.dtype != W_enc.dtype or not x.is_floating_point():
            return None
        return x.reshape(-1, x.shape[-1])

    def _fusae_codes(self, x: Tensor) -> SparseCodes | None:
        if self._fusae_aside(x):
            return None
        weights = self._fusae_weights()
        rows = self._fusae_centred(x, weights)
        return None if rows is None else self._fusae_select(rows, weights)

    def _fusae_above(self, x: Tensor, weights: Weights, threshold: Tensor) -> SparseCodes | None:
        """Codes of what is above `threshold` ``[m]`` or scalar, unless that is much."""
        threshold = threshold.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        with torch.no_grad():
            pre = torch.nn.functional.linear(sampled(x), weights.W_enc, weights.b_enc)
            if x.shape[0] and float((pre > threshold).float().mean()) > DENSE:
                return None
        return encode_threshold(x, weights.W_enc, weights.b_enc, threshold)

    def _fusae_decode(self, codes: SparseCodes, batch: torch.Size) -> Tensor:
        weights = self._fusae_weights()
        y = decode(codes, weights.W_dec)
        return y.reshape(*batch, y.shape[-1]) + weights.b_dec

    def encode(self, x: Tensor, *options: Any, **named: Any) -> Tensor:
        # What else can be asked for is dense by its nature.
        codes = None if options or named else self._fusae_codes(x)
        return super().encode(x, *options, **named) if codes is None else dense_of(codes, x.shape[:-1])

    def decode(self, f: Tensor, *options: Any, **named: Any) -> Tensor:
        weights = self._fusae_weights()
        W_dec, m = weights.W_dec, weights.W_dec.shape[0]
        if options or named or self._fusae_aside(f, W_dec) or f.shape[-1:] != (m,) or f.device != W_dec.device:
            return super().decode(f, *options, **named)
        if f.device.type == "meta" or (f.dtype != W_dec.dtype and not autocasts(f.device)):
            return super().decode(f)
        if not f.numel() or not mostly_zero(f):
            return super().decode(f)
        return decode_dense(f, W_dec) + weights.b_dec

    def forward(self, x: Tensor, output_features: bool = False, *options: Any, **named: Any) -> Any:
        # With features asked for, the reconstruction is part of a graph that leads through them.
        codes = None if output_features or options or named else self._fusae_codes(x)
        if codes is None:
            return super().forward(x, output_features, *options, **named)
        return self._fusae_decode(codes, x.shape[:-1])


class FastTopK(FastDictionary):
    def _fusae_select(self, x: Tensor, weights: Weights) -> SparseCodes | None:
        k = int(self.k)
        return encode_topk(x, weights.W_enc, weights.b_enc, k) if 1 <= k <= weights.W_enc.shape[0] else None

    def encode(self, x: Tensor, return_topk: bool = False, use_threshold: bool = False) -> Any:
        if return_topk or use_threshold:
            return self._fusae_wider(x, return_topk, use_threshold)
        return super().encode(x)

    def _fusae_wider(self, x: Tensor, return_topk: bool, use_threshold: bool) -> Any:
        weights = self._fusae_weights()
        rows = None if return_topk or self._fusae_aside(x) else self._fusae_centred(x, weights)
        codes = None if rows is None else self._fusae_above(rows, weights, self.threshold.clamp(min=0))
        if codes is None:
            return super().encode(x, return_topk=return_topk, use_threshold=use_threshold)
        return dense_of(codes, x.shape[:-1])

    def decode(self, x: Tensor) -> Tensor:  # as the tool names its argument here
        return super().decode(x)


class FastBatchTopK(FastDictionary):
    def _fusae_select(self, x: Tensor, weights: Weights) -> SparseCodes | None:
        return self._fusae_above(x, weights, self.threshold.clamp(min=0))

    def decode(self, x: Tensor) -> Tensor:  # as the tool names its argument here
        return super().decode(x)

    def _fusae_batch(self, x: Tensor) -> SparseCodes | None:
        """Codes of the batch's n·k largest, of ``[n, d]`` (the tool takes k times the first dimension of any)."""
        weights, k = self._fusae_weights(), int(self.k)
        if self._fusae_aside(x) or x.ndim != 2 or not 1 <= k <= weights.W_enc.shape[0]:
            return None
        rows = self._fusae_centred(x, weights)
        return None if rows is None else encode_batch_topk(rows, weights.W_enc, weights.b_enc, k)[0]

    def encode(self, x: Tensor, return_active: bool = False, use_threshold: bool = True) -> Any:
        if return_active:
            return super().encode(x, return_active=True, use_threshold=use_threshold)
        if use_threshold:
            return super().encode(x)
        codes = self._fusae_batch(x)
        return super().encode(x, use_threshold=False) if codes is None else dense_of(codes, x.shape[:-1])


class FastMatryoshka(FastBatchTopK):
    def _fusae_weights(self) -> Weights:
        return Weights(self.W_enc.T, self.b_enc, self.W_dec, self.b_dec, self.b_dec)

    def _fusae_active(self, codes: SparseCodes | None) -> SparseCodes | None:
        """The codes of the groups in use."""
        if codes is None or self.active_groups == len(self.group_sizes):
            return codes
        used = codes.indices < int(self.group_indices[self.active_groups])
        return SparseCodes(torch.where(used, codes.values, 0.0), codes.indices, codes.m, codes.offsets)

    def _fusae_codes(self, x: Tensor) -> SparseCodes | None:
        return self._fusae_active(super()._fusae_codes(x)) if x.ndim == 2 else None  # as its slices of columns need it

    def _fusae_batch(self, x: Tensor) -> SparseCodes | None:
        return self._fusae_active(super()._fusae_batch(x))


class FastAutoEncoder(FastDictionary):
    def _fusae_weights(self) -> Weights:
        return Weights(self.encoder.weight, self.encoder.bias, self.decoder.weight.T, self.bias, self.bias)

    def _fusae_select(self, x: Tensor, weights: Weights) -> SparseCodes | None:
        return self._fusae_above(x, weights, torch.zeros((), device=x.device))


class FastAutoEncoderNew(FastAutoEncoder):
    def _fusae_weights(self) -> Weights:
        bias = self.decoder.bias
        if autocasts(bias.device):
            bias = bias.to(torch.get_autocast_dtype(bias.device.type))  # it is part of the linear layer
        return Weights(self.encoder.weight, self.encoder.bias, self.decoder.weight.T, bias, None)


class FastJumpReLU(FastDictionary):
    def _fusae_weights(self) -> Weights:
        pre = self.b_dec if self.apply_b_dec_to_input else None
        return Weights(self.W_enc.T, self.b_enc, self.W_dec, self.b_dec, pre)

    def _fusae_select(self, x: Tensor, weights: Weights) -> SparseCodes | None:
        return self._fusae_above(x, weights, self.threshold.clamp(min=0))


class FastGated(FastDictionary):
    def _fusae_weights(self) -> Weights:
        bias = self.decoder_bias
        return Weights(self.encoder.weight, None, self.decoder.weight.T, bias, bias)

    def _fusae_select(self, x: Tensor, weights: Weights) -> SparseCodes | None:
        if autocasts(x.device):  # its gate and magnitude are then taken in another dtype
            return None
        codes = self._fusae_above(x, weights, -self.gate_bias)
        if codes is None:
            return None
        at = codes.indices.long()
        values = (codes.values * self.r_mag.exp()[at] + self.mag_bias[at]).relu()
        return SparseCodes(values, codes.indices, codes.m, codes.offsets)


def _prepare(dictionary: Any) -> None:
    for name, param in dictionary.named_parameters():
        latent_major_(param, 1 if name in ("decoder.weight", "W_enc") else 0, dictionary.parameters())


def _undo(dictionary: Any) -> None:
    for name, param in dictionary.named_parameters():
        if name == "decoder.weight":
            row_major_(param)


METHODS = ("encode", "decode", "forward")
ADAPTERS: tuple[Adapter, ...] = (
    *(
        Adapter(tool, mixin, METHODS, prepare=_prepare, undo=_undo)
        for tool, mixin in (
            (AutoEncoderTopK, FastTopK),
            (BatchTopKSAE, FastBatchTopK),
            (MatryoshkaBatchTopKSAE, FastMatryoshka),
            (AutoEncoder, FastAutoEncoder),
            (AutoEncoderNew, FastAutoEncoderNew),
            (JumpReluAutoEncoder, FastJumpReLU),
            (GatedAutoEncoder, FastGated),
        )
    ),
    Adapter(IdentityDict, Swapped, (), lambda _: "it computes nothing"),
)
