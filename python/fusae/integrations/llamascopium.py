# SPDX-License-Identifier: Apache-2.0
"""Adapter for llamascopium (OpenMOSS Language-Model-SAEs, 2.0): `SparseAutoEncoder`, `Crosscoder`, its CLT's decoder.

Its training asks for the dense pre-activations (``return_hidden_pre=True``), so its own encoder runs there.
"""

from __future__ import annotations

from typing import Any

import torch
from llamascopium.activation_functions import JumpReLU
from llamascopium.models.clt import CrossLayerTranscoder
from llamascopium.models.crosscoder import Crosscoder
from llamascopium.models.lorsa import LowRankSparseAttention
from llamascopium.models.molt import MixtureOfLinearTransform
from llamascopium.models.sae import SparseAutoEncoder
from llamascopium.utils.timer import timer
from torch import Tensor

from ..codes import SparseCodes
from ..ops import encode_batch_topk, encode_threshold, encode_topk
from ._codes import fuses, wants_grad
from ._dense import autocasts, decode_dense, dense_of, eager, hooked, mostly_zero
from ._swap import Adapter, Swapped

_MADE = "SparseDictionary.activation_function_factory.<locals>."
# The activation functions that llamascopium makes, by the name under which it defines them.
_KINDS = {_MADE + "<lambda>": "relu", _MADE + "topk_activation": "topk", _MADE + "batch_topk": "batchtopk"}


def _kind(activation: Any) -> str | None:
    """The activation function by name, or None where somebody watches it or it is another."""
    if type(activation) is JumpReLU:
        return None if hooked(activation) else "jumprelu"
    return _KINDS.get(getattr(activation, "__qualname__", None))


def _plain(*tensors: Tensor) -> bool:
    """Ordinary tensors of one dtype, outside of transforms: what the fused ops take."""
    kinds = {(t.dtype, t.layout, t.device) for t in tensors}
    return eager() and len(kinds) == 1 and tensors[0].layout == torch.strided and not tensors[0].is_meta


