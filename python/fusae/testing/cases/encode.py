# SPDX-License-Identifier: Apache-2.0
"""Cases of `topk` and `encode_topk`."""

from __future__ import annotations

from typing import Any

import torch

from .. import patterns
from .case import ALL, BF16, FP16, FP32, FP64, Case, Inputs, place


def topk(n: int, m: int, k: int, name: str = "", *, pattern: str = "normal", layout: str = "contiguous",
         batch: tuple[int, ...] | None = None, **options: Any) -> Case:  # fmt: skip
    """``fusae.topk`` on ``[n, m]`` (or ``[*batch, m]``)."""

    def make(dtype, gen, device):
        pre = place(patterns.PRE[pattern](n, m, gen), dtype, device, layout)
        return {"pre": pre if batch is None else pre.view(*batch, m), "k": k}

    options.setdefault("dtypes", (FP32, BF16, FP16))
    return Case("topk", name or f"{pattern}-{layout}", {"n": n, "m": m, "k": k}, make, True,
                moved=n * m + n * k, moved_fixed=4 * n * k, **options)  # fmt: skip


def encoder_inputs(n: int, d: int, m: int, pattern: str, x: str, W: str, bias: bool, norms: bool,
                   batch: tuple[int, ...] | None, dtype: torch.dtype, gen: torch.Generator,
                   device: torch.device) -> Inputs:  # fmt: skip
    """What all encoders take. `x`, `W`: layouts."""
    x_, W_, b_ = (t.to(dtype) for t in patterns.ENCODER[pattern](n, d, m, gen))
    x_, W_ = place(x_, dtype, device, x), place(W_, dtype, device, W)
    if batch is not None:
        x_ = x_.view(*batch, d)
    inputs = {"x": x_, "W_enc": W_, "b_enc": b_.to(device) if bias else None}
    if norms:
        acc = FP64 if dtype == FP64 else FP32
        exponent = torch.randint(-1, 2, (m,), generator=gen)  # powers of two keep exact cases exact
        inputs["norms"] = (2.0**exponent).to(acc).to(device)
    return inputs


def encode_topk(n: int, d: int, m: int, k: int, name: str = "", *, pattern: str = "normal", x: str = "contiguous",
                W: str = "contiguous", bias: bool = True, activation: str = "relu", select: str = "topk",
                norms: bool = False, aux: float | None = None, k_aux: int = 0, batch: tuple[int, ...] | None = None,
                **options: Any) -> Case:  # fmt: skip
    """``fusae.encode_topk``. `x`, `W`: layouts; `aux`: share of latents in the auxiliary mask, or None."""

    def make(dtype, gen, device):
        inputs = encoder_inputs(n, d, m, pattern, x, W, bias, norms, batch, dtype, gen, device)
        inputs |= {"k": k, "activation": activation}
        if select != "topk":
            inputs["select"] = select
        if aux is not None:
            inputs["aux_mask"] = (torch.rand(m, generator=gen) < aux).to(device)
            inputs["k_aux"] = k_aux
        return inputs

    if not name:
        parts = (pattern, x != "contiguous" and f"x_{x}", W != "contiguous" and f"W_{W}", not bias and "nobias",
                 activation != "relu" and activation, select != "topk" and select, norms and "norms",
                 aux is not None and f"aux{aux}k{k_aux}", batch and "3d")  # fmt: skip
        name = "-".join(p for p in parts if p)
    options.setdefault("dtypes", (FP32, BF16))
    return Case("encode_topk", name, {"n": n, "d": d, "m": m, "k": k}, make, pattern in patterns.EXACT,
                flops=2 * n * m * d, moved=n * d + m * d + m * bias + n * (k + k_aux),
                moved_fixed=4 * n * (k + k_aux), **options)  # fmt: skip


TOPK = [
    topk(199, 257, 3),
    topk(37, 96, 1, pattern="ties", dtypes=ALL),
    topk(37, 5000, 33, pattern="equal"),
    topk(37, 5000, 513, pattern="ties"),
    topk(7, 20011, 32, pattern="ascending"),
    topk(7, 20011, 32, pattern="descending", layout="padded_rows"),
    topk(5, 20011, 700, pattern="last_tile", dtypes=ALL),
    topk(37, 63, 63, pattern="ties", layout="strided"),
    topk(1, 1, 1),
    topk(0, 96, 3),
    topk(199, 96, 7, pattern="special", dtypes=ALL),
    topk(37, 9001, 40, pattern="special", layout="offset"),
    topk(37, 257, 190, pattern="subnormal", dtypes=ALL),
    topk(37, 63, 33, pattern="nan", dtypes=ALL),
    topk(7, 9001, 600, pattern="nan", layout="transposed"),
    topk(37, 257, 33, pattern="signed_zero", dtypes=ALL),
    topk(2100, 96, 5, "many_rows", pattern="ties"),
    topk(37, 257, 7, layout="expanded"),
    topk(36, 257, 8, "3d", batch=(3, 2, 6), dtypes=ALL, grad_layout="expanded"),
    topk(37, 257, 9, "grad_transposed", grad_layout="transposed"),
]

