# SPDX-License-Identifier: Apache-2.0
"""Inputs that break kernels: value patterns and memory layouts.

Encoder patterns return ``(x [n, d], W_enc [m, d], b_enc [m])`` on the CPU in float64, rounded by the caller. Those in
`EXACT` hold small integers (or make every row all NaN, Inf, ...), so that sums are exact in float32 in any order and
every backend has to agree with the reference index by index.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

F64 = torch.float64


def _ints(low: int, high: int, shape: tuple[int, ...], gen: Generator) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=gen).to(F64)


def _randn(shape: tuple[int, ...], gen: Generator) -> Tensor:
    return torch.randn(shape, generator=gen, dtype=F64)


# --- encoder inputs -------------------------------------------------------------------------------------------------


def normal(n: int, d: int, m: int, gen: Generator):
    return _randn((n, d), gen), _randn((m, d), gen) / math.sqrt(d), 0.1 * _randn((m,), gen)


def integers(n: int, d: int, m: int, gen: Generator):
    """Small integers: thousands of exact ties in every row."""
    return _ints(-2, 2, (n, d), gen), _ints(-2, 2, (m, d), gen), _ints(-3, 3, (m,), gen)


def wide_integers(n: int, d: int, m: int, gen: Generator):
    """Sums beyond 256: many differ in float32 and agree in bfloat16, and the float32 order counts."""
    return _ints(-15, 15, (n, d), gen), _ints(-15, 15, (m, d), gen), _ints(-30, 30, (m,), gen)


def overflow(n: int, d: int, m: int, gen: Generator):
    """Sums beyond float16: values become Inf, the order is still that of the sums."""
    return _ints(100, 255, (n, d), gen), _ints(0, 60, (m, d), gen), _ints(-30, 30, (m,), gen)


def zero_x(n: int, d: int, m: int, gen: Generator):
    x, W, b = integers(n, d, m, gen)
    return torch.zeros_like(x), W, torch.zeros_like(b)


def negative_zero(n: int, d: int, m: int, gen: Generator):
    """Pre-activations that are -0.0 or +0.0: all the same."""
    x, W, b = integers(n, d, m, gen)
    return torch.zeros_like(x).neg(), W, torch.zeros_like(b).neg()


def equal_latents(n: int, d: int, m: int, gen: Generator):
    """All latents alike: one tie across every column tile."""
    x, W, b = integers(n, d, m, gen)
    return x, W[:1].repeat(m, 1), b[:1].repeat(m)


def duplicates(n: int, d: int, m: int, gen: Generator):
    """Latents j and j + m/2 alike: ties across far-apart tiles."""
    x, W, b = integers(n, d, m, gen)
    half = (m + 1) // 2
    return x, W[:half].repeat(2, 1)[:m], b[:half].repeat(2)[:m]


def monotone(n: int, d: int, m: int, gen: Generator):
    """Pre-activations ascending in even rows (the worst for a running threshold), descending in odd ones."""
    x = torch.zeros(n, d, dtype=F64)
    x[0::2, 0], x[1::2, 0] = 1.0, -1.0
    W = torch.zeros(m, d, dtype=F64)
    W[:, 0] = torch.arange(m) - m // 2
    return x, W, torch.zeros(m, dtype=F64)


def few_positive(n: int, d: int, m: int, gen: Generator):
    """Only two latents can be positive: fewer than k."""
    x, W, b = integers(n, d, m, gen)
    b -= 8192
    b[[m // 3, m - 1]] += 8192
    return x, W, b


def all_negative(n: int, d: int, m: int, gen: Generator):
    x, W, b = integers(n, d, m, gen)
    return x, W, b - 8192


def nan_rows(n: int, d: int, m: int, gen: Generator):
    x, W, b = integers(n, d, m, gen)
    x[::3, d // 2] = math.nan
    return x, W, b


def nan_latent(n: int, d: int, m: int, gen: Generator):
    x, W, b = integers(n, d, m, gen)
    W[m // 2, 0] = math.nan
    b[m - 1] = -math.nan
    return x, W, b


def nan_many(n: int, d: int, m: int, gen: Generator):
    """More NaN latents than k: the lowest ones win."""
    x, W, b = integers(n, d, m, gen)
    W[m // 4 :: 2, 0] = math.nan
    return x, W, b


def infinite(n: int, d: int, m: int, gen: Generator):
    """±Inf in weights and bias (0 · Inf and Inf - Inf give NaN in some rows)."""
    x, W, b = integers(n, d, m, gen)
    W[m // 2, 0], W[m // 3, 0] = math.inf, -math.inf
    b[0], b[m - 1], b[m // 5] = math.inf, math.inf, -math.inf
    return x, W, b


def subnormal(n: int, d: int, m: int, gen: Generator):
    """Activations that are subnormal in float32 and float16."""
    x, W, b = integers(n, d, m, gen)
    return x * 2.0**-149, W, torch.zeros_like(b)


def rounds_to_zero(n: int, d: int, m: int, gen: Generator):
    """Sums that are a few times 2^-26: float16 rounds those of 1 and 2 times it to 0, float32 and bfloat16 none."""
    x, W, b = integers(n, d, m, gen)
    x[:, 2:] = 0  # few terms, so that many sums are small
    return x * 2.0**-13, W * 2.0**-13, torch.zeros_like(b)


def one_hot_latent(n: int, d: int, m: int, gen: Generator):
    """One latent is active in every row, the others seldom: the longest possible sum in the backward pass."""
    x, W, b = normal(n, d, m, gen)
    b[m // 2] += 100.0
    return x, W, b


ENCODER: dict[str, Callable] = {
    f.__name__: f
    for f in (
        normal, integers, wide_integers, overflow, zero_x, negative_zero, equal_latents, duplicates, monotone,
        few_positive, all_negative, nan_rows, nan_latent, nan_many, infinite, subnormal, rounds_to_zero, one_hot_latent,
    )
}  # fmt: skip
EXACT = frozenset(ENCODER) - {"normal", "one_hot_latent"}


# --- a materialised [n, m] ------------------------------------------------------------------------------------------


def pre_normal(n: int, m: int, gen: Generator):
    return _randn((n, m), gen)


def pre_ties(n: int, m: int, gen: Generator):
    return _ints(-3, 3, (n, m), gen)


def pre_equal(n: int, m: int, gen: Generator):
    return torch.full((n, m), -1.5, dtype=F64)


def pre_ascending(n: int, m: int, gen: Generator):
    return (torch.arange(m, dtype=F64) / m - 0.5).expand(n, m).clone()


def pre_descending(n: int, m: int, gen: Generator):
    return pre_ascending(n, m, gen).flip(1)


def pre_last_tile(n: int, m: int, gen: Generator):
    """The largest entries all in the last columns."""
    pre = _randn((n, m), gen)
    pre[:, -max(1, m // 20) :] += 100.0
    return pre


def pre_special(n: int, m: int, gen: Generator):
    """NaN (also with the sign bit), ±Inf, ±0 and subnormals among ordinary values."""
    pre = _ints(-2, 2, (n, m), gen)
    special = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 2.0**-149, -(2.0**-149)], dtype=F64)
    place = torch.randint(0, m, (n, max(1, m // 7)), generator=gen)
    which = torch.randint(0, len(special), place.shape, generator=gen)
    return pre.scatter(1, place, special[which])


def pre_subnormal(n: int, m: int, gen: Generator):
    """Nothing above the smallest subnormals of float32, bfloat16 or float16: they differ, and 0 is below them."""
    scale = torch.tensor([2.0**-149, 2.0**-133, 2.0**-24, 0.0], dtype=F64)
    scale = scale[torch.randint(0, 4, (n, m), generator=gen)]
    return scale * _ints(-2, 1, (n, m), gen)


def pre_nan(n: int, m: int, gen: Generator):
    """Row 0 mod 3: all NaN; row 1 mod 3: NaN in every second latent; others none."""
    pre = _ints(-2, 2, (n, m), gen)
    pre[0::3] = math.nan
    pre[1::3, 1::2] = math.nan
    return pre


def pre_signed_zero(n: int, m: int, gen: Generator):
    """Nothing but -0.0 and +0.0: one tie."""
    return torch.where(_randn((n, m), gen) > 0, 0.0, -0.0)


PRE: dict[str, Callable] = {
    f.__name__[4:]: f
    for f in (
        pre_normal, pre_ties, pre_equal, pre_ascending, pre_descending, pre_last_tile, pre_special, pre_nan,
        pre_subnormal, pre_signed_zero,
    )
}  # fmt: skip


# --- codes ----------------------------------------------------------------------------------------------------------


def distinct_indices(n: int, m: int, k: int, gen: Generator) -> Tensor:
    """``[n, k]`` int32, distinct in every row, in no order."""
    if n * m <= 1_000_000:
        return torch.rand(n, m, generator=gen).argsort(1)[:, :k].to(torch.int32)
    start = torch.randint(0, m, (n, 1), generator=gen)
    stride = 2 * torch.randint(0, m // (2 * k), (n, 1), generator=gen) + 1
    return ((start + stride * torch.arange(k)) % m).to(torch.int32)


# --- layouts --------------------------------------------------------------------------------------------------------


def strided(t: Tensor) -> Tensor:
    """Every second column of a wider matrix."""
    wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), 7.0)
    wide[..., ::2] = t
    return wide[..., ::2]


def padded_rows(t: Tensor) -> Tensor:
    """Unit stride inside a row, a gap of 3 after it."""
    wide = t.new_full((*t.shape[:-1], t.shape[-1] + 3), 7.0)
    wide[..., :-3] = t
    return wide[..., :-3]


def transposed(t: Tensor) -> Tensor:
    """The transpose of a contiguous matrix: a ``[d, m]`` parameter's ``.T``."""
    return t.mT.contiguous().mT


def offset(t: Tensor) -> Tensor:
    """Contiguous, but starting 1 element into its storage (misaligned for wide loads)."""
    flat = t.new_full((t.numel() + 1,), 7.0)
    flat[1:] = t.flatten()
    return flat[1:].view(t.shape)


def expanded(t: Tensor) -> Tensor:
    """The first row for all rows, with stride 0."""
    return t[:1].expand(t.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "strided": strided,
    "padded_rows": padded_rows,
    "transposed": transposed,
    "offset": offset,
    "expanded": expanded,
}