class FastAutoEncoder(Swapped):
    """Methods of an accelerated `SparseAutoEncoder`."""

    def _fusae_serves(self, x: Tensor) -> bool:
        act = self.activation_function
        parameters = [self.W_E, self.b_E, *(act.parameters() if isinstance(act, JumpReLU) else ())]
        return (
            _plain(x, *parameters)
            and not self.cfg.use_glu_encoder
            and not hooked(self.hook_hidden_pre)
            and not autocasts(x.device)
            and not wants_grad(x, *parameters, self.W_D)
            and x.ndim in (2, 3)
            and x.shape[-1] == self.W_E.shape[0]
            and fuses(x, x.numel() // max(1, x.shape[-1]))
        )

    def _fusae_codes(self, x: Tensor) -> SparseCodes | None:
        """Codes of ``[n, d]`` inputs, or None where the tool's activation function is not one of these."""
        W_enc, b_enc, k = self.W_E.T, self.b_E, self.current_k
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        norms = self.decoder_norm().to(wide) if self.cfg.sparsity_include_decoder_norm else None
        kind = _kind(self.activation_function)
        if kind == "relu":
            return encode_threshold(x, W_enc, b_enc, 0.0, norms=norms)
        if kind == "jumprelu":
            threshold = self.activation_function.get_jumprelu_threshold().to(wide)
            return encode_threshold(x, W_enc, b_enc, threshold, norms=norms)
        if kind == "topk" and isinstance(k, int) and 1 <= k <= W_enc.shape[0]:
            return encode_topk(x, W_enc, b_enc, k, norms=norms)
        if kind == "batchtopk" and isinstance(k, int) and 1 <= k <= W_enc.shape[0]:
            return encode_batch_topk(x, W_enc, b_enc, k, norms=norms)[0]
        return None

    def encode(self, x: Tensor, return_hidden_pre: bool = False, **kwargs: Any) -> Any:
        inputs = x.to(self.W_E.dtype)
        codes = None
        if not return_hidden_pre and not kwargs and self._fusae_serves(inputs):
            codes = self._fusae_codes(inputs.reshape(-1, inputs.shape[-1]))
        if codes is None:
            return super().encode(x, return_hidden_pre, **kwargs)
        return self.hook_feature_acts(dense_of(codes, inputs.shape[:-1]))

    def decode(self, feature_acts: Tensor, **kwargs: Any) -> Tensor:
        plain = _plain(feature_acts, self.W_D) and feature_acts.numel() and feature_acts.ndim > 0
        if not plain or self.cfg.use_triton_kernel or not mostly_zero(feature_acts):
            return super().decode(feature_acts, **kwargs)
        reconstructed = decode_dense(feature_acts, self.W_D)
        if self.cfg.use_decoder_bias:
            reconstructed = reconstructed + self.b_D
        return self.hook_reconstructed(reconstructed)


class FastCrosscoder(Swapped):
    """Methods of an accelerated `Crosscoder`."""

    def encode(self, x: Tensor, return_hidden_pre: bool = False, *, no_einsum: bool = True, **kwargs: Any) -> Any:
        heads, d, m = self.W_E.shape
        if not _plain(x, self.W_E, self.b_E) or x.shape[-2:] != (heads, d) or autocasts(x.device):
            return super().encode(x, return_hidden_pre, no_einsum=no_einsum, **kwargs)
        with timer.time("encode"):
            # The sum over heads is one product of matrices; the tool makes [..., n_heads, d_sae] first.
            pre = x.flatten(-2) @ self.W_E.reshape(heads * d, m) + self.b_E.sum(0)
            hidden_pre, norms = pre.unsqueeze(-2).expand(*x.shape[:-1], m), self.decoder_norm()
            feature_acts = self.activation_function(hidden_pre * norms) / norms
        return (feature_acts, hidden_pre) if return_hidden_pre else feature_acts

    def decode(self, feature_acts: Tensor, *, no_einsum: bool = True, **kwargs: Any) -> Tensor:
        plain = _plain(feature_acts, self.W_D) and feature_acts.shape[-2:] == self.W_D.shape[:2]
        if not plain or not feature_acts.numel() or not mostly_zero(feature_acts):
            return super().decode(feature_acts, no_einsum=no_einsum, **kwargs)
        with timer.time("decode"):
            heads = zip(feature_acts.unbind(-2), self.W_D, strict=True)
            return torch.stack([decode_dense(f, W) for f, W in heads], dim=-2) + self.b_D


class FastCrossLayer(Swapped):
    """Methods of an accelerated `CrossLayerTranscoder`: the decoder."""

    def _decode_single_output_layer_dense(self, feature_acts: Tensor, layer_to: int) -> Tensor:
        W_dec = self.get_decoder_weights(layer_to)  # [layer_to + 1, d_sae, d_model]
        plain = _plain(feature_acts, W_dec) and feature_acts.ndim == 3 and feature_acts.numel()
        if not plain or not mostly_zero(feature_acts):
            return super()._decode_single_output_layer_dense(feature_acts, layer_to)
        sources = feature_acts[:, : layer_to + 1].unbind(1)
        return torch.stack([decode_dense(f, W) for f, W in zip(sources, W_dec, strict=True)]).sum(0)


def _one_device(module: Any) -> str | None:
    return None if module.device_mesh is None else "its parameters are spread over devices (device_mesh)"


def _why_not_sae(module: Any) -> str | None:
    return "use_glu_encoder gates every pre-activation" if module.cfg.use_glu_encoder else _one_device(module)


def _never(reason: str) -> Any:
    return lambda module: reason


ADAPTERS = (
    Adapter(SparseAutoEncoder, FastAutoEncoder, ("encode", "decode"), _why_not_sae),
    Adapter(Crosscoder, FastCrosscoder, ("encode", "decode", "_apply_encoding", "_apply_decoding"), _one_device),
    Adapter(CrossLayerTranscoder, FastCrossLayer, ("_decode_single_output_layer_dense",), _one_device),
    Adapter(
        LowRankSparseAttention, Swapped, (),
        _never("its time goes into attention scores, which are no product with a dictionary"),
    ),
    Adapter(MixtureOfLinearTransform, Swapped, (), _never("its latents are matrices of several ranks, not rows")),
)  # fmt: skip
