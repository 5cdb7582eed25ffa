# SPDX-License-Identifier: Apache-2.0
"""One tile of pre-activations in float32, the same for everything that encodes: sample, gate, repair, counts.

Tensor cores (or FMAs) add along d in blocks of BK in one fixed order; no split-K. So an entry has the same bits
wherever and however often it is computed, and ties stay ties.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import INTERPRETED, ordered
from .encode_plan import Tiles, default_tiles
from .tuning import tuned


@triton.jit
def tile_place(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """(row tile, column tile): GROUP row tiles go along the columns together, so that both operands stay in L2."""
    per_group = GROUP * tiles_n
    first = tile // per_group * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    within = tile % per_group
    return first + within % size, within // size


@triton.jit
def tile_products(
    x_ptr, w_ptr, rows, columns, first_row, first_column, d, sxn, sxd, swm, swd,
    TMA: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``x[rows] @ W[columns].T``; with TMA both are descriptors and the tile begins at (first_row, first_column)."""
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    if TMA:
        for k in range(0, d, BK):
            a = x_ptr.load([first_row, k])
            b = w_ptr.load([first_column, k])
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    else:
        inner = tl.arange(0, BK)
        a_ptr = x_ptr + rows.to(tl.int64)[:, None] * sxn + inner.to(tl.int64)[None, :] * sxd
        b_ptr = w_ptr + columns.to(tl.int64)[:, None] * swm + inner.to(tl.int64)[None, :] * swd
        for k in range(0, d, BK):
            if EVEN:
                a = tl.load(a_ptr)
                b = tl.load(b_ptr)
            else:
                inside = (inner < d - k)[None, :]
                a = tl.load(a_ptr, mask=inside, other=0.0)
                b = tl.load(b_ptr, mask=inside, other=0.0)
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
            a_ptr += BK * sxd
            b_ptr += BK * swd
    return acc


