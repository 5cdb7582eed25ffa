# SPDX-License-Identifier: Apache-2.0
"""What tools do to the rows of a decoder every step, in fewer passes over memory; and where those rows lie."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

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
def remove_parallel_(grad: Tensor, W: Tensor, eps: float | None = None) -> None:
    """Take from every row of `grad` ``[m, d]`` its part along the row of `W` ``[m, d]``, in place.

    Equivalent to: ``grad -= row_dots(grad, U) * U``, where U is W, or with `eps` ``W / (W.norm(dim=1) + eps)``
    """
    for g, w in parts(grad, W):
        along = row_dots(g, w)
        if eps is not None:
            along /= torch.linalg.vector_norm(w, dim=1, keepdim=True).add_(eps).square_()
        g.addcmul_(along, w, value=-1)


@torch.no_grad()
def normalise_(W: Tensor, eps: float) -> None:
    """Scale the rows of `W` ``[m, d]`` in place. Equivalent to: ``W /= W.norm(dim=1, keepdim=True) + eps``"""
    for (w,) in parts(W):
        w.div_(torch.linalg.vector_norm(w, dim=1, keepdim=True).add_(eps))


def latent_major_(param: torch.nn.Parameter, latents: int, others: Iterable[Tensor]) -> None:
    """Lay the memory of a matrix out so that a latent (an index of dimension `latents`) is contiguous: the same
    `Parameter`, shape and values. One whose memory somebody shares is left as it is."""
    if param.ndim != 2 or (param if latents == 0 else param.T).is_contiguous():
        return
    storage = param.untyped_storage()
    if storage.nbytes() != param.numel() * param.element_size():
        return
    if any(o is not param and o.untyped_storage().data_ptr() == storage.data_ptr() for o in others):
        return
    param.data = param.data.contiguous() if latents == 0 else param.data.T.contiguous().T


def row_major_(param: torch.nn.Parameter) -> None:
    """Undo `latent_major_`."""
    if not param.is_contiguous():
        param.data = param.data.contiguous()
