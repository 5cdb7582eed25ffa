# SPDX-License-Identifier: Apache-2.0
"""The cases on which every backend is tested and benchmarked: a shape, a generator of inputs, the public call, a cost.

`CASES` is the conformance list, chosen so that every size, pattern, layout and option meets every other kind of hazard
at least once (pairs, not the full product). The same builders make other cases: ``encode_topk(n=2048, d=576, ...)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fusae

from . import patterns
from .patterns import LAYOUTS

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
ALL = (FP32, BF16, FP16, FP64)

Inputs = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of one public op.

    Attributes:
        op: name of the public op, ``fusae.<op>``.
        name: unique among the cases of the op.
        shape: sizes by letter: n, d, m, k.
        make: ``make(dtype, generator, device)`` gives the keyword arguments of the call.
        exact: sums are exact in float32, so every backend equals the reference bit by bit.
        dtypes: dtypes that the case is for.
        grad_layout: memory layout of the output's gradient in the backward test.
        flops, moved: operations, and elements that have to cross memory once, of one forward call.
    """

    op: str
    name: str
    shape: dict[str, int]
    make: Callable[[torch.dtype, torch.Generator, torch.device], Inputs]
    exact: bool = False
    dtypes: tuple[torch.dtype, ...] = (FP32,)
    grad_layout: str = "contiguous"
    flops: int = 0
    moved: int = 0
    moved_fixed: int = 0

    def inputs(self, dtype: torch.dtype = FP32, seed: int = 0, device: str | torch.device = "cpu") -> Inputs:
        """Keyword arguments of the public function. The same seed gives the same numbers in every dtype, rounded."""
        return self.make(dtype, torch.Generator().manual_seed(seed), torch.device(device))

    def call(self, inputs: Inputs, backend: str | None = None) -> Any:
        """``fusae.<op>(**inputs)``."""
        return getattr(fusae, self.op)(**inputs, backend=backend)

    def bytes(self, dtype: torch.dtype) -> int:
        """Least memory traffic of a forward call: every input and output once (rows that are gathered, once each)."""
        return self.moved * dtype.itemsize + self.moved_fixed

    @property
    def raw_ops(self) -> tuple[str, ...]:
        """Raw ops behind the public one, forward and backward."""
        return {
            "topk": ("topk_fwd", "topk_bwd"),
            "encode_topk": ("encode_topk_fwd", "encode_bwd"),
            "decode": ("decode_fwd", "decode_bwd"),
            "adam_rows_": ("adam_rows_",),
        }[self.op]

    def __str__(self) -> str:
        sizes = "-".join(f"{letter}{size}" for letter, size in self.shape.items())
        return f"{self.op}-{sizes}-{self.name}"


def _place(t: Tensor, dtype: torch.dtype, device: torch.device, layout: str = "contiguous") -> Tensor:
    return LAYOUTS[layout](t.to(dtype).to(device))


def topk(n: int, m: int, k: int, name: str = "", *, pattern: str = "normal", layout: str = "contiguous",
         batch: tuple[int, ...] | None = None, **options: Any) -> Case:  # fmt: skip
    """``fusae.topk`` on ``[n, m]`` (or ``[*batch, m]``)."""

    def make(dtype, gen, device):
        pre = _place(patterns.PRE[pattern](n, m, gen), dtype, device, layout)
        return {"pre": pre if batch is None else pre.view(*batch, m), "k": k}

    options.setdefault("dtypes", (FP32, BF16, FP16))
    return Case("topk", name or f"{pattern}-{layout}", {"n": n, "m": m, "k": k}, make, True,
                moved=n * m + n * k, moved_fixed=4 * n * k, **options)  # fmt: skip


def encode_topk(n: int, d: int, m: int, k: int, name: str = "", *, pattern: str = "normal", x: str = "contiguous",
                W: str = "contiguous", bias: bool = True, activation: str = "relu", select: str = "topk",
                norms: bool = False, aux: float | None = None, k_aux: int = 0, batch: tuple[int, ...] | None = None,
                **options: Any) -> Case:  # fmt: skip
    """``fusae.encode_topk``. `x`, `W`: layouts; `aux`: share of latents in the auxiliary mask, or None."""

    def make(dtype, gen, device):
        x_, W_, b_ = (t.to(dtype) for t in patterns.ENCODER[pattern](n, d, m, gen))
        x_, W_ = _place(x_, dtype, device, x), _place(W_, dtype, device, W)
        if batch is not None:
            x_ = x_.view(*batch, d)
        inputs = {"x": x_, "W_enc": W_, "b_enc": b_.to(device) if bias else None, "k": k, "activation": activation}
        if select != "topk":
            inputs["select"] = select
        if norms:
            acc = FP64 if dtype == FP64 else FP32
            exponent = torch.randint(-1, 2, (m,), generator=gen)  # powers of two keep exact cases exact
            inputs["norms"] = (2.0**exponent).to(acc).to(device)
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
            "W_dec": _place(W_, dtype, device, W),
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


