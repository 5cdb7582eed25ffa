# SPDX-License-Identifier: Apache-2.0
"""Cases of `decode_loss`."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from .. import patterns
from ..patterns import LAYOUTS
from .case import ALL, BF16, FP16, FP32, FP64, Case
from .decode import decode


def decode_loss(n: int, d: int, m: int, k: int, name: str = "", *, prefixes: list[int] | None = None,
                weights: list[float] | None = None, nested: str = "latents", target: str = "contiguous",
                wide: bool = False, exact: bool = False, batch: tuple[int, ...] | None = None,
                **options: Any) -> Case:  # fmt: skip
    """``fusae.decode_loss`` on the codes and weights of `decode`, which takes the other options. `target`: its layout;
    `wide`: it is float32 whatever the weights are."""
    base = decode(n, d, m, k, exact=exact, batch=batch, **options)

    def make(dtype, gen, device):
        inputs = base.make(dtype, gen, device)
        if exact:
            numbers = patterns._ints(-3, 3, (n, d), gen)
        else:
            numbers = torch.randn((n, d), generator=gen, dtype=FP64)
        numbers = numbers.to(FP32 if wide and dtype != FP64 else dtype).to(device)
        inputs["target"] = LAYOUTS[target](numbers) if batch is None else numbers.view(*batch, d)
        if prefixes is not None:
            inputs.update(prefixes=prefixes, weights=weights, nested=nested)
        return inputs

    if not name:
        parts = (base.name, prefixes and f"{nested}{len(prefixes)}", weights and "weights", wide and "wide",
                 target != "contiguous" and f"target_{target}")  # fmt: skip
        name = "-".join(p for p in parts if p)
    # The residual is written, and so is the target read: one [n, d] more than decode.
    return dataclasses.replace(base, op="decode_loss", name=name, make=make, moved=base.moved + n * d)


_HALVES = {"prefixes": [350, 700], "weights": [1.0, 0.5]}

DECODE_LOSS = [
    decode_loss(199, 64, 257, 3, dtypes=ALL),
    decode_loss(37, 576, 5000, 33, dtypes=(FP32, BF16, FP16)),
    decode_loss(37, 576, 5000, 33, prefixes=[312, 625, 1250, 2500, 5000], dtypes=ALL),
    decode_loss(37, 96, 700, 33, prefixes=[7, 350, 351, 700], weights=[0.0, 2.0, 0.125, 1.0], ragged=True, dtypes=ALL),
    decode_loss(37, 96, 700, 9, prefixes=[1, 2, 5, 9], nested="rank", dtypes=ALL),
    decode_loss(37, 64, 96, 16, prefixes=list(range(1, 17)), nested="rank", weights=[1 / 16] * 16),
    decode_loss(37, 257, 96, 96, W="transposed", prefixes=[1, 95, 96], dtypes=ALL),
    decode_loss(37, 7, 300, 33, W="strided", bias=False, target="strided", prefixes=[299, 300]),
    decode_loss(37, 1, 63, 1, W="offset", target="offset", dtypes=(FP32, FP16)),
    decode_loss(1, 63, 1, 1, zeros=0.0),
    decode_loss(0, 64, 96, 3, prefixes=[48, 96]),
    decode_loss(37, 64, 96, 0, "k0", prefixes=[48, 96]),
    decode_loss(36, 96, 700, 8, batch=(3, 2, 6), dtypes=ALL, **_HALVES),
    decode_loss(37, 96, 700, 9, codes="strided", target="transposed", **_HALVES),
    decode_loss(37, 96, 700, 9, codes="expanded", target="expanded", bias=False),
    decode_loss(5, 1100, 20011, 513, bias=False, prefixes=[1000, 20011]),  # several blocks of columns
    decode_loss(199, 64, 300, 8, hot=True, prefixes=[1, 300], dtypes=(FP32, BF16, FP16)),
    decode_loss(199, 64, 20011, 8, hot=True, exact=True, prefixes=[1, 10000, 20011], dtypes=ALL),
    decode_loss(37, 63, 700, 33, exact=True, W="transposed", dtypes=ALL),
    decode_loss(37, 96, 700, 33, "all_padding", exact=True, zeros=1.1, **_HALVES),
    decode_loss(37, 64, 700, 9, "no_weight", weights=[0.0, 0.0], prefixes=[350, 700]),
    decode_loss(37, 96, 700, 9, wide=True, dtypes=(BF16, FP16), **_HALVES),
    decode_loss(5, 7, 63, 1, ragged=True, W="transposed"),
    decode_loss(0, 64, 96, 3, ragged=True),
    decode_loss(1, 64, 96, 3, "empty", ragged=True, prefixes=[48, 96]),
    decode_loss(37, 64, 700, 9, exact=True, nonfinite=True, bias=False, dtypes=(FP32, BF16, FP16)),
    decode_loss(37, 64, 700, 9, exact=True, nonfinite=True, ragged=True, **_HALVES),
]
