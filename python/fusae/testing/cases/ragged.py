# SPDX-License-Identifier: Apache-2.0
"""Cases of `encode_threshold` and `encode_batch_topk`."""

from __future__ import annotations

from typing import Any

import torch

from .. import patterns
from .case import ALL, BF16, FP16, FP32, FP64, Case
from .encode import encoder_inputs


def _name(pattern: str, x: str, W: str, bias: bool, norms: bool, batch: tuple[int, ...] | None, *more: object) -> str:
    parts = (pattern, x != "contiguous" and f"x_{x}", W != "contiguous" and f"W_{W}", not bias and "nobias",
             norms and "norms", *more, batch and "3d")  # fmt: skip
    return "-".join(str(p) for p in parts if p)


def encode_threshold(n: int, d: int, m: int, threshold: float | tuple[float, float], name: str = "", *,
                     pattern: str = "normal", x: str = "contiguous", W: str = "contiguous", bias: bool = True,
                     norms: bool = False, bandwidth: float | None = None, straight_through: bool = False,
                     capacity: int | None = None, batch: tuple[int, ...] | None = None,
                     **options: Any) -> Case:  # fmt: skip
    """``fusae.encode_threshold``. `threshold`: one number, or the lowest and highest of a threshold for each latent
    (multiples of 1/4, so that exact cases meet theirs); ``capacity``: entries to spare."""

    def make(dtype, gen, device):
        inputs = encoder_inputs(n, d, m, pattern, x, W, bias, norms, batch, dtype, gen, device)
        limit = threshold
        if isinstance(limit, tuple):
            limit = torch.randint(int(4 * limit[0]), int(4 * limit[1]) + 1, (m,), generator=gen) / 4
            limit = limit.to(FP64 if dtype == FP64 else FP32).to(device)
        inputs["threshold"] = limit
        if bandwidth is not None:
            inputs |= {"bandwidth": bandwidth, "straight_through": straight_through}
        if capacity is not None:
            inputs["capacity"] = n * m + capacity
        return inputs

    size = f"t{threshold}" if not isinstance(threshold, tuple) else f"t{threshold[0]}to{threshold[1]}"
    name = name or _name(pattern, x, W, bias, norms, batch, size, bandwidth and f"window{bandwidth}",
                         straight_through and "straight_through", capacity is not None and "capacity")  # fmt: skip
    options.setdefault("dtypes", (FP32, BF16))
    return Case("encode_threshold", name, {"n": n, "d": d, "m": m}, make, pattern in patterns.EXACT,
                flops=2 * n * m * d, moved=n * d + m * d + m * bias, moved_fixed=4 * m, **options)  # fmt: skip


def encode_batch_topk(n: int, d: int, m: int, k: int, name: str = "", *, pattern: str = "normal",
                      x: str = "contiguous", W: str = "contiguous", bias: bool = True, activation: str = "relu",
                      norms: bool = False, aux: float | None = None, k_aux: int = 0,
                      batch: tuple[int, ...] | None = None, **options: Any) -> Case:  # fmt: skip
    """``fusae.encode_batch_topk``. `x`, `W`: layouts; `aux`: share of latents in the auxiliary mask, or None."""

    def make(dtype, gen, device):
        inputs = encoder_inputs(n, d, m, pattern, x, W, bias, norms, batch, dtype, gen, device)
        inputs |= {"k": k, "activation": activation}
        if aux is not None:
            inputs["aux_mask"] = (torch.rand(m, generator=gen) < aux).to(device)
            inputs["k_aux"] = k_aux
        return inputs

    name = name or _name(pattern, x, W, bias, norms, batch, activation != "relu" and activation,
                         aux is not None and f"aux{aux}k{k_aux}")  # fmt: skip
    options.setdefault("dtypes", (FP32, BF16))
    return Case("encode_batch_topk", name, {"n": n, "d": d, "m": m, "k": k}, make, pattern in patterns.EXACT,
                flops=2 * n * m * d, moved=n * d + m * d + m * bias + n * (k + k_aux),
                moved_fixed=4 * n * (k + k_aux), **options)  # fmt: skip


INF = float("inf")

