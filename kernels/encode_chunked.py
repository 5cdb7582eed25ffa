# SPDX-License-Identifier: Apache-2.0
"""The encoders from pieces of ``[n, m]``: torch's GEMM with float32 results, then one pass over each piece.

For few latents, for a k that no sample suits, for GroupMax, and as the rival of the fused path.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .common import INTERPRETED
from .encode_plan import chunk
from .topk import LARGEST_K, Columns, Running, select_dense

Selection = tuple[int, Tensor | None, Tensor, Tensor, Tensor | None]
"""k, mask as bytes, values and indices ``[n, k]``, latents to fill up with."""


def products(x: Tensor, W: Tensor) -> Tensor:
    """``x W.T`` in float32. TF32 where torch is told to use it."""
    if x.dtype == torch.float32:
        return torch.mm(x, W.T)
    if INTERPRETED:  # torch's GEMM on a CPU has no float32 results for 16 bits
        return torch.mm(x.float(), W.float().T)
    return torch.mm(x, W.T, out_dtype=torch.float32)


def pieces(x: Tensor, W: Tensor, multiple: int = 1, whole: bool = False) -> Iterator[tuple[int, int, Tensor]]:
    """(first row, first latent, float32 products) of every piece, latents innermost; `whole`: rows in one piece."""
    n, m = len(x), len(W)
    rows, columns = chunk(n, m, m if whole else multiple)
    for i in range(0, n, rows):
        for j in range(0, m, columns):
            yield i, j, products(x[i : i + rows], W[j : j + columns])


def select_chunked(x: Tensor, W: Tensor, columns: Columns, relu: bool, *selections: Selection) -> None:
    """Top-k of every row, once for each of `selections`."""
    m = len(W)
    if max(s[0] for s in selections) > LARGEST_K:
        for i, _, pre in pieces(x, W, whole=True):
            for k, mask, values, indices, fill in selections:
                part = slice(i, i + len(pre))
                select_dense(pre, k, _masked(columns, mask), values[part], indices[part], relu, fill)
        return
    running: list[Running] = []
    for i, j, pre in pieces(x, W):
        if j == 0:
            running = [Running(len(pre), s[0], columns.side, x.device) for s in selections]
        for state, (_, mask, *_) in zip(running, selections, strict=True):
            state.take(pre, _masked(columns, mask).part(j, j + pre.shape[1]), j)
        if j + pre.shape[1] == m:
            for state, (_, _, values, indices, fill) in zip(running, selections, strict=True):
                state.finish(values[i : i + len(pre)], indices[i : i + len(pre)], relu, fill)


def _masked(columns: Columns, mask: Tensor | None) -> Columns:
    return Columns(columns.bias, columns.norms, mask, columns.magnitude)


def group_max(x: Tensor, W: Tensor, columns: Columns, k: int, relu: bool, values: Tensor, indices: Tensor) -> None:
    """The best of every group of m / k latents, in the order of the groups."""
    size = len(W) // k
    for i, j, pre in pieces(x, W, size):
        groups, first = pre.shape[1] // size, j // size
        part = columns.part(j, j + pre.shape[1])
        if part.bias is not None:
            pre = pre + part.bias
        score = pre if part.norms is None else pre * part.norms
        at = values.new_empty(len(pre) * groups, 1, dtype=torch.int32)
        select_dense(score.view(-1, size), 1, Columns(), at.new_empty(at.shape, dtype=torch.float32), at)
        at = at.view(len(pre), groups) + size * torch.arange(groups, dtype=torch.int32, device=x.device)
        best = pre.gather(1, at.long())
        if relu:
            best = best.masked_fill(best <= 0, 0.0)
        values[i : i + len(pre), first : first + groups] = best.to(values.dtype)
        indices[i : i + len(pre), first : first + groups] = at + j
