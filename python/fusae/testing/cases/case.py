# SPDX-License-Identifier: Apache-2.0
"""`Case`: a shape, a generator of inputs, the public call, a cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fusae

from ... import _dispatch
from ..patterns import LAYOUTS

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
        return _dispatch.raw_ops(self.op)

    def __str__(self) -> str:
        sizes = "-".join(f"{letter}{size}" for letter, size in self.shape.items())
        return f"{self.op}-{sizes}-{self.name}"


def place(t: Tensor, dtype: torch.dtype, device: torch.device, layout: str = "contiguous") -> Tensor:
    return LAYOUTS[layout](t.to(dtype).to(device))