ENCODE_THRESHOLD = [
    encode_threshold(199, 64, 257, 1.0, dtypes=ALL),
    encode_threshold(37, 576, 5000, (1.0, 3.0), dtypes=(FP32, BF16, FP16), grad_layout="strided"),
    encode_threshold(19, 96, 20011, 2.0, W="transposed"),
    encode_threshold(5, 63, 20011, (0.5, 2.0), bias=False, x="strided", dtypes=(FP32, FP16)),
    encode_threshold(199, 257, 96, 0, x="transposed", W="padded_rows"),
    encode_threshold(37, 7, 63, 0.5, x="offset", W="offset", dtypes=ALL),
    encode_threshold(37, 1, 96, (0.0, 1.0), W="strided", bias=False),
    encode_threshold(1, 64, 1, -100.0, "one"),
    encode_threshold(0, 64, 96, 0.0),
    encode_threshold(36, 64, 700, 1.0, batch=(3, 2, 6), norms=True, grad_layout="expanded"),
    encode_threshold(37, 64, 9001, 2.0, x="expanded", norms=True, dtypes=(FP32, BF16, FP16)),
    encode_threshold(7, 64, 5000, -INF, "everything", pattern="integers"),
    encode_threshold(37, 64, 5000, INF, "nothing", pattern="integers"),
    encode_threshold(2100, 7, 300, (4.0, 12.0), "many_rows", pattern="integers", capacity=5),
    encode_threshold(39, 96, 5000, (20.0, 30.0), pattern="integers", W="strided", x="padded_rows", dtypes=ALL),
    encode_threshold(37, 64, 5000, 0.0, "capacity", pattern="integers", capacity=0, dtypes=(FP32, FP16)),
    encode_threshold(37, 96, 20011, 900.0, pattern="wide_integers", dtypes=(FP32, BF16, FP16)),
    encode_threshold(19, 64, 700, 65504.0, pattern="overflow", dtypes=(FP16, FP32)),
    encode_threshold(37, 64, 20011, 0.0, pattern="zero_x"),
    encode_threshold(37, 64, 5000, 0.0, pattern="negative_zero"),
    encode_threshold(37, 64, 5000, -0.25, pattern="negative_zero"),
    encode_threshold(37, 63, 20011, 3.0, pattern="equal_latents"),
    encode_threshold(7, 16, 20011, 9000.0, pattern="monotone"),
    encode_threshold(37, 64, 5000, 0.0, pattern="all_negative"),
    encode_threshold(37, 64, 9001, 30.0, pattern="nan_rows"),
    encode_threshold(37, 64, 9001, (20.0, 40.0), pattern="nan_latent", norms=True, dtypes=(FP32, BF16, FP16)),
    encode_threshold(37, 64, 9001, INF, "nan_many", pattern="nan_many"),
    encode_threshold(37, 64, 9001, 30.0, pattern="infinite", dtypes=(FP32, BF16, FP16)),
    encode_threshold(37, 64, 9001, INF, "infinite_and_threshold_too", pattern="infinite"),
    encode_threshold(37, 64, 700, 0.0, pattern="subnormal", dtypes=(FP32, FP64)),
    encode_threshold(37, 64, 700, 0.0, pattern="rounds_to_zero", dtypes=ALL),
    encode_threshold(199, 64, 300, 3.0, pattern="one_hot_latent"),
    # With a window: on integers and quarters, entries lie on both of its edges (which are outside) and on thresholds.
    encode_threshold(37, 64, 700, (0.5, 3.0), bandwidth=0.5, dtypes=ALL),
    encode_threshold(19, 96, 300, 1.0, bandwidth=0.25, straight_through=True, dtypes=ALL, grad_layout="strided"),
    encode_threshold(37, 64, 5000, (10.0, 20.0), pattern="integers", bandwidth=2.5, dtypes=ALL),
    encode_threshold(37, 64, 5000, (10.0, 20.0), pattern="integers", bandwidth=4.0, straight_through=True, dtypes=ALL),
    encode_threshold(36, 96, 700, (-9.0, 9.0), pattern="integers", bandwidth=6.0, straight_through=True, bias=False,
                     batch=(3, 2, 6), capacity=3),
    encode_threshold(0, 64, 96, 1.0, bandwidth=1.0),
    encode_threshold(17, 64, 300, 2.0, "window_of_everything", pattern="integers", bandwidth=1e6),
    encode_threshold(37, 64, 700, 0.0, pattern="negative_zero", bandwidth=1.0),
    encode_threshold(37, 64, 700, 2.0**-26, pattern="rounds_to_zero", bandwidth=2.0**-25, straight_through=True,
                     dtypes=ALL),
    encode_threshold(37, 64, 900, 20.0, pattern="nan_latent", bandwidth=8.0),
    encode_threshold(37, 64, 900, INF, "infinite_window", pattern="infinite", bandwidth=8.0),
]  # fmt: skip