@triton.jit
def halves(acc, BM: tl.constexpr, BN: tl.constexpr):
    """The left and the right columns of a tile. Every thread has some of both: nothing moves."""
    return tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def columns_apart(acc, BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr):
    """A tuple of 1, 2, 4 or 8 ranges of columns."""
    if PARTS == 1:
        return (acc,)
    elif PARTS == 2:
        return halves(acc, BM, BN)
    elif PARTS == 4:
        left, right = halves(acc, BM, BN)
        a, b = halves(left, BM, BN // 2)
        c, d = halves(right, BM, BN // 2)
        return a, b, c, d
    else:
        a, b, c, d = columns_apart(acc, BM, BN, 4)
        a0, a1 = halves(a, BM, BN // 4)
        b0, b1 = halves(b, BM, BN // 4)
        c0, c1 = halves(c, BM, BN // 4)
        d0, d1 = halves(d, BM, BN // 4)
        return a0, a1, b0, b1, c0, c1, d0, d1


@triton.jit
def tile_scores(
    acc, columns, b_ptr, norms_ptr, BIAS: tl.constexpr, NORMS: tl.constexpr, MAGNITUDE: tl.constexpr,
):  # fmt: skip
    """Pre-activations and scores of a tile of products; `columns` in range."""
    pre = acc
    if BIAS:
        pre += tl.load(b_ptr + columns).to(tl.float32)[None, :]
    score = pre
    if MAGNITUDE:
        score = tl.abs(score)
    if NORMS:
        score = score * tl.load(norms_ptr + columns)[None, :]
    return pre, score


@triton.jit
def sampled_latent(j, step, turn=0):
    """The j-th sampled latent: one of every `step`, at a hashed place, so that no period of the latents is in tune.

    Another `turn` samples other latents.
    """
    h = ((j + turn * 40503).to(tl.uint32) * 2654435761) & 0xFFFFFFFF
    h = (h ^ (h >> 15)).to(tl.int64)
    return j * step + ((h * step) >> 32).to(tl.int32)


@triton.jit(do_not_specialize=["n"])
def sample_scores(
    x_ptr, w_ptr, b_ptr, norms_ptr, scores_ptr, n, m, d, size, step, sxn, sxd, swm, swd,
    BIAS: tl.constexpr, NORMS: tl.constexpr, MAGNITUDE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, KEYS: tl.constexpr = False,
):  # fmt: skip
    """Scores ``[n, size]`` of the sampled latents.

    KEYS: in order as int32, and of other latents in every tile of rows. Latents that fire for all rows are few: a
    sample of a whole batch should have all of them, for some rows each.
    """
    tile_m, tile_n = tile_place(tl.program_id(0), tl.cdiv(n, BM), tl.cdiv(size, BN), GROUP)
    rows = tile_m * BM + tl.arange(0, BM)
    j = tile_n * BN + tl.arange(0, BN)
    columns = sampled_latent(tl.minimum(j, size - 1), step, tile_m if KEYS else 0)
    acc = tile_products(x_ptr, w_ptr, tl.minimum(rows, n - 1), columns, 0, 0, d, sxn, sxd, swm, swd,
                        False, EVEN, PRECISION, BM, BN, BK)  # fmt: skip
    pre, score = tile_scores(acc, columns, b_ptr, norms_ptr, BIAS, NORMS, MAGNITUDE)
    to = rows.to(tl.int64)[:, None] * size + j[None, :]
    tl.store(scores_ptr + to, ordered(score) if KEYS else score, mask=(rows < n)[:, None] & (j < size)[None, :])


def programs(device: torch.device) -> int:
    """Programs of a persistent launch: one a multiprocessor."""
    return 4 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def capability(device: torch.device) -> tuple[int, int] | None:
    if INTERPRETED:
        return None
    if torch.version.hip is not None:
        return 8, 0  # AMD's numbers mean something else: 64 KB of shared memory, no TMA
    return torch.cuda.get_device_capability(device)


class Operands:
    """x ``[n, d]`` and W_enc ``[m, d]`` with bias and norms, and how to launch a GEMM on them."""

    def __init__(
        self, x: Tensor, W: Tensor, bias: Tensor | None, norms: Tensor | None = None, magnitude: bool = False,
        tiles: Tiles | None = None,
    ) -> None:  # fmt: skip
        self.x, self.W, self.bias, self.norms, self.magnitude = x, W, bias, norms, magnitude
        if x.stride(1) != 1 and W.stride(1) == 1 and not INTERPRETED:
            self.x = x.contiguous()  # as small as a matrix here gets; W is read where it lies
        self.n, self.d = x.shape
        self.m = W.shape[0]
        self.bias = None if bias is None else bias.contiguous()
        self.norms = None if norms is None else norms.contiguous()
        major = capability(x.device)
        self.tiles: Tiles = tiles or self._tiles(default_tiles(x.dtype, self.d, major))
        tf32 = x.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
        self.precision = "tf32" if tf32 else "ieee"
        self.tma = major is not None and major[0] >= 9 and x.dtype != torch.float32 and self._described()

    def rows(self, part: slice) -> Operands:
        """Some of the rows of x."""
        if (part.start, part.stop) == (0, self.n):
            return self
        return Operands(self.x[part], self.W, self.bias, self.norms, self.magnitude, self.tiles)

    @property
    def side(self) -> bool:
        """Whether a score does not tell the pre-activation."""
        return self.norms is not None or self.magnitude

    def _tiles(self, default: Tiles) -> Tiles:
        def measured() -> Tiles:
            from .autotune import search

            return search(self.x.device, self.x.dtype, self.d, default)

        return tuned("encode", self.x.device, self.x.dtype, self.d, default, measured)

    def _described(self) -> bool:
        """Whether TMA can read both: rows in one piece, 16-byte steps."""
        return all(
            t.stride(1) == 1 and t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0
            and t.stride(0) >= t.shape[1]
            for t in (self.x, self.W)
        )  # fmt: skip

    def pointers(self) -> tuple:
        """x and W_enc, or their descriptors."""
        if not self.tma:
            return self.x, self.W
        from triton.tools.tensor_descriptor import TensorDescriptor

        t = self.tiles
        return (
            TensorDescriptor(self.x, list(self.x.shape), list(self.x.stride()), [t.BM, t.BK]),
            TensorDescriptor(self.W, list(self.W.shape), list(self.W.stride()), [t.BN, t.BK]),
        )

    def vectors(self) -> tuple[Tensor, Tensor]:
        return self.x if self.bias is None else self.bias, self.x if self.norms is None else self.norms

    def strides(self) -> tuple[int, ...]:
        return (*self.x.stride(), *self.W.stride())

    def flags(self) -> dict[str, object]:
        t = self.tiles
        return {
            "BIAS": self.bias is not None, "NORMS": self.norms is not None, "MAGNITUDE": self.magnitude,
            "EVEN": self.d % t.BK == 0, "PRECISION": self.precision, "BM": t.BM, "BN": t.BN, "BK": t.BK,
        }  # fmt: skip

    def launch(self) -> dict[str, int]:
        return {"num_warps": self.tiles.warps, "num_stages": self.tiles.stages}

    @property
    def tiles_m(self) -> int:
        return -(-self.n // self.tiles.BM)

    @property
    def tiles_n(self) -> int:
        return -(-self.m // self.tiles.BN)

    def sampled(self, size: int, keys: bool = False) -> Tensor:
        dtype = torch.int32 if keys else torch.float32
        scores = torch.empty(self.n, size, dtype=dtype, device=self.x.device)
        grid = self.tiles_m * -(-size // self.tiles.BN)
        sample_scores[(grid,)](
            self.x, self.W, *self.vectors(), scores, self.n, self.m, self.d, size, self.m // size, *self.strides(),
            **self.flags(), GROUP=self.tiles.group, KEYS=keys, **self.launch(),
        )  # fmt: skip
        return scores
