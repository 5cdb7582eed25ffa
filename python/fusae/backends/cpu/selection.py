# SPDX-License-Identifier: Apache-2.0
"""Selections: of given pre-activations, and of those that a GEMM makes tile by tile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .native import _C, DTYPES, offset, ptr

# Columns of one GEMM tile and rows of one block: constants, so that a product never depends on the thread count. A tile
# (8 MB) stays in the outer cache between the GEMM that writes it and the selection that reads it.
_TILE, _ROWS = 1024, 2048
_STATE_BYTES = 64 << 20


class Selection:
    """Buffers of a running selection of k per row, for blocks of at most `rows` rows."""

    def __init__(self, k: int, rows: int) -> None:
        self.k, self.cap = k, _capacity(k)
        self.pre = torch.empty(rows, self.cap, dtype=torch.float32)
        self.idx = torch.empty(rows, self.cap, dtype=torch.int32)
        self.count = torch.empty(rows, dtype=torch.int32)
        self.threshold = torch.empty(rows, dtype=torch.float32)

    def reset(self) -> None:
        self.count.zero_()
        self.threshold.fill_(float("nan"))

    def state(self) -> tuple[int, ...]:
        return (*map(ptr, (self.pre, self.idx, self.count, self.threshold)), self.cap, self.k)


_NO_SELECTION = (0, 0, 0, 0, 0, 0)


def _capacity(k: int) -> int:
    """Candidates a row can hold: k, one block of columns that all pass, a vector, and room to cut seldom."""
    return k + 256 + 16 + max(k, 128)


def _row_block(n: int, *widths: int) -> int:
    """Rows selected together, so that their candidates take a bounded amount of memory."""
    limit = max(1, _STATE_BYTES // (8 * sum(map(_capacity, widths or (0,)))))
    blocks = max(1, -(-n // limit))
    return max(1, -(-n // blocks))  # of equal size: a last block of a few rows would pack all of W for them


_gemm = "auto"


@contextlib.contextmanager
def force_gemm(name: str) -> Iterator[None]:
    """Take the products of the encoders from 'native' (fused with the selection) or 'torch' in a ``with`` block.

    For tests and measurements: other threads of the process change with it.
    """
    global _gemm
    if name not in ("auto", "native", "torch"):
        raise ValueError(f"GEMM must be 'auto', 'native' or 'torch', got {name!r}")
    before, _gemm = _gemm, name
    try:
        yield
    finally:
        _gemm = before


def _use_native_gemm(n: int) -> bool:
    """Whether the fused GEMM is the faster one: MKL, torch's library, is tuned for Intel's processors and leaves
    about half of an AMD core's multiply-adds unused; few rows do not pay for packing W."""
    if _gemm != "auto":
        return _gemm == "native"
    return n >= 128 and _C.isa() != "generic" and not _C.is_intel()


