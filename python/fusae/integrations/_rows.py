# SPDX-License-Identifier: Apache-2.0
"""What tools do to the rows of a decoder every step, in fewer passes over memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

PART = 2**20  # elements: small enough to stay near a core from one pass to the next, large enough for two threads


def parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each tensor, so many at a time that several passes over them read memory once."""
    first = tensors[0]
    if first.device.type != "cpu" or first.numel() <= PART or first.ndim < 2:
        yield tensors
        return
    yield from zip(*(t.split(max(1, PART // first[0].numel())) for t in tensors), strict=True)


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """``(a * b).sum(1, keepdim=True)`` of ``[m, d]`` matrices, without their product."""
    return torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).squeeze(2)


@torch.no_grad()
def remove_parallel_(grad: Tensor, W: Tensor, norms: Tensor | None = None) -> None:
    """Take from every row of `grad` ``[m, d]`` its part along the row of `W` ``[m, d]``, in place.

    Equivalent to: ``grad -= row_dots(grad, W / norms) * (W / norms)`` with `norms` ``[m, 1]`` (None: ones)
    """
    for g, w, norm in parts(grad, W, norms if norms is not None else W):
        along = row_dots(g, w)
        if norms is not None:
            along /= norm.square()
        g.addcmul_(along, w, value=-1)
