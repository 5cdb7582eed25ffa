# SPDX-License-Identifier: Apache-2.0
"""Adapter for circuit-tracer: its transcoders, transcoder sets and cross-layer transcoders, for inference.

circuit-tracer runs its transcoders without autograd. Where a gradient is wanted nevertheless, its own encoder runs.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from circuit_tracer.transcoder.activation_functions import JumpReLU, TopK
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder
from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet
from torch import Tensor, nn

from ..codes import SparseCodes
from ..ops import codes_from_dense, decode, encode_threshold, encode_topk
from ._attribution import FastContext, FastContextNNSight, FastModel
from ._codes import (
    ascending,
    by_blocks,
    from_coo,
    fuses,
    gather_scaled,
    spread,
    sum_rows,
    to_coo,
    wants_grad,
)
from ._dense import autocasts, decode_dense, dense_of, eager, hooked, mostly_zero
from ._swap import Adapter, Swapped


def _kind(activation: Any) -> str | None:
    """The activation function by name, or None where somebody watches it or it is another."""
    if activation in (F.relu, torch.relu):
        return "relu"
    if not isinstance(activation, nn.Module) or hooked(activation):
        return None
    return {nn.ReLU: "relu", JumpReLU: "jumprelu", TopK: "topk"}.get(type(activation))


def _codes(x: Tensor, W_enc: Tensor, b_enc: Tensor, activation: Any, threshold: Tensor | None = None) -> SparseCodes:
    """Codes of ``[n, d]`` inputs of an activation function that `_kind` knows; fixed width for TopK, else ragged."""
    kind = _kind(activation)
    if not fuses(x, x.shape[0]):
        gate = activation if threshold is None else lambda pre: pre * (pre > threshold)
        return by_blocks(x, lambda rows: gate(F.linear(rows, W_enc, b_enc)), W_enc.shape[0])
    if kind == "topk":
        return encode_topk(x, W_enc, b_enc, activation.k, activation="none")
    if kind == "relu":
        return encode_threshold(x, W_enc, b_enc, 0.0)
    threshold = activation.threshold if threshold is None else threshold
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return encode_threshold(x, W_enc, b_enc, threshold.detach().to(wide).reshape(-1).expand(W_enc.shape[0]))


def _fits_threshold(activation: Any, m: int) -> bool:
    return type(activation) is not JumpReLU or activation.threshold.shape in ((), (1,), (m,))


def _kept(x: Tensor, zero_positions: Any) -> Tensor:
    """Which of the n rows are not zeroed, ``[n]`` bool."""
    keep = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    keep[zero_positions] = False
    return keep


class FastTranscoder(Swapped):
    """Methods of an accelerated `SingleLayerTranscoder`."""

    def _fusae_serves(self, x: Tensor, W_enc: Tensor) -> bool:
        """Whether the fused encoder takes this call; else the tool's own code runs, or raises its own error."""
        act, plain = self.activation_function, eager() and not (x.is_meta or autocasts(x.device))
        threshold = getattr(act, "threshold", None)
        return (
            plain
            and _kind(act) is not None
            and _fits_threshold(act, W_enc.shape[0])
            and not wants_grad(x, W_enc, self.b_enc, threshold)
            and x.ndim > 0
            and x.shape[-1] == W_enc.shape[1]
            and self.b_enc.dtype == W_enc.dtype
        )

    def _fusae_codes(self, x: Tensor, W_enc: Tensor, zero_positions: Any) -> SparseCodes:
        """Ragged codes of ``[n, d]`` inputs as ``to_sparse`` gives them: no zeros, latents ascending."""
        keep = _kept(x, zero_positions)
        codes = _codes(x[keep].to(W_enc.dtype), W_enc, self.b_enc, self.activation_function)
        return spread(ascending(codes), keep)

    def encode(self, input_acts: Tensor, apply_activation_function: bool = True) -> Tensor:
        if not apply_activation_function or (input_acts.ndim and not self._fusae_dense(input_acts)):
            return super().encode(input_acts, apply_activation_function)
        W_enc = self.W_enc
        if not self._fusae_serves(input_acts, W_enc):
            return super().encode(input_acts, apply_activation_function)
        x = input_acts.to(W_enc.dtype).reshape(-1, W_enc.shape[1])
        codes = _codes(x, W_enc, self.b_enc, self.activation_function)
        return dense_of(codes, input_acts.shape[:-1])

    def _fusae_dense(self, x: Tensor) -> bool:
        """Whether dense activations come sooner from the fused encoder."""
        return fuses(self.b_enc, x.numel() // max(1, x.shape[-1])) and x.numel() > 0

    def encode_sparse(self, input_acts: Tensor, zero_positions: slice = slice(0, 1)) -> tuple[Tensor, Tensor]:
        W_enc = self.W_enc
        if input_acts.ndim != 2 or not self._fusae_serves(input_acts, W_enc):
            return super().encode_sparse(input_acts, zero_positions)
        codes = self._fusae_codes(input_acts, W_enc, zero_positions)
        return to_coo([codes], stacked=False), W_enc.index_select(0, codes.indices)

    def decode(self, acts: Tensor, input_acts: Tensor | None = None) -> Tensor:
        plain = (
            acts.layout == torch.strided and acts.ndim > 0 and acts.dtype == self.dtype and acts.device.type != "meta"
        )
        if not eager() or not plain or not mostly_zero(acts):
            return super().decode(acts, input_acts)
        if self.lazy_decoder and not wants_grad(acts) and acts.numel():
            codes = codes_from_dense(acts.reshape(-1, acts.shape[-1]))
            y = sum_rows(self._fusae_decoders(codes), codes.offsets).reshape(*acts.shape[:-1], self.d_model)
        else:
            y = decode_dense(acts, self.W_dec)
        reconstruction = y + self.b_dec
        if self.W_skip is not None:
            assert input_acts is not None, "Transcoder has skip connection but no input_acts were provided"
            reconstruction = reconstruction + self.compute_skip(input_acts)
        return reconstruction

    def _fusae_decoders(self, codes: SparseCodes, out: Tensor | None = None) -> Tensor:
        """Decoder rows of all entries, scaled by their values: ``[nnz, d]``."""
        if not self.lazy_decoder:
            return gather_scaled(self.W_dec, codes.indices, codes.values, out)
        latents, place = codes.indices.long().unique(return_inverse=True)  # each row is read once from the file
        return gather_scaled(self._get_decoder_vectors(latents), place, codes.values, out)

    def _fusae_reconstruct(self, scaled: Tensor, codes: SparseCodes, input_acts: Tensor | None) -> Tensor:
        reconstruction = sum_rows(scaled, codes.offsets)
        if self.W_skip is not None:
            assert input_acts is not None, "Transcoder has skip connection but no input_acts were provided"
            reconstruction = reconstruction + self.compute_skip(input_acts)
        return reconstruction + self.b_dec

    def _fusae_serves_sparse(self, sparse_acts: Tensor) -> bool:
        weights = (self.b_dec, self.W_skip, None if self.lazy_decoder else self.W_dec)
        same = sparse_acts.dtype == self.dtype and (self.lazy_decoder or self.W_dec.dtype == self.dtype)
        return same and eager() and not wants_grad(sparse_acts, *weights)

    def decode_sparse(self, sparse_acts: Tensor, input_acts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if sparse_acts.ndim != 2 or not sparse_acts.is_coalesced() or not self._fusae_serves_sparse(sparse_acts):
            return super().decode_sparse(sparse_acts, input_acts)
        codes = from_coo(sparse_acts)
        scaled = self._fusae_decoders(codes)
        return self._fusae_reconstruct(scaled, codes, input_acts), scaled


class FastSet(Swapped):
    """Methods of an accelerated `TranscoderSet`."""

    def compute_attribution_components(
        self, mlp_inputs: Tensor, zero_positions: slice = slice(0, 1)
    ) -> dict[str, Tensor]:
        inputs = list(mlp_inputs)
        own = [t for t in self.transcoders if isinstance(t, FastTranscoder) and t.dtype == self.transcoders[0].dtype]
        if len(own) != len(self.transcoders) or len(inputs) < len(own) or mlp_inputs.ndim != 3:
            return super().compute_attribution_components(mlp_inputs, zero_positions)
        codes, rows = [], []
        for transcoder, x in zip(own, inputs, strict=False):
            W_enc = transcoder.W_enc
            if not transcoder._fusae_serves(x, W_enc) or not transcoder._fusae_serves_sparse(W_enc):
                return super().compute_attribution_components(mlp_inputs, zero_positions)
            codes.append(transcoder._fusae_codes(x, W_enc, zero_positions))
            # What a lazy encoder has read is gone afterwards.
            rows.append(W_enc.index_select(0, codes[-1].indices) if transcoder.lazy_encoder else None)
        counts = [c.values.shape[0] for c in codes]
        encoders, decoders = (codes[0].values.new_empty(sum(counts), own[0].d_model) for _ in range(2))
        reconstruction = torch.zeros_like(mlp_inputs)
        parts = zip(own, inputs, codes, rows, encoders.split(counts), decoders.split(counts), strict=False)
        for layer, (transcoder, x, part, read, encoder, scaled) in enumerate(parts):
            if read is None:
                torch.index_select(transcoder.W_enc, 0, part.indices, out=encoder)
            else:
                encoder.copy_(read)
                rows[layer] = read = None
            transcoder._fusae_decoders(part, scaled)
            reconstruction[layer] = transcoder._fusae_reconstruct(scaled, part, x)
        activations = to_coo(codes)
        return {
            "activation_matrix": activations,
            "reconstruction": reconstruction,
            "encoder_vecs": encoders,
            "decoder_vecs": decoders,
            "encoder_to_decoder_map": torch.arange(sum(counts), device=mlp_inputs.device),
            "decoder_locations": activations.indices()[:2],
        }


class FastCrossLayer(Swapped):
    """Methods of an accelerated `CrossLayerTranscoder`."""

    def _fusae_gate(self, layer: int) -> tuple[Any, Tensor | None]:
        act = self.activation_function
        return act, act.threshold[layer].reshape(-1) if isinstance(act, JumpReLU) else None

    def _fusae_serves(self, x: Tensor) -> bool:
        act, weights = self.activation_function, None if self.lazy_encoder else self.W_enc
        threshold = getattr(act, "threshold", None)
        return (
            eager()
            and not (x.is_meta or autocasts(x.device))
            and _kind(act) in ("relu", "jumprelu")
            and not wants_grad(x, weights, self.b_enc, threshold)
            and x.dtype == self.dtype
            and x.ndim > 0
            and x.shape[-1] == self.d_model
        )

    def _fusae_codes(self, x: Tensor, layer: int, W_enc: Tensor) -> SparseCodes:
        return _codes(x, W_enc, self.b_enc[layer], *self._fusae_gate(layer))

    def encode(self, x: Tensor) -> Tensor:
        if x.ndim != 3 or len(x) != self.n_layers or not self._fusae_serves(x) or not fuses(x, x.shape[1]):
            return super().encode(x)
        features = x.new_empty(*x.shape[:2], self.d_transcoder)
        for layer in range(self.n_layers):
            features[layer] = self._fusae_codes(x[layer], layer, self._get_encoder_weights(layer)).to_dense()
        return features

    def encode_layer(self, x: Tensor, layer_id: int, apply_activation_function: bool = True) -> Tensor:
        rows = x.numel() // self.d_model
        if not apply_activation_function or not fuses(x, rows) or not self._fusae_serves(x):
            return super().encode_layer(x, layer_id, apply_activation_function)
        codes = self._fusae_codes(x.reshape(-1, self.d_model), layer_id, self._get_encoder_weights(layer_id))
        return dense_of(codes, x.shape[:-1])

    def _fusae_encode(self, x: Tensor, zero_positions: Any = None) -> tuple[list[SparseCodes], list[Tensor]]:
        """Codes of every layer and the encoder rows of their entries; without `zero_positions`, the codes alone."""
        codes, encoders = [], []
        for layer in range(self.n_layers):
            W_enc, inputs = self._get_encoder_weights(layer), x[layer]
            if zero_positions is None:
                codes.append(ascending(self._fusae_codes(inputs, layer, W_enc)))
                continue
            keep = _kept(inputs, zero_positions)
            codes.append(spread(ascending(self._fusae_codes(inputs[keep], layer, W_enc)), keep))
            encoders.append(W_enc.index_select(0, codes[-1].indices))
        return codes, encoders

    def encode_sparse(self, x: Tensor, zero_positions: slice = slice(0, 1)) -> tuple[Tensor, Tensor]:
        if x.ndim != 3 or not self._fusae_serves(x):
            return super().encode_sparse(x, zero_positions)
        codes, encoders = self._fusae_encode(x, zero_positions)
        return to_coo(codes), torch.cat(encoders)

    def _fusae_serves_decode(self, features: Tensor) -> bool:
        weights = () if self.lazy_decoder else tuple(self.W_dec)
        same = features.dtype == self.dtype and all(W.dtype == self.dtype for W in weights)
        return same and eager() and not wants_grad(features, self.b_dec, self.W_skip, *weights)

    def _fusae_sum(self, codes: list[SparseCodes], input_acts: Tensor | None) -> Tensor:
        """``[n_layers, n, d]``: what the latents of every layer write to it and the layers behind it."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        n = len(codes[0])
        recon = torch.zeros(self.n_layers, n, self.d_model, dtype=wide, device=self.device)
        for layer, part in enumerate(codes):
            if part.values.shape[0] == 0:
                continue
            if self.lazy_decoder:  # each row is read once from the file
                latents, place = part.indices.long().unique(return_inverse=True)
                W = self._get_decoder_vectors(layer, latents)
                part = SparseCodes(part.values, place.int(), W.shape[0], part.offsets)
            else:
                W = self.W_dec[layer]
            y = decode(part, W.reshape(W.shape[0], -1))
            recon[layer:] += y.reshape(n, -1, self.d_model).transpose(0, 1)
        recon = recon.to(self.dtype) + self.b_dec[:, None]
        if self.W_skip is not None:
            assert input_acts is not None, "Transcoder has skip connection but no input_acts were provided"
            recon = recon + input_acts @ self.W_skip
        return recon

    def decode(self, features: Tensor, input_acts: Tensor | None = None) -> Tensor:
        if features.ndim != 3 or not self._fusae_serves_decode(features):
            return super().decode(features, input_acts)
        if features.is_sparse:
            codes = [from_coo(part.coalesce()) for part in features]
        else:
            codes = [codes_from_dense(part) for part in features]
        if not self._fusae_whole(codes):
            return super().decode(features, input_acts)
        return self._fusae_sum(codes, input_acts)

    @staticmethod
    def _fusae_whole(codes: list[SparseCodes]) -> bool:
        """Whether a latent is active at the last position; if none is, the tool takes the positions to be fewer."""
        return any(bool(part.offsets[-1] > part.offsets[-2]) for part in codes if len(part))

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 3 or self.W_skip is not None or not self._fusae_serves(x) or not self._fusae_serves_decode(x):
            return super().forward(x)
        codes, _ = self._fusae_encode(x)
        return self._fusae_sum(codes, None) if self._fusae_whole(codes) else super().forward(x)

    def compute_attribution_components(self, inputs: Tensor, zero_positions: slice = slice(0, 1)) -> dict[str, Tensor]:
        if inputs.ndim != 3 or not self._fusae_serves(inputs) or not self._fusae_serves_decode(inputs):
            return super().compute_attribution_components(inputs, zero_positions)
        codes, encoders = self._fusae_encode(inputs, zero_positions)
        if not self._fusae_whole(codes):
            return super().compute_attribution_components(inputs, zero_positions)
        features = to_coo(codes)
        pos_ids, layer_ids, _, decoder_vectors, encoder_map = self.select_decoder_vectors(features)
        return {
            "activation_matrix": features,
            "reconstruction": self._fusae_sum(codes, inputs),
            "encoder_vecs": torch.cat(encoders),
            "decoder_vecs": decoder_vectors,
            "encoder_to_decoder_map": encoder_map,
            "decoder_locations": torch.stack((layer_ids, pos_ids)),
        }

    def select_decoder_vectors(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        if features.ndim != 3 or not self._fusae_serves_decode(features):
            return super().select_decoder_vectors(features)
        features = features if features.is_sparse else features.to_sparse()
        layers, positions, latents = features.indices()
        if layers.numel() == 0:
            return super().select_decoder_vectors(features)
        counts = torch.bincount(layers, minlength=self.n_layers).tolist()
        outputs = self.n_layers - layers  # of every entry
        source = torch.repeat_interleave(torch.arange(layers.numel(), device=layers.device), outputs)
        first = outputs.cumsum(0) - outputs
        layer_ids = torch.arange(source.numel(), device=layers.device) - first[source] + layers[source]
        vectors = features.values().new_empty(source.numel(), self.d_model)
        sizes = [count * (self.n_layers - layer) for layer, count in enumerate(counts)]
        parts = zip(latents.split(counts), features.values().split(counts), vectors.split(sizes), strict=True)
        for layer, (ids, values, out) in enumerate(parts):
            if not counts[layer]:
                continue
            place = ids
            if self.lazy_decoder:
                ids, place = ids.unique(return_inverse=True)
                W = self._get_decoder_vectors(layer, ids)
            else:
                W = self.W_dec[layer]
            gather_scaled(W.reshape(W.shape[0], -1), place, values, out.view(counts[layer], -1))
        return positions[source], layer_ids, latents[source], vectors, source


def _why_not(module: Any) -> str | None:
    activation = module.activation_function
    kinds = ("relu", "jumprelu") if isinstance(module, CrossLayerTranscoder) else ("relu", "jumprelu", "topk")
    if type(activation) is JumpReLU or _kind(activation) in kinds:
        return None
    return f"activation_function must be ReLU, JumpReLU or TopK, got {activation!r}"


_ADAPTERS = (
    Adapter(SingleLayerTranscoder, FastTranscoder, ("encode", "decode", "encode_sparse", "decode_sparse"), _why_not),
    Adapter(TranscoderSet, FastSet, ("compute_attribution_components",)),
    Adapter(
        CrossLayerTranscoder,
        FastCrossLayer,
        (
            "encode", "encode_layer", "encode_sparse", "decode", "forward", "select_decoder_vectors",
            "compute_attribution_components",
        ),
        _why_not,
    ),
)  # fmt: skip
# Of modules that circuit-tracer imports when they are needed: (module, class, mixin, methods).
_LATER = (
    ("attribution.context_transformerlens", "AttributionContext", FastContext, ("_make_attribution_hooks",)),
    ("attribution.context_nnsight", "AttributionContext", FastContextNNSight, ("compute_feature_attributions",)),
    (
        "replacement_model.replacement_model_transformerlens", "TransformerLensReplacementModel", FastModel,
        ("setup_attribution",),
    ),
    ("replacement_model.replacement_model_nnsight", "NNSightReplacementModel", FastModel, ("setup_attribution",)),
)  # fmt: skip


def __getattr__(name: str) -> Any:
    """`ADAPTERS`: of the classes that have been imported by now."""
    if name != "ADAPTERS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    later = [
        Adapter(getattr(sys.modules[path], cls), mixin, methods)
        for path, cls, mixin, methods in ((f"circuit_tracer.{module}", *rest) for module, *rest in _LATER)
        if path in sys.modules
    ]
    return *_ADAPTERS, *later