def adam_rows_(m: int, d: int, name: str = "", *, sparse: float | None = None, masked: bool = False, step: int = 7,
               zero_rows: bool = False, **options: Any) -> Case:  # fmt: skip
    """``fusae.adam_rows_``. `sparse`: share of rows in a sparse gradient, or None for a dense one; the other keywords
    (betas, eps, weight_decay, decoupled, project, renormalise) go to the op."""
    call = {key: options.pop(key) for key in tuple(options)
            if key in ("betas", "eps", "weight_decay", "decoupled", "project", "renormalise")}  # fmt: skip

    def make(dtype, gen, device):
        state = FP64 if dtype == FP64 else FP32
        param = torch.randn(m, d, generator=gen, dtype=FP64)
        param /= param.norm(dim=1, keepdim=True)
        if zero_rows:
            param[::4] = 0.0
        first = step == 1
        exp_avg = torch.randn(m, d, generator=gen, dtype=FP64) * (0.0 if first else 1e-3)
        exp_avg_sq = torch.rand(m, d, generator=gen, dtype=FP64) * (0.0 if first else 1e-5)
        grad = torch.randn(m, d, generator=gen, dtype=FP64) * 1e-2
        if zero_rows:
            grad[::3], exp_avg[::12] = 0.0, 0.0
        grad = grad.to(dtype).to(device)
        if sparse is not None:
            rows = (torch.rand(m, generator=gen) < sparse).nonzero().flatten().to(device)
            grad = torch.sparse_coo_tensor(rows[None], grad[rows], (m, d), is_coalesced=True, check_invariants=False)
        tensors = {"param": param.to(dtype), "exp_avg": exp_avg.to(state), "exp_avg_sq": exp_avg_sq.to(state)}
        tensors = {key: t.to(device) for key, t in tensors.items()}
        lr = 0.1  # an update as large as the weights: no error of it hides behind their rounding
        return {**tensors, "grad": grad, "lr": lr, "step": step, "masked": masked, **call}

    options.setdefault("dtypes", (FP32, BF16))
    rows = m if not masked else int(m * (sparse or 0))
    return Case("adam_rows_", name or "plain", {"m": m, "d": d}, make, False,
                flops=12 * rows * d, moved=3 * rows * d, moved_fixed=16 * rows * d, **options)  # fmt: skip


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
]

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

ADAM_ROWS = [
    adam_rows_(96, 64, "first_step", step=1, dtypes=ALL),
    adam_rows_(199, 257, dtypes=(FP32, BF16, FP16)),
    adam_rows_(1, 1),
    adam_rows_(5000, 7, "late", step=100_000),
    adam_rows_(300, 63, "l2", weight_decay=0.1, betas=(0.0, 0.9)),
    adam_rows_(300, 63, "adamw", weight_decay=0.1, decoupled=True, eps=1e-3, dtypes=ALL),
    adam_rows_(300, 576, "project", project=True),
    adam_rows_(300, 63, "unit_norm", project=True, renormalise=True, zero_rows=True, dtypes=ALL),
    adam_rows_(300, 63, "renormalise_adamw", renormalise=True, weight_decay=0.1, decoupled=True),
    adam_rows_(300, 96, "sparse_grad", sparse=0.3, dtypes=ALL),
    adam_rows_(300, 96, "sparse_grad_unit_norm", sparse=0.3, project=True, renormalise=True, zero_rows=True),
    adam_rows_(300, 96, "masked", sparse=0.3, masked=True, dtypes=ALL),
    adam_rows_(300, 63, "masked_unit_norm", sparse=0.3, masked=True, project=True, renormalise=True),
    adam_rows_(300, 96, "masked_no_rows", sparse=0.0, masked=True),
    adam_rows_(300, 96, "no_rows", sparse=0.0),
]

CASES = TOPK + ENCODE_TOPK + DECODE + ADAM_ROWS
