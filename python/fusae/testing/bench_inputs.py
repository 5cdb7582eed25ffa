# SPDX-License-Identifier: Apache-2.0
"""Inputs of the benchmarks: batches of activations and a sparse coder, made up or from a file; calls over batches."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..codes import SparseCodes
from ..ops import encode_topk

Call = Callable[[], object]
Build = Callable[["Inputs", int, str], Call]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Batches `xs` of ``[n, d]`` and a sparse coder: W_enc, W_dec ``[m, d]``, b_enc ``[m]``, b_dec ``[d]``.

    The pre-activations are ``W_enc (x - b_dec) + b_enc``, as in `fusae.nn.SparseCoder`.
    """

    xs: list[Tensor]
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor

    @property
    def bias(self) -> Tensor:
        """``b_enc - W_enc b_dec``: the bias of an encoder that takes x as it is."""
        return self.b_enc - self.W_enc @ self.b_dec

    @property
    def parameter_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.W_enc, self.b_enc, self.W_dec, self.b_dec))

    def to(self, *args: object) -> Inputs:
        """As ``torch.Tensor.to``, for every tensor."""
        rest = (self.W_enc, self.b_enc, self.W_dec, self.b_dec)
        return Inputs([x.to(*args) for x in self.xs], *(t.to(*args) for t in rest))


def _unit(rows: Tensor) -> Tensor:
    return rows.div_(rows.norm(dim=-1, keepdim=True).clamp_min_(1e-12))


def planted(n: int, d: int, m: int, k: int, *, batches: int = 3, seed: int = 0) -> Inputs:
    """Inputs with a known sparse structure, float32 on the CPU.

    A dictionary D of m random unit rows; every x is a sum of k rows drawn with probability ∝ 1 / (rank + 10) (so that
    some latents are busy and most are rare, as in trained dictionaries), with weights 0.5 + Exp(1), plus an offset that
    all rows share and Gaussian noise of length about 0.5. ``W_dec = D``; ``W_enc`` is D with noise of half the length
    of a row, normalised again; ``b_enc = 0``; b_dec is the offset.
    """
    generator = torch.Generator().manual_seed(seed)
    W_dec = _unit(torch.randn(m, d, generator=generator))
    W_enc = _unit(torch.randn(m, d, generator=generator).mul_(0.5 / d**0.5).add_(W_dec))
    share = (torch.arange(m, dtype=torch.float64) + 10).reciprocal_().cumsum_(0)
    latent_of_rank = torch.randperm(m, generator=generator)
    offset = torch.randn(d, generator=generator) / d**0.5
    xs = []
    for _ in range(batches):
        draw = torch.rand(n, k, generator=generator, dtype=torch.float64) * share[-1]
        latents = latent_of_rank[torch.searchsorted(share, draw).clamp_(max=m - 1)]
        weights = torch.empty(n, k).exponential_(generator=generator) + 0.5
        x = F.embedding_bag(latents, W_dec, per_sample_weights=weights, mode="sum")
        xs.append(x.add_(torch.randn(n, d, generator=generator), alpha=0.5 / d**0.5).add_(offset))
    return Inputs(xs, W_enc, torch.zeros(m), W_dec, offset)


def activations(path: str | Path, n: int, d: int, m: int, *, batches: int = 3, seed: int = 0) -> Inputs:
    """Inputs from real activations, a ``.npy`` file ``[rows, d]``: up to `batches` batches of n consecutive rows.

    The dictionary is untrained: unit-length differences of random pairs of rows, ``W_enc = W_dec``, ``b_enc = 0``;
    b_dec is the mean of the rows that were read.
    """
    import numpy

    stored = numpy.load(path, mmap_mode="r")
    if stored.ndim != 2 or stored.shape[1] != d or stored.dtype.kind != "f":
        raise ValueError(f"{path}: must hold a float array [rows, {d}], got {list(stored.shape)} {stored.dtype}")
    if stored.shape[0] < n:
        raise ValueError(f"{path}: must have at least n = {n} rows, got {stored.shape[0]}; lower --n")
    batches = min(batches, stored.shape[0] // n)
    x = torch.from_numpy(numpy.array(stored[: n * batches], dtype=numpy.float32))
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randint(len(x), (2, m), generator=generator)
    W = _unit(x[first].sub_(x[second]))
    return Inputs(list(x.split(n)), W, torch.zeros(m), W.clone(), x.mean(0))


def make_inputs(
    n: int,
    d: int,
    m: int,
    k: int,
    dtype: str = "float32",
    device: str = "cpu",
    data: str | None = None,
    batches: int = 3,
) -> Inputs:
    """`planted` inputs, or those of the file `data`, in `dtype` (a name in torch) on `device`."""
    if not 1 <= k <= m:
        raise ValueError(f"k must be between 1 and m = {m}, got {k}")
    made = planted(n, d, m, k, batches=batches) if data is None else activations(data, n, d, m, batches=batches)
    return made.to(torch.device(device), getattr(torch, dtype))


def over(xs: list, call: Callable) -> Call:
    """A call without arguments that takes the next of `xs` each time, round and round."""
    following = itertools.cycle(xs)
    return lambda: call(next(following))


def select(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = torch.topk(F.linear(x, W_enc, b_enc), k)
    return values.relu(), indices


def codes_of(inputs: Inputs, k: int) -> list[SparseCodes]:
    """Codes of every batch, a few rows at a time. Selected from float32 sums: the same latents in every dtype."""
    made, bias = [], inputs.bias
    for x in inputs.xs:
        parts = [encode_topk(rows, inputs.W_enc, bias, k) for rows in x.split(128)]
        values, indices = (torch.cat([getattr(part, name) for part in parts]) for name in ("values", "indices"))
        made.append(SparseCodes(values, indices, inputs.W_enc.shape[0]))
    return made
