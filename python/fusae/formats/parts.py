# SPDX-License-Identifier: Apache-2.0
"""From what a file holds to a coder: orientation, dtypes, and the scalings of inputs that other tools apply."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import CrossLayerConfig, CrossLayerTranscoder, SparseCoder, SparseCoderConfig
from ..nn.config import DTYPES
from .native import FormatError

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass
class Parts:
    """One dictionary as it was read.

    Attributes:
        path: named in errors.
        weights: by the names of `SparseCoder`: `W_enc` ``[m, d]`` and `W_dec` ``[m, d_out]`` of any strides.
        fields: of `SparseCoderConfig`, without d, m and dtype; without k where it is of no effect.
        metadata: what is known beside it: ``coder.metadata``.
        dtype: that the tool itself casts to; None: that of the weights.
        transcoder: whether the output is of another place than the input.
        factors: of weights, by name.
    """

    path: Path
    weights: dict[str, Tensor]
    fields: dict[str, Any]
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: torch.dtype | None = None
    transcoder: bool = False
    factors: dict[str, float] = dataclasses.field(default_factory=dict)

    def scale(self, inner: float, outer: float | None = None) -> Parts:
        """Of a dictionary for rows times `inner` (its output divided by `outer`) the same one for plain rows.

        ``W_enc · inner``, ``W_dec / outer``, ``b_dec / outer``: the values of the codes stay as they are, and so do
        thresholds that they are compared with. `select_by_norm` thresholds belong to norms, which get smaller.
        """
        outer = inner if outer is None else outer
        if inner == outer == 1:
            return self
        by = {"W_enc": inner, "W_dec": 1 / outer, "b_dec": 1 / outer, "W_skip": inner / outer}
        return self.times(by | ({"threshold": 1 / outer} if self.fields.get("select_by_norm") else {}))

    def times(self, factors: dict[str, float]) -> Parts:
        """With these weights multiplied, when the coder is made: in its dtype, or in float32 where that has 16 bits."""
        self.factors = {name: factor for name, factor in factors.items() if name in self.weights and factor != 1}
        return self

    def coder(self, dtype: torch.dtype | None, device: torch.device | str | None) -> SparseCoder:
        """The coder, in eval mode. Weights that lie as they should are used in place, not copied."""
        weights = self.weights
        dtype = dtype or self.dtype or _common(weights)
        m, d = weights["W_enc"].shape
        out = weights["W_dec"].shape[1]
        fields = {"k": 1, **self.fields, "d": d, "m": m, "dtype": DTYPE_NAMES[dtype]}
        fields |= {"d_out": out} if self.transcoder or out != d else {}
        for name, factor in self.factors.items():
            wide = torch.promote_types(torch.promote_types(weights[name].dtype, dtype), torch.float32)
            weights[name] = weights[name].to(wide) * factor
        if fields["select"] in ("threshold", "batch_topk"):
            weights["threshold"] = weights["threshold"].clamp(min=0)  # the same behind a ReLU, which all of them have
        try:
            config = SparseCoderConfig(**fields)
        except (TypeError, ValueError) as error:
            raise FormatError(f"{self.path}: {error}") from error
        coder = SparseCoder(config, seed=None, device="meta")
        for name, (shape, wanted) in {**config.parameters(), **config.buffers()}.items():
            _set(coder, name, weights[name], shape, wanted, device)
        coder.metadata = self.metadata
        return coder.eval()


@dataclasses.dataclass
class LayerParts:
    """A cross-layer transcoder as it was read: one `Parts` of every layer, whose `W_dec` is ``[m, (L - s) d_out]``."""

    path: Path
    layers: Sequence[Parts]
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)

    def coder(self, dtype: torch.dtype | None, device: torch.device | str | None) -> CrossLayerTranscoder:
        first = self.layers[0]
        m, d = first.weights["W_enc"].shape
        dtype = dtype or _common({str(s): w for s, layer in enumerate(self.layers) for w in layer.weights.values()})
        out = first.weights["b_dec"].shape[0]
        fields = {"k": 1, **first.fields, "d": d, "m": m, "dtype": DTYPE_NAMES[dtype], "layers": len(self.layers)}
        fields |= {"d_out": out, "skip": "W_skip" in first.weights}
        try:
            config = CrossLayerConfig(**fields)
        except (TypeError, ValueError) as error:
            raise FormatError(f"{self.path}: {error}") from error
        coder = CrossLayerTranscoder(config, seed=None, device="meta")
        joined = {"b_dec": torch.stack([layer.weights["b_dec"] for layer in self.layers])}
        if config.skip:
            joined["W_skip"] = torch.cat([layer.weights["W_skip"] for layer in self.layers])
        for name, (shape, wanted) in {**config.parameters(), **config.buffers()}.items():
            if name.startswith("sources."):
                _, s, name = name.split(".")
                _set(coder.sources[int(s)], name, self.layers[int(s)].weights[name], shape, wanted, device)
            else:
                _set(coder, name, joined[name], shape, wanted, device)
        coder.metadata = self.metadata
        return coder.eval()


def _common(weights: dict[str, Tensor]) -> torch.dtype:
    """One that holds all of them without rounding; thresholds have their own."""
    return functools.reduce(torch.promote_types, (w.dtype for name, w in weights.items() if name != "threshold"))


def _set(
    module: nn.Module, name: str, value: Tensor, shape: list[int], dtype: torch.dtype, device: torch.device | str | None
) -> None:
    if list(value.shape) != shape:  # what was read was checked: this is a mistake of ours
        raise AssertionError(f"{name} has shape {list(value.shape)}, not {shape}")
    value = value.to(device=device, dtype=dtype).contiguous()
    setattr(module, name, value if name in module._buffers else nn.Parameter(value))


def log_thresholds(value: Tensor) -> Tensor:
    """Thresholds of their logarithms; -inf would be a threshold of 0 and is not among finite values."""
    return value.to(torch.promote_types(value.dtype, torch.float32)).exp()
