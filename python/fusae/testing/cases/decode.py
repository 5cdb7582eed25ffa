# SPDX-License-Identifier: Apache-2.0
"""Cases of `decode`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fusae

from .. import patterns
from ..patterns import LAYOUTS
from .case import ALL, BF16, FP16, FP32, FP64, Case, place


def decode(n: int, d: int, m: int, k: int, name: str = "", *, exact: bool = False, ragged: bool = False,
           W: str = "contiguous", bias: bool = True, hot: bool = False, zeros: float = 0.2, nonfinite: bool = False,
           codes: str = "contiguous", batch: tuple[int, ...] | None = None, **options: Any) -> Case:  # fmt: skip
    """``fusae.decode``. `hot`: latent 0 in every row; `zeros`: share of padding; `ragged`: rows of 0 to k entries and a
    storage that is longer than its entries, filled with NaN and impossible indices."""

    def numbers(shape, gen):
        return patterns._ints(-3, 3, shape, gen) if exact else torch.randn(shape, generator=gen, dtype=FP64)

    def make(dtype, gen, device):
        values, indices = numbers((n, k), gen), patterns.distinct_indices(n, m, k, gen)
        values[torch.rand(n, k, generator=gen) < zeros] = 0.0
        if hot and k:
            indices = torch.where(indices == 0, indices[:, :1], indices)
            indices[:, 0], values[:, 0] = 0, 1.0
        W_, b_ = numbers((m, d), gen), numbers((d,), gen)
        if nonfinite:
            values[:, 0] = 0.0  # beside an infinite row: contributes nothing
            W_[indices[:, 0].long(), 0] = torch.inf
            values[n // 2, 1], W_[m - 1, d - 1] = torch.nan, -torch.inf
        values = values.to(dtype).to(device)
        indices = indices.to(device)
        if ragged:
            sparse = _ragged(values, indices, m, gen)
        else:
            values, indices = LAYOUTS[codes](values), LAYOUTS[codes](indices)
            if batch is not None:
                values, indices = values.view(*batch, k), indices.view(*batch, k)
            sparse = fusae.SparseCodes(values, indices, m)
        return {
            "codes": sparse,
            "W_dec": place(W_, dtype, device, W),
            "b_dec": b_.to(dtype).to(device) if bias else None,
        }

    if not name:
        parts = ("integers" if exact else "normal", ragged and "ragged", W != "contiguous" and f"W_{W}", hot and "hot",
                 not bias and "nobias", nonfinite and "nonfinite", codes != "contiguous" and f"codes_{codes}",
                 batch and "3d")  # fmt: skip
        name = "-".join(p for p in parts if p)
    options.setdefault("dtypes", (FP32, BF16))
    return Case("decode", name, {"n": n, "d": d, "m": m, "k": k}, make, exact,
                flops=2 * n * k * d, moved=min(m, n * k) * d + n * d + n * k, moved_fixed=4 * n * k,
                **options)  # fmt: skip


def _ragged(values: Tensor, indices: Tensor, m: int, gen: torch.Generator) -> fusae.SparseCodes:
    """The first 0 to k entries of every row (every fifth row empty), then a tail of 5 that no kernel may read."""
    n, k = values.shape
    width = torch.randint(0, k + 1, (n,), generator=gen)
    width[::5] = 0
    kept = torch.arange(k).expand(n, k) < width[:, None]
    kept = kept.to(values.device)
    tail_values = values.new_full((5,), torch.nan)
    tail_indices = indices.new_full((5,), 2**31 - 1)
    offsets = torch.zeros(n + 1, dtype=torch.int64)
    torch.cumsum(width, 0, out=offsets[1:])
    return fusae.SparseCodes(
        torch.cat([values[kept], tail_values]), torch.cat([indices[kept], tail_indices]), m, offsets.to(values.device)
    )


DECODE = [
    decode(199, 64, 257, 3, dtypes=ALL),
    decode(37, 576, 5000, 33, dtypes=(FP32, BF16, FP16), grad_layout="transposed"),
    decode(37, 257, 96, 96, W="transposed", dtypes=ALL),
    decode(37, 7, 300, 33, W="strided", bias=False),
    decode(37, 1, 63, 1, W="offset", dtypes=(FP32, FP16)),
    decode(1, 63, 1, 1, zeros=0.0),
    decode(0, 64, 96, 3),
    decode(37, 64, 96, 0, "k0"),
    decode(36, 96, 700, 8, batch=(3, 2, 6), grad_layout="expanded", dtypes=ALL),
    decode(37, 96, 700, 9, codes="strided", W="padded_rows"),
    decode(37, 96, 700, 9, codes="transposed", grad_layout="strided", dtypes=(FP32, FP16)),
    decode(37, 96, 700, 9, codes="expanded"),
    decode(37, 64, 20011, 513, bias=False),
    decode(199, 64, 300, 8, hot=True, dtypes=(FP32, BF16, FP16)),
    decode(199, 64, 20011, 8, hot=True, exact=True, dtypes=ALL),
    decode(37, 63, 700, 33, exact=True, W="transposed", dtypes=ALL),
    decode(37, 96, 700, 33, "all_padding", exact=True, zeros=1.1),
    decode(37, 576, 5000, 33, ragged=True, dtypes=ALL),
    decode(199, 64, 20011, 9, ragged=True, exact=True, hot=True, dtypes=(FP32, BF16, FP16)),
    decode(5, 7, 63, 1, ragged=True, W="transposed", grad_layout="expanded"),
    decode(0, 64, 96, 3, ragged=True),
    decode(1, 64, 96, 3, "empty", ragged=True),
    decode(37, 64, 700, 9, exact=True, nonfinite=True, bias=False, dtypes=(FP32, BF16, FP16)),
    decode(37, 64, 700, 9, exact=True, nonfinite=True, ragged=True),
]
