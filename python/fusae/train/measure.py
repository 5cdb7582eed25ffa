# SPDX-License-Identifier: Apache-2.0
"""What a run has to know of its data before the first step: their centre and scale."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from ..nn import CrossLayerTranscoder, SparseCoder
from ..nn.sums import total
from .config import TrainConfig


@dataclasses.dataclass(eq=False)
class Scaling:
    """Rows ``x`` are trained on as ``scale · (x - centre)``, each part of a row with a scale of its own.

    Attributes:
        widths: of the parts of a row: one for an autoencoder, input and target of a transcoder (of a cross-layer one
            all inputs, then all targets), a crosscoder's sites.
        scales: one for each part.
        centre: ``[d]``, in the units of the data; 0 where the rows are not centred.
        mean: ``[d]`` mean row after centring and scaling.
        variance: mean squared distance of the targets from their mean, after scaling; one for each target of a
            cross-layer transcoder.
    """

    widths: tuple[int, ...]
    scales: tuple[float, ...]
    centre: Tensor
    mean: Tensor
    variance: float | tuple[float, ...]
    centred: bool

    @classmethod
    def unknown(cls, config: TrainConfig, like: Tensor) -> Scaling:
        """To be read into from a checkpoint."""
        widths, zeros = config.parts, like.new_zeros(config.d)
        return cls(widths, (1.0,) * len(widths), zeros, zeros.clone(), 1.0, config.centre_input)

    def apply(self, rows: Tensor) -> Tensor:
        """Plain rows ``[n, d]`` as they are trained on."""
        if self.centred:
            rows = rows - self.centre
        return rows * (self.scales[0] if len(self.scales) == 1 else self.columns())

    def columns(self) -> Tensor:
        """``[d]``, the scale of every column."""
        scales = [self.centre.new_full((w,), s) for w, s in zip(self.widths, self.scales, strict=True)]
        return torch.cat(scales)

    def fold_into(self, coder: SparseCoder | CrossLayerTranscoder) -> SparseCoder | CrossLayerTranscoder:
        """Turn a coder of such rows into one of plain rows, in place."""
        centre = self.centre if self.centred else None
        if len(self.widths) == 1:
            return coder.fold_input_(self.scales[0], centre)
        if isinstance(coder, CrossLayerTranscoder):
            if coder.config.select_by_norm:
                coder.fold_norms_()
            layers, width = coder.config.layers, coder.config.input_width
            centres = (None, None) if centre is None else (centre[:width], centre[width:])
            return coder.fold_input_(self.scales[:layers], centres[0], self.scales[layers:], centres[1])
        if coder.config.sites is not None:
            if coder.config.select_by_norm:
                coder.fold_norms_()
            return coder.fold_columns_(self.columns(), centre)
        centres = (None, None) if centre is None else centre.split(list(self.widths))
        return coder.fold_input_(self.scales[0], centres[0], self.scales[1], centres[1])


@torch.no_grad()
def measure(config: TrainConfig, rows: Tensor, coder: SparseCoder | CrossLayerTranscoder) -> Scaling:
    """Centre, scale and variance from the first rows ``[n, d]`` of the data; sets `b_dec` of the coder.

    Raises:
        ValueError: all rows are the same.
    """
    x = rows.to(coder.b_dec.device, coder.b_dec.dtype)
    mean = x.mean(0, dtype=torch.float64).to(x.dtype)
    widths = config.parts
    variances = [
        float(total((part - centre).square(), torch.float64)) / len(x)
        for part, centre in zip(x.split(list(widths), 1), mean.split(list(widths)), strict=True)
    ]
    if not all(variance > 0 for variance in variances):
        part = "" if len(widths) == 1 else f" in part {variances.index(0.0)} of the row"
        raise ValueError(f"data: the first {len(x)} rows are all the same{part}: there is nothing to learn")
    scales = tuple(1 / math.sqrt(variance) if config.scale_input else 1.0 for variance in variances)
    scaled = [variance * scale**2 for variance, scale in zip(variances, scales, strict=True)]
    of_target = scaled[len(scaled) // 2 :] if config.is_transcoder else scaled
    variance = tuple(of_target) if config.architecture == "cross_layer" else sum(of_target)
    scaling = Scaling(
        widths, scales, mean if config.centre_input else torch.zeros_like(mean), mean, variance, config.centre_input
    )
    scaling.mean = scaling.apply(mean)
    if config.b_dec_init != "zero":
        coder.init_b_dec_(scaling.apply(x)[:, -coder.b_dec.numel() :], config.b_dec_init)
    return scaling
