# SPDX-License-Identifier: Apache-2.0
"""circuit-tracer's attribution rows: gradients times the decoder vectors of active latents, position by position."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._swap import Swapped, accelerate


def _entries(locations: Tensor, layer: int) -> tuple[Tensor | slice, list[int]]:
    """Which entries write to `layer`, ascending by position, and how many there are at each.

    A slice where they are neighbours, as those of per-layer transcoders are: then nothing is copied.
    """
    layers, positions = locations
    found = (layers == layer).nonzero().squeeze(1)
    if found.numel() == 0:
        return found, []
    at = positions[found]
    counts = torch.bincount(at).tolist()
    first, last = int(found[0]), int(found[-1])
    if last - first + 1 == found.numel() and bool((at[1:] >= at[:-1]).all()):
        return slice(first, last + 1), counts
    return found[at.argsort(stable=True)], counts


def position_scores(grads: Tensor, vectors: Tensor, counts: list[int]) -> Tensor:
    """Dot products of every vector with the gradients at its position.

    Args:
        grads: ``[batch, positions, d]``.
        vectors: ``[nnz, d]``, ascending by position; dtype of `grads`.
        counts: number of vectors at each position.

    Returns:
        ``[nnz, batch]``. One product of matrices a position; the tool gathers ``[batch, nnz, d]`` gradients instead.

    Equivalent to: ``torch.einsum("bpd,pd->pb", grads[:, positions], vectors)``
    """
    scores = vectors.new_empty(vectors.shape[0], grads.shape[0])
    start = 0
    for position, count in enumerate(counts):
        if count:
            place = slice(start, start + count)
            torch.mm(vectors[place], grads[:, position].T, out=scores[place])
            start += count
    return scores


class FastContext(Swapped):
    """Methods of an accelerated `AttributionContext` for TransformerLens."""

    def _make_attribution_hooks(self, feature_output_hook: str) -> list[tuple[str, Callable]]:
        locations = self.decoder_locations
        self.decoder_locations = locations[:, :0]  # the tool's own hooks without those of latents
        try:
            others = super()._make_attribution_hooks(feature_output_hook)
        finally:
            self.decoder_locations = locations
        hooks = [self._fusae_hook(layer, f"blocks.{layer}.{feature_output_hook}") for layer in range(self.n_layers)]
        return [hook for hook in hooks if hook is not None] + others

    def _fusae_hook(self, layer: int, name: str) -> tuple[str, Callable] | None:
        entries, counts = _entries(self.decoder_locations, layer)
        if not counts:
            return None
        vectors, write = self.decoder_vecs[entries], self.encoder_to_decoder_map[entries]
        proxy = weakref.proxy(self)

        def add_scores(grads: Tensor, hook: Any) -> None:
            proxy._batch_buffer[write] += position_scores(grads.to(vectors.dtype), vectors, counts)

        return name, add_scores


class FastContextNNSight(Swapped):
    """Methods of an accelerated `AttributionContext` for nnsight."""

    def compute_feature_attributions(self, layer: int, grads: Tensor) -> None:
        entries, counts = _entries(self.decoder_locations, layer)
        if counts:
            vectors = self.decoder_vecs[entries]
            scores = position_scores(grads.to(vectors.dtype), vectors, counts)
            self._batch_buffer[self.encoder_to_decoder_map[entries]] += scores


class FastModel(Swapped):
    """Methods of an accelerated replacement model: its attribution contexts are accelerated too."""

    def setup_attribution(self, *args: Any, **kwargs: Any) -> Any:
        context = super().setup_attribution(*args, **kwargs)
        return accelerate(context, self._fusae_gradients)