ENCODE_TOPK = [
    encode_topk(199, 64, 257, 3, dtypes=ALL),
    encode_topk(37, 576, 5000, 33, dtypes=(FP32, BF16, FP16), grad_layout="transposed"),
    encode_topk(19, 2304, 300, 7),
    encode_topk(19, 96, 20011, 32, activation="none", W="transposed"),
    encode_topk(5, 63, 20011, 600, bias=False, x="strided", dtypes=(FP32, FP16)),
    encode_topk(199, 257, 96, 96, x="transposed", W="padded_rows"),
    encode_topk(37, 7, 63, 1, x="offset", W="offset", dtypes=ALL),
    encode_topk(37, 1, 96, 5, W="strided", bias=False),
    encode_topk(1, 64, 1, 1),
    encode_topk(0, 64, 96, 3, aux=0.3, k_aux=5),
    encode_topk(2100, 7, 300, 5, "many_rows", aux=0.1, k_aux=40, pattern="integers"),
    encode_topk(199, 96, 5000, 700, pattern="integers", W="strided", x="padded_rows"),
    encode_topk(36, 64, 700, 9, batch=(3, 2, 6), norms=True, grad_layout="expanded"),
    encode_topk(37, 64, 9001, 20, x="expanded", norms=True, aux=0.1, k_aux=64, dtypes=(FP32, BF16, FP16)),
    encode_topk(37, 96, 700, 9, activation="none", select="abs", norms=True, dtypes=(FP32, FP16)),
    encode_topk(37, 64, 5000, 16, "aux_none", aux=0.0, k_aux=7, activation="none"),
    encode_topk(37, 64, 5000, 16, "aux_all", aux=1.1, k_aux=40, W="transposed", dtypes=ALL),
    encode_topk(37, 64, 9001, 16, "aux_fewer_than_k", aux=0.001, k_aux=50),
    encode_topk(199, 64, 300, 8, pattern="one_hot_latent", grad_layout="expanded"),
    encode_topk(37, 64, 5000, 40, pattern="integers", aux=0.05, k_aux=300, norms=True, dtypes=ALL),
    encode_topk(37, 96, 20011, 33, pattern="wide_integers", dtypes=(FP32, BF16, FP16)),
    encode_topk(19, 257, 9001, 33, pattern="wide_integers", activation="none", select="abs", W="transposed"),
    encode_topk(19, 64, 700, 30, pattern="overflow", dtypes=(FP16, FP32)),
    encode_topk(37, 64, 20011, 33, pattern="zero_x", aux=0.01, k_aux=300),
    encode_topk(37, 64, 5000, 3, pattern="negative_zero", activation="none"),
    encode_topk(37, 63, 20011, 520, pattern="equal_latents", dtypes=(FP32, BF16, FP16)),
    encode_topk(37, 64, 20011, 64, pattern="duplicates", aux=0.5, k_aux=64),
    encode_topk(7, 16, 20011, 64, pattern="monotone", activation="none", aux=0.5, k_aux=513),
    encode_topk(6, 16, 20011, 513, pattern="monotone", norms=True, dtypes=(FP32, FP16)),
    encode_topk(37, 64, 9001, 33, pattern="few_positive", aux=0.01, k_aux=33, dtypes=(FP32, BF16, FP16)),
    encode_topk(37, 64, 5000, 33, pattern="all_negative"),
    encode_topk(37, 64, 5000, 33, pattern="all_negative", activation="none", norms=True),
    encode_topk(37, 64, 9001, 33, pattern="nan_rows", aux=0.01, k_aux=33),
    encode_topk(37, 64, 9001, 33, pattern="nan_latent", aux=0.5, k_aux=33, dtypes=(FP32, BF16, FP16)),
    encode_topk(37, 64, 9001, 33, pattern="nan_latent", activation="none", select="abs", norms=True),
    encode_topk(37, 64, 9001, 600, pattern="nan_many", aux=0.6, k_aux=20),
    encode_topk(37, 64, 9001, 33, pattern="infinite", aux=0.5, k_aux=33, norms=True, dtypes=(FP32, BF16, FP16)),
    encode_topk(37, 64, 9001, 33, pattern="infinite", activation="none", select="abs"),
    encode_topk(37, 64, 700, 33, pattern="subnormal", activation="none", dtypes=(FP32, FP64)),
    encode_topk(39, 64, 5000, 50, select="group_max", dtypes=ALL),
    encode_topk(37, 96, 700, 175, select="group_max", norms=True, aux=0.3, k_aux=9, x="strided"),
    encode_topk(37, 64, 20011, 1, select="group_max", pattern="integers", W="transposed"),
    encode_topk(37, 64, 700, 700, select="group_max", pattern="integers", bias=False),
    encode_topk(36, 7, 96, 4, "group_max_3d", select="group_max", batch=(3, 2, 6), grad_layout="expanded"),
    encode_topk(0, 64, 96, 3, "group_max", select="group_max"),
    encode_topk(37, 64, 5000, 8, select="group_max", pattern="equal_latents", activation="none", dtypes=(FP32, FP16)),
    encode_topk(37, 64, 5000, 40, select="group_max", pattern="negative_zero", activation="none"),
    encode_topk(37, 64, 9000, 30, select="group_max", pattern="nan_many", aux=0.5, k_aux=20),
    encode_topk(37, 64, 9000, 60, select="group_max", pattern="nan_latent", norms=True, dtypes=(FP32, BF16, FP16)),
    encode_topk(7, 64, 9000, 3000, select="group_max", pattern="nan_rows", activation="none"),
    encode_topk(37, 64, 9000, 36, select="group_max", pattern="infinite", activation="none"),
    encode_topk(37, 64, 5000, 25, select="group_max", pattern="all_negative", dtypes=(FP32, BF16)),
    encode_topk(7, 16, 20000, 20, select="group_max", pattern="monotone", activation="none"),
]