ENCODE_BATCH_TOPK = [
    encode_batch_topk(199, 64, 257, 3, dtypes=ALL),
    encode_batch_topk(19, 576, 5000, 33, dtypes=(FP32, BF16, FP16), grad_layout="strided"),
    encode_batch_topk(19, 96, 20011, 32, activation="none", W="transposed"),
    encode_batch_topk(5, 63, 20011, 600, bias=False, x="strided", dtypes=(FP32, FP16)),
    encode_batch_topk(199, 257, 96, 96, x="transposed", W="padded_rows", activation="none"),
    encode_batch_topk(37, 7, 63, 63, x="offset", W="offset", dtypes=ALL),
    encode_batch_topk(37, 1, 96, 1, W="strided", bias=False),
    encode_batch_topk(1, 64, 1, 1),
    encode_batch_topk(1, 64, 20011, 40, "one_row", activation="none"),
    encode_batch_topk(0, 64, 96, 3, aux=0.3, k_aux=5),
    encode_batch_topk(2100, 7, 300, 5, "many_rows", aux=0.1, k_aux=40, pattern="integers"),
    encode_batch_topk(1000, 7, 700, 2, "many_ties", pattern="equal_latents", dtypes=(FP32,)),
    encode_batch_topk(39, 96, 5000, 70, pattern="integers", W="strided", x="padded_rows", dtypes=ALL),
    encode_batch_topk(36, 64, 700, 9, batch=(3, 2, 6), norms=True, aux=0.5, k_aux=8, grad_layout="expanded"),
    encode_batch_topk(37, 64, 9001, 20, x="expanded", norms=True, aux=0.1, k_aux=64, dtypes=(FP32, BF16, FP16)),
    encode_batch_topk(37, 64, 5000, 40, pattern="integers", aux=0.05, k_aux=300, norms=True, dtypes=ALL),
    encode_batch_topk(37, 96, 20011, 33, pattern="wide_integers", dtypes=(FP32, BF16, FP16)),
    encode_batch_topk(19, 64, 700, 30, pattern="overflow", dtypes=(FP16, FP32)),
    encode_batch_topk(37, 64, 20011, 33, pattern="zero_x", aux=0.01, k_aux=300),
    encode_batch_topk(37, 64, 20011, 33, pattern="zero_x", activation="none"),
    encode_batch_topk(37, 64, 5000, 3, pattern="negative_zero", activation="none"),
    encode_batch_topk(37, 63, 20011, 520, pattern="equal_latents", dtypes=(FP32, BF16, FP16)),
    encode_batch_topk(37, 64, 20011, 64, pattern="duplicates", aux=0.5, k_aux=64),
    encode_batch_topk(7, 16, 20011, 64, pattern="monotone", activation="none", aux=0.5, k_aux=513),
    encode_batch_topk(6, 16, 20011, 513, pattern="monotone", norms=True),
    encode_batch_topk(37, 64, 9001, 33, pattern="few_positive", aux=0.01, k_aux=33, dtypes=(FP32, BF16, FP16)),
    encode_batch_topk(37, 64, 5000, 33, pattern="all_negative"),
    encode_batch_topk(37, 64, 5000, 33, pattern="all_negative", activation="none", norms=True),
    encode_batch_topk(37, 64, 9001, 33, pattern="nan_rows", aux=0.01, k_aux=33),
    encode_batch_topk(37, 64, 9001, 33, pattern="nan_latent", aux=0.5, k_aux=33, dtypes=(FP32, BF16, FP16)),
    encode_batch_topk(37, 64, 9001, 600, pattern="nan_many", aux=0.6, k_aux=20),
    encode_batch_topk(37, 64, 9001, 33, pattern="infinite", aux=0.5, k_aux=33, norms=True, dtypes=(FP32, BF16)),
    encode_batch_topk(5, 64, 9001, 8000, pattern="infinite", activation="none"),
    encode_batch_topk(37, 64, 700, 33, pattern="subnormal", activation="none", dtypes=(FP32, FP64)),
    encode_batch_topk(199, 64, 300, 8, pattern="one_hot_latent", grad_layout="expanded"),
]
