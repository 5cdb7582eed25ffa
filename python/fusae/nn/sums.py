# SPDX-License-Identifier: Apache-2.0
"""Sums that come out the same for any number of threads, in forward and backward passes."""

from __future__ import annotations

import torch
from torch import Tensor

# Fewer than torch splits among threads.
_PART = 2**14


def total(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The sum of all of `x` ``[n, d]``, added up in an order that does not depend on the number of threads.

    Equivalent to: ``x.sum(dtype=dtype)``, which on a CPU adds up one part for each thread. A sum along one dimension
    keeps each of its sums on one thread, and so does a sum of few values.
    """
    rows = x.sum(-1, dtype=dtype)
    return torch.stack([part.sum() for part in rows.split(_PART)]).sum()


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(table, indices):
        return table[indices]

    @staticmethod
    def setup_context(ctx, inputs, output):
        table, indices = inputs
        ctx.save_for_backward(indices)
        ctx.size = table.shape[0]

    @staticmethod
    def backward(ctx, grad):
        (indices,) = ctx.saved_tensors
        sums = grad.new_zeros(ctx.size)
        if grad.device.type == "cpu":  # one after the other; index_put would add up on all threads at once
            return sums.index_add_(0, indices, grad), None
        return sums.index_put_((indices,), grad, accumulate=True), None  # sorts first


def take(table: Tensor, indices: Tensor) -> Tensor:
    """``table[indices]`` of ``[m]`` for int32 `indices` ``[nnz]``, with a gradient that is the same for any number of
    threads and in every run.

    Equivalent to: ``table[indices.long()]``, whose gradient a CPU adds up in the order in which threads come by.
    """
    return _Take.apply(table, indices.long())


@torch.no_grad()
def running_(mean: Tensor, value: Tensor, decay: float, steps: int, every: int = 1) -> Tensor:
    """Take a scalar into a running mean, in place; one that is not finite changes nothing.

    `decay` is that of the mean in the long run, a step; after the first `steps` it is over fewer of them. With `every`
    the value is one of so many steps, and counts for all of them.
    """
    decay = min(decay, steps / (steps + 10)) ** every
    after = torch.lerp(value.to(mean.dtype), mean, decay)
    return mean.copy_(torch.where(torch.isfinite(value), after, mean))
