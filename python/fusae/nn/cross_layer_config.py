# SPDX-License-Identifier: Apache-2.0
"""What a cross-layer transcoder is made of."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from .. import _fields
from .config import SparseCoderConfig

SELECTS = ("topk", "batch_topk", "relu", "threshold")


class SourceConfig(SparseCoderConfig):
    """Of one layer's latents: their outputs are added up with those of other layers, so that `b_dec` is not theirs."""

    def parameters(self) -> dict[str, tuple[list[int], torch.dtype]]:
        return {name: spec for name, spec in super().parameters().items() if name != "b_dec"}


@dataclasses.dataclass(frozen=True)
class CrossLayerConfig:
    """The shape and the activation of a `CrossLayerTranscoder`. Checked on construction.

    Attributes:
        layers: L, which have an input and a target each.
        d: width of a layer's input.
        m: latents of each layer.
        k: of each layer: latents active per row, as in `SparseCoderConfig`.
        select: 'topk', 'batch_topk', 'relu' or 'threshold', as in `SparseCoderConfig`; every layer selects by itself.
        joint: with select 'batch_topk': the ``L·n·k`` largest of all layers together, and one threshold for them all.
        select_by_norm: select by pre-activation times decoder norm, which is the sum of the norms at all targets.
        k_aux: latents of each layer in the AuxK selection, ``0 <= k_aux <= m``; 0: none.
        dtype: of the parameters, as in `SparseCoderConfig`.
        d_out: width of a layer's target; None: d.
        skip: add to the output of every layer a dense linear map of the layer's input.

    Raises:
        TypeError, ValueError: naming the field, what was wanted and what came.
    """

    layers: int
    d: int
    m: int
    k: int
    select: str = "topk"
    select_by_norm: bool = False
    k_aux: int = 0
    dtype: str = "float32"
    d_out: int | None = None
    skip: bool = False
    joint: bool = False

    def __post_init__(self) -> None:
        _fields.whole("layers", self.layers, 1)
        _fields.choice("select", self.select, SELECTS)
        _fields.flag("skip", self.skip)
        if _fields.flag("joint", self.joint) and self.select != "batch_topk":
            raise ValueError(
                f"joint must be false with select {self.select!r}: only 'batch_topk' can go over all layers"
            )
        if self.d_out is not None:
            _fields.whole("d_out", self.d_out, 1)
        _fields.whole("d", self.d, 1)
        self.source(0)
        _fields.whole("layers times m", self.latents, 1, 2**31 - 1)

    @property
    def latents(self) -> int:
        """``L · m``, those of all layers."""
        return self.layers * self.m

    @property
    def target_width(self) -> int:
        """Of one layer: `d_out`, or `d` where that is None."""
        return self.d if self.d_out is None else self.d_out

    @property
    def input_width(self) -> int:
        """Of the inputs of all layers, joined."""
        return self.layers * self.d

    @property
    def output_width(self) -> int:
        """Of the targets of all layers, joined."""
        return self.layers * self.target_width

    @property
    def torch_dtype(self) -> torch.dtype:
        return self.source(0).torch_dtype

    def source(self, layer: int) -> SparseCoderConfig:
        """Of the latents of one layer, which write to ``L - layer`` targets."""
        targets = self.layers - layer
        return SourceConfig(
            self.d, self.m, self.k, select=self.select, select_by_norm=self.select_by_norm, k_aux=self.k_aux,
            dtype=self.dtype, d_out=targets * self.target_width, pre_bias=False, sites=(self.target_width,) * targets,
        )  # fmt: skip

    def parameters(self) -> dict[str, tuple[list[int], torch.dtype]]:
        """Shape and dtype of every trained tensor."""
        shapes = {"b_dec": ([self.layers, self.target_width], self.torch_dtype)}
        if self.skip:
            shapes["W_skip"] = ([self.output_width, self.d], self.torch_dtype)
        return shapes | self._of_sources("parameters")

    def buffers(self) -> dict[str, tuple[list[int], torch.dtype]]:
        """Shape and dtype of what belongs to the transcoder and is not trained."""
        return self._of_sources("buffers")

    def _of_sources(self, what: str) -> dict[str, tuple[list[int], torch.dtype]]:
        named = ((s, getattr(self.source(s), what)()) for s in range(self.layers))
        return {f"sources.{s}.{name}": spec for s, specs in named for name, spec in specs.items()}

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> CrossLayerConfig:
        """From plain values. An unknown or missing field is an error."""
        if not isinstance(values, dict):
            raise TypeError(f"the configuration must be an object, got {type(values).__name__}")
        _fields.known("the configuration", values, [f.name for f in dataclasses.fields(cls)])
        for name in ("layers", "d", "m", "k"):
            if name not in values:
                raise ValueError(f"the configuration lacks the field {name!r}")
        return cls(**values)