def topk_fwd(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    n, m = pre.shape
    if pre.stride(1) != 1:
        pre = pre.contiguous()
    values = pre.new_empty(n, k)
    indices = torch.empty(n, k, dtype=torch.int32)
    rows = _row_block(n, k)
    selection, dtype, threads = Selection(k, rows), DTYPES[pre.dtype], torch.get_num_threads()
    for i in range(0, n, rows):
        block = pre[i : i + rows]
        selection.reset()
        tile = (ptr(block), dtype, pre.stride(0), len(block), m, 0, 0, 0, 0, False, _NO_SELECTION, threads)
        _C.tile_topk(tile, selection.state())
        _C.select_finish(
            selection.state(), len(block), m, 0, 0, False, False, offset(values, i * k), dtype,
            offset(indices, i * k), threads,
        )  # fmt: skip
    return values, indices


def topk_bwd(grad_values: Tensor, indices: Tensor, m: int) -> Tensor:
    # As the reference does it, and no kernel: writing the zeros of [n, m] takes the time, the scatter next to none.
    grad = grad_values.new_zeros(grad_values.shape[0], m)
    return grad.scatter_(1, indices.long(), grad_values)


class Encoder:
    """Streams the scores of x to one of the kernels, block of rows by block of rows, and keeps the auxiliary top-k.

    A kernel comes in two: of products in registers (`_C.encode_<name>`), and of a tile that torch's GEMM has made
    (`_C.tile_<name>`).
    """

    def __init__(
        self,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor | None,
        norms: Tensor | None,
        aux_mask: Tensor | None = None,
        k_aux: int = 0,
        activation: str = "relu",
        magnitude: bool = False,
    ) -> None:
        self.x, self.W, self.magnitude, self.relu = x, W_enc, magnitude, activation == "relu"
        self.n, self.m, self.k_aux = len(x), len(W_enc), k_aux
        self.bias = None if b_enc is None else b_enc.float().contiguous()
        self.norms = None if norms is None else norms.contiguous()
        self.mask = None if aux_mask is None else aux_mask.contiguous()
        self.threads = torch.get_num_threads()
        self.aux_values = x.new_empty(self.n, k_aux)
        self.aux_indices = torch.empty(self.n, k_aux, dtype=torch.int32)
        self.native = _use_native_gemm(self.n)

    def blocks(self, *widths: int) -> Iterator[tuple[int, int]]:
        """(first row, rows) of every block, for buffers of a selection of each of `widths`."""
        rows = _row_block(self.n if self.native else min(self.n, _ROWS), *widths, *([self.k_aux] * bool(self.k_aux)))
        self.rows = rows
        self.aux = Selection(self.k_aux, rows) if self.k_aux else None
        self.tile = torch.empty(0 if self.native else rows * min(self.m, _TILE), dtype=torch.float32)
        for first in range(0, self.n, rows):
            yield first, min(rows, self.n - first)

    def run(self, name: str, first: int, rows: int, *state: object, between: Callable[[], None] | None = None) -> None:
        """One block through the kernel `name`; `between` is called after every tile of columns in memory."""
        x, W, threads = self.x[first : first + rows], self.W, self.threads
        if self.aux:
            self.aux.reset()
        aux = self.aux.state() if self.aux else _NO_SELECTION
        if self.native:
            products = (
                ptr(x), *x.stride(), ptr(W), *W.stride(), DTYPES[x.dtype], rows, x.shape[1], self.m, ptr(self.bias),
                ptr(self.norms), ptr(self.mask), self.magnitude, aux, threads,
            )  # fmt: skip
            getattr(_C, f"encode_{name}")(products, *state)
        else:
            x = x.float()
            for j in range(0, self.m, _TILE):
                weight = W[j : j + _TILE].float()
                size = (rows, len(weight))
                products = torch.mm(x, weight.T, out=self.tile[: size[0] * size[1]].view(size))
                tile = (
                    ptr(products), 0, size[1], *size, j, offset(self.bias, j), ptr(self.norms), offset(self.mask, j),
                    self.magnitude, aux, threads,
                )  # fmt: skip
                getattr(_C, f"tile_{name}")(tile, *state)
                if between:
                    between()
        if self.aux:
            self.finish(self.aux, first, rows, self.aux_values, self.aux_indices, self.mask)

    def finish(
        self, selection: Selection, first: int, rows: int, values: Tensor, indices: Tensor, mask: Tensor | None = None
    ) -> None:
        """Candidates of a block become codes: sorted, activated, rounded."""
        at = first * selection.k
        _C.select_finish(
            selection.state(), rows, self.m, ptr(self.norms), ptr(mask), self.magnitude, self.relu, offset(values, at),
            DTYPES[values.dtype], offset(indices, at), self.threads,
        )  # fmt: skip


def encode_topk_fwd(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    norms: Tensor | None,
    aux_mask: Tensor | None,
    k: int,
    k_aux: int,
    activation: str,
    select: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    encoder = Encoder(x, W_enc, b_enc, norms, aux_mask, k_aux, activation, select == "abs")
    if select == "group_max":
        return *_group_max(encoder, k), encoder.aux_values, encoder.aux_indices
    values, indices = x.new_empty(len(x), k), torch.empty(len(x), k, dtype=torch.int32)
    selection = None
    for first, rows in encoder.blocks(k):
        selection = selection or Selection(k, encoder.rows)
        selection.reset()
        encoder.run("topk", first, rows, selection.state())
        encoder.finish(selection, first, rows, values, indices)
    return values, indices, encoder.aux_values, encoder.aux_indices


def _group_max(encoder: Encoder, k: int) -> tuple[Tensor, Tensor]:
    pre = torch.empty(encoder.n, k, dtype=torch.float32)
    indices = torch.full((encoder.n, k), -1, dtype=torch.int32)
    for first, rows in encoder.blocks():
        encoder.run("group_max", first, rows, offset(pre, first * k), offset(indices, first * k), k, encoder.m // k)
    if encoder.relu:
        pre.masked_fill_(pre <= 0, 0.0)
    return pre.to(encoder.x.dtype), indices
