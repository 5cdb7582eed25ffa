# SPDX-License-Identifier: Apache-2.0
"""Cases of `codes_from_dense`."""

from __future__ import annotations

from typing import Any

import torch

from .. import patterns
from .case import ALL, BF16, FP16, FP32, FP64, Case, place


def codes_from_dense(n: int, m: int, name: str = "", *, density: float = 0.1, special: bool = False,
                     layout: str = "contiguous", capacity: int | None = None, **options: Any) -> Case:  # fmt: skip
    """``fusae.codes_from_dense``. `density`: share of entries that are kept; `special`: NaN, ±Inf, -0.0 and subnormals
    among them."""

    def make(dtype, gen, device):
        f = patterns.pre_special(n, m, gen) if special else torch.randn(n, m, generator=gen, dtype=FP64)
        f = f.masked_fill(torch.rand(n, m, generator=gen) >= density, 0.0)
        inputs = {"f": place(f, dtype, device, layout)}
        return inputs if capacity is None else {**inputs, "capacity": capacity}

    if not name:
        parts = ("special" if special else "normal", f"density{density}", layout != "contiguous" and layout,
                 capacity is not None and f"capacity{capacity}")  # fmt: skip
        name = "-".join(p for p in parts if p)
    options.setdefault("dtypes", (FP32, BF16))
    kept = round(n * m * density)
    return Case("codes_from_dense", name, {"n": n, "m": m}, make, True,
                moved=n * m + kept, moved_fixed=4 * kept + 8 * n, **options)  # fmt: skip


CODES_FROM_DENSE = [
    codes_from_dense(37, 700, dtypes=ALL),
    codes_from_dense(37, 701, special=True, density=0.7, dtypes=ALL),
    codes_from_dense(37, 701, special=True, density=0.7, layout="transposed", dtypes=ALL),
    codes_from_dense(199, 63, density=1.1, dtypes=(FP32, BF16, FP16)),
    codes_from_dense(70, 64, layout="strided", grad_layout="strided", dtypes=(FP32, FP16)),
    codes_from_dense(70, 129, layout="padded_rows"),
    codes_from_dense(5, 7, layout="offset", dtypes=(FP32, FP16)),
    codes_from_dense(37, 96, layout="expanded", grad_layout="expanded"),
    codes_from_dense(37, 96, "all_zero", density=0.0),
    codes_from_dense(3, 20011, density=0.01),
    codes_from_dense(1, 1, density=1.1),
    codes_from_dense(0, 96),
    codes_from_dense(0, 96, capacity=5),
    codes_from_dense(37, 96, capacity=37 * 96, dtypes=ALL),
    codes_from_dense(37, 700, layout="transposed", capacity=9000, special=True),
    codes_from_dense(37, 96, "overflow", capacity=60),
]
