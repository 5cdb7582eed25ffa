# SPDX-License-Identifier: Apache-2.0
"""Encoders: one pass over the products with a sample and certificates. No ``[n, m]``, no host sync."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from . import encode_plan as plan
from .native import DTYPES, emulated, module, ptr, stream, table


@functools.cache
def _device(index: int) -> tuple[int, bool]:
    """Multiprocessors, and whether it is a Hopper."""
    found = torch.cuda.get_device_properties(index)
    return found.multi_processor_count, (found.major, found.minor) == (9, 0)


def _described(t: Tensor) -> Tensor:
    """`t` itself if its rows lie in one piece and begin at multiples of 16 bytes, as copies of 16 bytes and TMA want
    it; else a copy with such rows."""
    item = t.element_size()
    pitch = t.stride(0) * item if t.shape[0] > 1 else 16 * (-(-t.shape[1] * item // 16))
    together = t.stride(1) == 1 or t.shape[1] == 1
    if together and t.data_ptr() % 16 == 0 and pitch % 16 == 0 and pitch >= t.shape[1] * item:
        return t
    step = 16 // item
    copy = t.new_zeros(t.shape[0], -(-t.shape[1] // step) * step)
    copy[:, : t.shape[1]] = t
    return copy[:, : t.shape[1]]


class Operands:
    """x ``[n, d]`` and W_enc ``[m, d]`` with bias and norms, as the kernels take them."""

    def __init__(
        self, x: Tensor, W: Tensor, bias: Tensor | None, norms: Tensor | None = None, magnitude: bool = False
    ) -> None:
        self.x, self.W, self.magnitude = _described(x), _described(W), magnitude
        self.bias = None if bias is None else bias.float().contiguous()
        self.norms = None if norms is None else norms.contiguous()
        self.n, self.d, self.m = *x.shape, len(W)
        # Emulated: few blocks, each with several tiles. `hopper` is for tests to ask for.
        self.processors, self.hopper = (2, HOPPER_EMULATED) if emulated() else _device(x.device.index)

    def fields(self, first: int = 0, last: int | None = None) -> dict[str, Any]:
        """Of the rows from `first` to `last`."""
        n = (self.n if last is None else last) - first
        stride = self.x.stride(0) if self.n > 1 else -(-self.d // 16) * 16
        return {
            "x": ptr(self.x) + first * stride * self.x.element_size(), "x_stride": stride, "weight": ptr(self.W),
            "w_stride": self.W.stride(0) if self.m > 1 else -(-self.d // 16) * 16, "dtype": DTYPES[self.x.dtype],
            "tf32": self.x.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest",
            "n": n, "d": self.d, "m": self.m, "bias": ptr(self.bias), "norms": ptr(self.norms),
            "magnitude": self.magnitude, "processors": self.processors, "hopper": self.hopper,
        }  # fmt: skip

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.device)


HOPPER_EMULATED = False


class Selection:
    """One selection of k a row among the latents of a mask: its buffers for `rows` rows at a time, and its codes."""

    def __init__(self, o: Operands, k: int, rows: int, mask: Tensor | None = None) -> None:
        self.o, self.k, self.sample = o, k, plan.sample(o.m, k)
        self.values = o.empty(o.n, k, dtype=o.x.dtype)
        self.indices = o.empty(o.n, k, dtype=torch.int32)
        self.mask = self.limit = self.fill = None
        if mask is not None:
            self.mask = mask.contiguous().view(torch.uint8)
            self.limit = self.mask.sum(dtype=torch.int32).view(1)  # known to the device alone
            self.fill = torch.sort(self.mask, stable=True).indices[:k].to(torch.int32)
        self.repair = plan.repair(rows, o.m, k, o.processors)
        self.rows = rows

    def allocate(self, sampled: bool) -> None:
        o, r, n = self.o, self.repair, self.rows
        self.cap = self.sample.cap if sampled else 0
        self.entries = o.empty(n, self.cap, dtype=torch.int64)
        self.bound = o.empty(n if sampled else 0, dtype=torch.float32)
        self.numbers = o.empty(4, n, dtype=torch.int32)  # last, tally, list; failed
        self.buffers = o.empty(r.units, plan.ROWS, r.cap, dtype=torch.int64)
        self.counts = o.empty(r.units, plan.ROWS, dtype=torch.int32)

    def fields(self, first: int) -> dict[str, Any]:
        r, last, tally, listed, failed = self.repair, *map(ptr, self.numbers)
        return {
            "k": self.k, "mask": ptr(self.mask), "limit": ptr(self.limit), "fill": ptr(self.fill),
            "rank": self.sample.rank if self.cap else 0, "cap": self.cap, "bound": ptr(self.bound), "last": last,
            "tally": tally, "entries": ptr(self.entries), "failed": failed, "list": listed, "repair": ptr(self.buffers),
            "repair_count": ptr(self.counts), "units": r.units, "repair_cap": r.cap, "splits": r.splits,
            "values": ptr(self.values) + first * self.k * self.values.element_size(),
            "indices": ptr(self.indices) + 4 * first * self.k,
        }  # fmt: skip


def select(o: Operands, relu: bool, k: int, k_aux: int = 0, aux_mask: Tensor | None = None) -> tuple[Tensor, ...]:
    """values, indices, auxiliary values and indices; `k` 0 leaves the first selection out."""
    wanted = [(width, mask) for width, mask in ((k, None), (k_aux, aux_mask)) if width]
    rows = min((plan.rows_at_a_time(o.n, o.m, width, o.processors) for width, _ in wanted), default=0)
    rows = min(rows, o.n)
    selections = [Selection(o, width, rows, mask) for width, mask in wanted]
    sampled = rows > 0 and all(s.sample is not None for s in selections)
    size = selections[0].sample.size if sampled else 0
    scores = o.empty(rows, size, dtype=torch.float32)
    for s in selections:
        s.allocate(sampled)
    for first in range(0, o.n, max(rows, 1)):
        last = min(first + rows, o.n)
        parts = [s.fields(first) for s in selections]
        args = {
            "in": o.fields(first, last), "relu": relu, "sampled": size, "scores": ptr(scores),
            "main": parts[0] if k else {}, "aux": parts[-1] if k_aux else {},
        }  # fmt: skip
        module().encode_topk(args, stream(o.x))
    found = {bool(s.mask is not None): (s.values, s.indices) for s in selections}
    none = o.x.new_empty(o.n, 0), o.empty(o.n, 0, dtype=torch.int32)
    return *found.get(False, none), *found.get(True, none)


def group_max(o: Operands, relu: bool, k: int) -> tuple[Tensor, Tensor]:
    values, indices = o.empty(o.n, k, dtype=o.x.dtype), o.empty(o.n, k, dtype=torch.int32)
    best = o.empty(o.n, k, dtype=torch.int64)
    pre = o.empty(o.n if o.norms is not None else 0, k, dtype=torch.float32)
    args = {
        "in": o.fields(), "k": k, "relu": relu, "best": ptr(best), "pre": ptr(pre), "values": ptr(values),
        "indices": ptr(indices),
    }  # fmt: skip
    if o.n:
        module().encode_group_max(args, stream(o.x))
    return values, indices


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
    o, relu = Operands(x, W_enc, b_enc, norms, select == "abs"), activation == "relu"
    k_aux = k_aux if aux_mask is not None else 0
    if select == "group_max":
        return *group_max(o, relu, k), *_select(o, relu, 0, k_aux, aux_mask)[2:]
    return _select(o, relu, k, k_aux, aux_mask)


_select = select  # the op's argument has the same name

TABLE = table(encode_topk_fwd)
