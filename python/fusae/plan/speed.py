# SPDX-License-Identifier: Apache-2.0
"""Operations and seconds of a training step."""

from __future__ import annotations

import dataclasses

from ..train import TrainConfig
from .memory import entries_of, touched
from .rates import Rates


@dataclasses.dataclass(frozen=True)
class Speed:
    """A training step.

    Attributes:
        flops: floating-point operations of a step, without AuxK.
        seconds: by part, predicted from measured rates: encode, codes (decoding, gradients), optimiser, passes over all
            latents.
        aux_seconds: added while there are as many dead latents as AuxK takes.
        tokens_per_s: without those.
    """

    flops: int
    seconds: dict[str, float]
    aux_seconds: float
    tokens_per_s: float


def _sparse_seconds(config: TrainConfig, rates: Rates, entries: int) -> tuple[float, float]:
    """Of codes and of the optimiser, for as many entries."""
    per_layer = entries // config.layers
    rows = config.m if config.optimizer == "dense" else touched(config.m, per_layer)
    return entries * rates.entry, 2 * config.layers * rows * rates.row


def speed(config: TrainConfig, rates: Rates) -> Speed:
    """The step of a resolved configuration on the machine of `rates`."""
    n, m, layers = config.batch_size, config.m, config.layers
    width = config.input_width // layers
    out = config.parts[-1] if config.is_transcoder else config.d
    itemsize = 2 if config.weights != "float32" else 8 if config.dtype == "float64" else 4
    dense = 2 * n * m * width * layers
    plain, whole = entries_of(config, aux=False), entries_of(config)
    codes, optimiser = _sparse_seconds(config, rates, plain)
    # Counters, bias gradient and its optimiser; and the product of that gradient with W_enc, where b_dec is subtracted
    # from the input. A 16-bit copy of float32 weights is read and written every step.
    passes = m * layers * 100
    if config.architecture == "autoencoder":
        passes += m * width * itemsize
    if config.dtype == "bfloat16" and config.weights == "float32":
        passes += m * layers * (width + out) * 6
    if config.ema:
        passes += m * layers * (width + out) * 3 * itemsize
    seconds = {"encode": dense / rates.gemm + n * layers * rates.start, "codes": codes, "optimiser": optimiser}
    seconds["passes over latents"] = passes / rates.copy
    both = _sparse_seconds(config, rates, whole)
    flops = dense + 2 * plain * (4 * out + 2 * width) + 12 * (touched(m, plain // layers) * (width + out)) * layers
    return Speed(flops, seconds, sum(both) - codes - optimiser, n / sum(seconds.values()))
