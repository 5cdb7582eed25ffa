# SPDX-License-Identifier: Apache-2.0
"""Inputs of the benchmarks: batches of activations and a sparse coder, made up or from a file; calls over batches."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..codes import SparseCodes
from ..data import Activations, default_cache_dir
from ..ops import encode_topk

Call = Callable[[], object]
Build = Callable[["Inputs", int, str], Call]
DEMO = "SmolLM2-135M layer 11"


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


def demo_activations(cache_dir: Path | None = None) -> Path:
    """The folder of the residual stream behind layer 11 of SmolLM2-135M on English news, as `fusae demo` keeps it."""
    held = []
    for meta in sorted(((cache_dir or default_cache_dir()) / "activations").glob("train-*/activations.json")):
        about = json.loads(meta.read_text(encoding="utf-8"))
        sites = [(site["module"], site["side"]) for site in about.get("sites", [])]
        if about.get("complete") and sites == [("model.layers.11", "out")]:
            held.append((about["rows"], meta.parent))
    if not held:
        raise ValueError("data 'demo' wants the activations of the demo, which are not here yet: run `fusae demo` once")
    return max(held)[1]


def label(data: str | Path | None) -> str:
    """What a `Row` calls its inputs."""
    return "planted" if data is None else DEMO if str(data) == "demo" else Path(data).name


def _stored(path: Path, d: int) -> tuple[int, Callable[[Tensor], Tensor]]:
    """How many rows there are, and what reads some of them, float32."""
    if path.is_dir():
        folder = Activations(path, verify=False)
        shape, kind, read = folder.shape, "float", lambda rows: folder.take(rows).float()
    else:
        import numpy

        array = numpy.load(path, mmap_mode="r")
        shape, kind = array.shape, str(array.dtype)
        read = lambda rows: torch.from_numpy(numpy.array(array[rows.numpy()], dtype=numpy.float32))  # noqa: E731
    if len(shape) != 2 or shape[1] != d or not kind.startswith("float"):
        raise ValueError(f"{path}: must hold a float array [rows, {d}], got {list(shape)} {kind}")
    return shape[0], read


def activations(path: str | Path, n: int, d: int, m: int, *, batches: int = 3, seed: int = 0) -> Inputs:
    """Inputs from real activations: a ``.npy`` file ``[rows, d]`` or a folder that `fusae.data` wrote; "demo" is the
    demo's. Up to `batches` batches of n rows: of a file the first ones in their order, of a folder (whose neighbouring
    rows are neighbouring tokens) drawn at random, as in training.

    The dictionary is untrained: unit-length differences of random pairs of rows, ``W_enc = W_dec``, ``b_enc = 0``;
    b_dec is the mean of the rows that were read.
    """
    path = demo_activations() if str(path) == "demo" else Path(path)
    rows, read = _stored(path, d)
    if rows < n:
        raise ValueError(f"{path}: must have at least n = {n} rows, got {rows}; lower --n")
    batches = min(batches, rows // n)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(rows, generator=generator) if path.is_dir() else torch.arange(rows)
    x = read(chosen[: n * batches])
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
    """`planted` inputs, or those of the file or folder `data`, in `dtype` (a name in torch) on `device`."""
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
