# SPDX-License-Identifier: Apache-2.0
"""Bytes on the device that trains, by part."""

from __future__ import annotations

import dataclasses
import math

import torch

from ..optim import state_layout
from ..train import TrainConfig
from ..train.forms import FORMS, UNBOUNDED
from ..train.optimiser import MATRICES, new_training_coder, optimizer_options, steps_early

# Of a selection's candidates on the CPU, and of a slab of packed weights.
_STATE, _SLAB = 64 << 20, 2048
# Modes whose bytes per parameter are shown beside those of the configuration.
MODES = (
    ("float32", {}),
    ("moments in bfloat16", {"moments": "bfloat16"}),
    ("moments in 8 bits", {"moments": "8bit"}),
    ("lazy, beta1 = 0", {"optimizer": "lazy", "beta1": 0.0}),
    ("lazy, 8 bits", {"optimizer": "lazy", "beta1": 0.0, "moments": "8bit"}),
    ("weights in bfloat16 with a master, moments in 8 bits",
     {"dtype": "bfloat16", "weights": "bfloat16_master", "moments": "8bit"}),
    ("weights in bfloat16, moments in 8 bits", {"dtype": "bfloat16", "weights": "bfloat16", "moments": "8bit"}),
    ("weights in bfloat16, lazy, 8 bits",
     {"dtype": "bfloat16", "weights": "bfloat16", "optimizer": "lazy", "beta1": 0.0, "moments": "8bit"}),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Needs:
    """Bytes by part at the most crowded moment of a step, on the device that trains.

    Attributes:
        parts: in the order in which they are shown: weights, moments (master copies and step counters with them), their
            average, gradients (of as many rows as a step can touch), codes, encode scratch, data, counters, exchange
            with other devices.
        evaluation: what measuring the coder afterwards takes beside the weights; not part of the total, as the trainer
            is gone by then.
        parameters: numbers that are trained.
        touched: latents a step has gradients of, at most and on average of codes spread evenly.
    """

    parts: dict[str, int]
    evaluation: int
    parameters: int
    touched: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def touched(m: int, entries: int) -> int:
    """How many of `m` latents as many entries hit, spread evenly: the most that is to be expected."""
    return min(m, round(m * -math.expm1(entries * math.log1p(-1 / m)))) if m > 1 else m


def entries_of(config: TrainConfig, aux: bool = True) -> int:
    """Stored entries of the codes of a step, with those of AuxK (and of Multi-TopK)."""
    wide = 4 * config.k if config.multi_topk else max(config.k, config.k_start or 0)
    return config.batch_size * (min(wide, config.m) + (config.k_aux if aux else 0)) * config.layers


def needs(config: TrainConfig, device: str = "cpu") -> Needs:
    """What a resolved configuration will take on its device. Python, torch and a language model are not counted.

    With ``config.shard_latents``, on each of the devices that share the latents. Forms without a fixed number of active
    latents (relu, jumprelu, gated) are counted with ``config.k`` of them.
    """
    whole, ranks = config, config.shard_latents or 1
    config = part_of(config)
    coder = new_training_coder(config, seed=None, device="meta")
    named = {name: param for name, param in coder.named_parameters()}
    encoder, decoder, rest = optimizer_options(config)
    options = {"lazy": False, "master": False, "moments": "float32"}
    state = 0
    for name, param in named.items():
        group = encoder if name.endswith("W_enc") else decoder if name.endswith("W_dec") else rest
        layout = state_layout(list(param.shape), param.dtype, {**options, **group})
        state += sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout.values())
    n, m, d = config.batch_size, config.m, config.d
    width, out = config.input_width, coder.b_dec.numel()
    matrices = {name: p for name, p in named.items() if name.endswith(MATRICES)}
    vectors = sum(p.numel() * p.element_size() for name, p in named.items() if name not in matrices)
    entries = entries_of(config)
    rows = -(-touched(whole.m, entries // config.layers) // ranks)
    itemsize = 2 if config.dtype == "bfloat16" else torch.finfo(getattr(torch, config.dtype)).bits // 8
    early = steps_early(config)
    grads = vectors + _gradients(matrices, rows, early)
    # Values and indices, their gradients, and the entries sorted by latent: order, row, and where each latent starts.
    codes = entries * (2 * (itemsize + 4) + 12) + 8 * (m + 1) * config.layers
    if config.dtype == "bfloat16" and config.weights == "float32":
        scratch = sum(2 * p.numel() for p in matrices.values())  # autocast's copies, kept for the backward pass
        grads += _gradients(matrices, rows, early) // 2  # of the copies, on their way to float32
    else:
        scratch = 0
    ragged = FORMS[config.form].select in ("batch_topk", *UNBOUNDED)
    if device == "cpu":
        scratch += (8 * 3 * entries if ragged else min(_STATE, 16 * entries + 4096 * n)) + 4 * (_SLAB + n) * width
    else:
        scratch += 8 * 2048 * n  # candidates of a row
    if config.architecture == "cross_layer" and config.form == "batch_topk" and config.joint:
        # What every layer offers: values and indices, the order of scores, what is equal and kept, where that goes.
        scratch += n * config.layers * min(config.k * config.layers, m) * (itemsize + 4 + 4 + 3 * 8)
    batches = 2 + config.prefetch
    data = 4 * n * d * batches + itemsize * n * (width + 6 * out)
    counters = m * config.layers * (8 + 4 + 1)
    average = sum(p.numel() * p.element_size() for p in named.values()) if config.ema else 0
    parts = {
        "weights": sum(p.numel() * p.element_size() for p in named.values()),
        "moments": state,
        "average": average,
        "gradients": grads,
        "codes": codes,
        "encode scratch": scratch,
        "data": data,
        "counters": counters,
        # Scores of all of them, with what sorts them; and reconstructions on their way.
        "exchange": 0 if ranks == 1 else 16 * n * max(config.k, whole.k_aux) * ranks + 8 * n * out,
    }
    parts = {name: size for name, size in parts.items() if size}
    return Needs(parts, itemsize * n * (2 * width + 3 * out) + codes, sum(p.numel() for p in named.values()), rows)


def part_of(config: TrainConfig) -> TrainConfig:
    """The configuration of the latents of one of ``config.shard_latents`` ranks, as if they were all."""
    ranks = config.shard_latents or 1
    if ranks == 1:
        return config
    if config.architecture == "cross_layer" or config.form == "gated":
        raise ValueError(f"shard_latents must be 1 with form {config.form!r}, architecture {config.architecture!r}")
    if config.m % ranks:
        raise ValueError(f"m must be a multiple of shard_latents = {ranks}, got {config.m}")
    m = config.m // ranks
    if config.k > m:
        raise ValueError(f"m / shard_latents must be at least k = {config.k}, got {config.m} / {ranks}")
    return dataclasses.replace(config, m=m, k_aux=min(config.k_aux, m), prefixes=None, shard_latents=None)


def bytes_by_degree(config: TrainConfig, device: str = "cpu", most: int = 64) -> dict[int, int]:
    """Bytes on each device for 1, 2, 4, ... devices that share the latents, as far as they can."""
    found, ranks = {}, 1
    while ranks <= most:
        try:
            found[ranks] = needs(dataclasses.replace(config, shard_latents=ranks), device).total
        except ValueError:
            break
        ranks *= 2
    return found


def _gradients(matrices: dict[str, torch.Tensor], rows: int, early: bool) -> int:
    """Of as many touched rows; where decoder rows are stepped early, encoder or decoder at a time."""
    sizes = {kind: sum(rows * p.shape[1] * p.element_size() for name, p in matrices.items() if name.endswith(kind))
             for kind in MATRICES}  # fmt: skip
    return max(sizes.values()) if early else sum(sizes.values())


def bytes_per_parameter(config: TrainConfig) -> dict[str, float]:
    """Weights and optimiser state over the parameters of encoder and decoder, for `MODES`."""
    found, config = {}, dataclasses.replace(config, shard_latents=None)
    for name, fields in MODES:
        changed = dataclasses.replace(
            config, **{"optimizer": "dense", "moments": "float32", "weights": "float32", "dtype": "float32", "ema": 0.0,
                       **fields}
        )  # fmt: skip
        need = needs(changed)
        found[name] = (need.parts["weights"] + need.parts["moments"]) / need.parameters
    return found
