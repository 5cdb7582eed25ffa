# SPDX-License-Identifier: Apache-2.0
"""Selections: of given pre-activations, and of those that a GEMM makes tile by tile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from .native import _C, DTYPES, offset, ptr

# Columns of one GEMM tile and rows of one block: constants, so that a product never depends on the thread count. A tile
# (8 MB) stays in the outer cache between the GEMM that writes it and the selection that reads it.
_TILE, _ROWS = 1024, 2048
_STATE_BYTES = 64 << 20


class _Selection:
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
    limit = max(1, _STATE_BYTES // (8 * sum(map(_capacity, widths))))
    blocks = max(1, -(-n // limit))
    return max(1, -(-n // blocks))  # of equal size: a last block of a few rows would pack all of W for them


_gemm = "auto"


@contextlib.contextmanager
def force_gemm(name: str) -> Iterator[None]:
    """Take the products of `encode_topk` from 'native' (fused with the selection) or 'torch' in a ``with`` block.

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
    selection, dtype, threads = _Selection(k, rows), DTYPES[pre.dtype], torch.get_num_threads()
    for i in range(0, n, rows):
        block = pre[i : i + rows]
        selection.reset()
        _C.select_tile(
            ptr(block), dtype, pre.stride(0), len(block), m, 0, 0, 0, 0, False, selection.state(), _NO_SELECTION,
            threads,
        )  # fmt: skip
        _C.select_finish(
            selection.state(), len(block), m, 0, 0, False, False, offset(values, i * k), dtype,
            offset(indices, i * k), threads,
        )  # fmt: skip
    return values, indices


def topk_bwd(grad_values: Tensor, indices: Tensor, m: int) -> Tensor:
    # As the reference does it, and no kernel: writing the zeros of [n, m] takes the time, the scatter next to none.
    grad = grad_values.new_zeros(grad_values.shape[0], m)
    return grad.scatter_(1, indices.long(), grad_values)


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
    n, d = x.shape
    m = W_enc.shape[0]
    bias = None if b_enc is None else b_enc.float().contiguous()
    norms = None if norms is None else norms.contiguous()
    mask = None if aux_mask is None else aux_mask.contiguous()
    magnitude, relu, threads = select == "abs", activation == "relu", torch.get_num_threads()
    widths = (k, k_aux) if k_aux else (k,)
    out = [(x.new_empty(n, w), torch.empty(n, w, dtype=torch.int32)) for w in (k, k_aux)]
    native = _use_native_gemm(n)
    rows = _row_block(n if native else min(n, _ROWS), *widths)
    selections = [_Selection(w, rows) for w in widths]
    states = [selection.state() for selection in selections]
    aux_state = states[1] if k_aux else _NO_SELECTION
    tile = torch.empty(0 if native else rows * min(m, _TILE), dtype=torch.float32)
    for i in range(0, n, rows):
        block = x[i : i + rows]
        for selection in selections:
            selection.reset()
        if native:
            _C.encode_select(
                ptr(block), *x.stride(), ptr(W_enc), *W_enc.stride(), DTYPES[x.dtype], len(block), d, m, ptr(bias),
                ptr(norms), ptr(mask), magnitude, states[0], aux_state, threads,
            )  # fmt: skip
        else:
            block = block.float()
            for j in range(0, m, _TILE):
                weight = W_enc[j : j + _TILE].float()
                size = (len(block), len(weight))
                products = torch.mm(block, weight.T, out=tile[: size[0] * size[1]].view(size))
                _C.select_tile(
                    ptr(products), 0, size[1], *size, j, offset(bias, j), ptr(norms), offset(mask, j),
                    magnitude, states[0], aux_state, threads,
                )  # fmt: skip
        for state, filler, width, (values, indices) in zip(states, (None, mask), widths, out, strict=False):
            _C.select_finish(
                state, len(block), m, ptr(norms), ptr(filler), magnitude, relu, offset(values, i * width),
                DTYPES[x.dtype], offset(indices, i * width), threads,
            )  # fmt: skip
    return *out[0], *out[1]
