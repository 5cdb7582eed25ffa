# SPDX-License-Identifier: Apache-2.0
"""Row-wise selection of materialised pre-activations: one read of the input, whatever k and however many ties."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .common import INTERPRETED, cdiv, next_power_of_2
from .select import emit_rows, make_keys, scan_rows

LARGEST_K = 4096
"""The largest k for which a row's buffer is cut back in registers."""
_RANKED = 512  # up to here the sorted output takes k² comparisons a row; beyond it torch's sort
_KEY_BYTES = 256 << 20


@dataclasses.dataclass
class Columns:
    """What makes scores of pre-activations, for the columns of a block: bias, norms, mask ``[m]``, or None."""

    bias: Tensor | None = None
    norms: Tensor | None = None
    mask: Tensor | None = None
    magnitude: bool = False

    @property
    def side(self) -> bool:
        """Whether a score does not tell the pre-activation."""
        return self.norms is not None or self.magnitude

    def part(self, start: int, stop: int) -> Columns:
        bias, norms, mask = (None if t is None else t[start:stop] for t in (self.bias, self.norms, self.mask))
        return Columns(bias, norms, mask, self.magnitude)

    def arguments(self, stand_in: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mask = None if self.mask is None else self.mask.view(torch.uint8)
        return tuple(stand_in if t is None else t for t in (self.bias, self.norms, mask))

    def flags(self) -> dict[str, bool]:
        return {"BIAS": self.bias is not None, "NORMS": self.norms is not None, "MASK": self.mask is not None,
                "MAGNITUDE": self.magnitude}  # fmt: skip


class Running:
    """The k best entries of every row so far, of scores that come in blocks of columns."""

    def __init__(self, n: int, k: int, side: bool, device: torch.device) -> None:
        self.n, self.k, self.side, self.fresh = n, k, side, True
        self.cap = max(16, next_power_of_2(2 * k))
        self.keys = torch.empty(n, self.cap, dtype=torch.int64, device=device)
        self.pre = torch.empty((n, self.cap) if side else 1, dtype=torch.float32, device=device)
        self.count = torch.empty(n, dtype=torch.int32, device=device)
        self.bound = torch.empty(n, dtype=torch.int64, device=device)

    def take(self, pre: Tensor, columns: Columns, first: int = 0) -> None:
        """The next columns: `pre` ``[n, c]`` in any dtype; column j is latent ``first + j``."""
        if self.n == 0:
            return
        m = pre.shape[1]
        block = scan_block(m)
        rows = program_rows(self.n, max(block, self.cap))
        scan_rows[(cdiv(self.n, rows),)](
            pre, *pre.stride(), self.n, m, *columns.arguments(self.bound), first, self.keys, self.pre, self.count,
            self.bound, self.k, FRESH=self.fresh, **columns.flags(), SIDE=self.side, ROWS=rows, BLOCK=block,
            CAP=self.cap, num_warps=scan_warps(rows * max(block, self.cap)),
        )  # fmt: skip
        self.fresh = False

    def finish(self, values: Tensor, indices: Tensor, relu: bool = False, fill: Tensor | None = None) -> None:
        """Sorted codes ``[n, k]``; `fill`: latents for the places behind the last entry of a row."""
        emit(self.keys, self.pre if self.side else None, self.count if fill is not None else None, values, indices,
             relu, fill)  # fmt: skip


def scan_block(m: int) -> int:
    return min(4096 if INTERPRETED else 2048, max(16, next_power_of_2(m)))


def program_rows(n: int, width: int) -> int:
    """Rows of a program: 1024 keys or so. The interpreter takes its time for a program, not for its keys."""
    return min(next_power_of_2(n), max(1, (1024 if not INTERPRETED else 2**18) // width))


def scan_warps(keys: int) -> int:
    """8 keys a thread: they are 64 bits wide, and a few blocks of them live at a time."""
    return min(16, max(1, keys // 256))


def emit(
    keys: Tensor, pre: Tensor | None, count: Tensor | None, values: Tensor, indices: Tensor, relu: bool = False,
    fill: Tensor | None = None,
) -> None:  # fmt: skip
    """The k best of every row of `keys` ``[n, c]`` (`count` of them in use, or all k), as sorted codes."""
    n, k = values.shape
    if n == 0 or k == 0:
        return
    in_order = k > _RANKED
    if in_order:
        if count is not None:
            unused = torch.arange(k, device=keys.device) >= count[:, None]
            keys = keys[:, :k].masked_fill(unused, -(2**63))
        keys, order = torch.sort(keys[:, :k], dim=1, descending=True)
        pre = None if pre is None else pre.gather(1, order)
    block = 1024 if in_order else max(16, next_power_of_2(k))
    rows = program_rows(n, block)
    emit_rows[(cdiv(n, rows), cdiv(k, block))](
        keys, keys if pre is None else pre, keys.stride(0), keys if count is None else count,
        keys if fill is None else fill, values, indices, n, k, COUNT=count is not None, SIDE=pre is not None,
        FILL=fill is not None, RELU=relu, SORTED=in_order, ROWS=rows, BLOCK=block,
        CHUNK=16 if INTERPRETED else max(1, 4096 // (rows * block)), num_warps=4,
    )  # fmt: skip


def select_dense(
    pre: Tensor, k: int, columns: Columns, values: Tensor, indices: Tensor, relu: bool = False,
    fill: Tensor | None = None, side: bool | None = None,
) -> None:  # fmt: skip
    """Top-k of every row of `pre` ``[n, m]`` as sorted codes ``[n, k]``. `side`: keep values apart from their keys."""
    n, m = pre.shape
    side = columns.side if side is None else side
    if k <= LARGEST_K:
        running = Running(n, k, side, pre.device)
        running.take(pre, columns)
        running.finish(values, indices, relu, fill)
        return
    rows = max(1, _KEY_BYTES // (8 * m))
    block = scan_block(m)
    for i in range(0, n, rows):
        part = pre[i : i + rows]
        keys = torch.empty(part.shape, dtype=torch.int64, device=pre.device)
        kept = torch.empty(part.shape if side else 1, dtype=torch.float32, device=pre.device)
        per = program_rows(len(part), block)
        make_keys[(cdiv(len(part), per), cdiv(m, block))](
            part, *part.stride(), len(part), m, *columns.arguments(keys), keys, kept, **columns.flags(), SIDE=side,
            ROWS=per, BLOCK=block,
        )  # fmt: skip
        best, at = torch.topk(keys, k, dim=1, sorted=False)
        count = None if fill is None else (best != -(2**63)).sum(1, dtype=torch.int32)
        if count is not None:  # in use first
            best, order = torch.sort(best, dim=1, descending=True)
            at = at.gather(1, order)
        emit(best, kept.gather(1, at) if side else None, count, values[i : i + rows], indices[i : i + rows], relu, fill)


