# SPDX-License-Identifier: Apache-2.0
"""Gradients that cannot be differentiated again say so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Once(torch.autograd.Function):
    """The first `count` tensors as they are; whoever asks for a derivative through them, by any of the others, is told.

    `torch.autograd.function.once_differentiable` does not do: it looks at the incoming gradients alone, which may be
    constants beside arguments on which the result depends, and it cuts the graph, so that ``torch.autograd.grad`` of a
    sum with other terms would leave these out without a word.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.detach() for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError("fusae's ops are once_differentiable: there is no second derivative of them")


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For the ``backward(ctx, *grads)`` of a Function: a derivative of its results raises, also one by what the
    Function saved."""

    @functools.wraps(backward)
    def wrapped(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.compiler.is_compiling():  # whose graphs refuse by themselves
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return results
        sources = [t for t in (*grads, *ctx.saved_tensors) if t is not None and t.requires_grad]
        many = results if isinstance(results, tuple) else (results,)
        given = [result for result in many if result is not None]
        if not sources or not given:
            return results
        marked = iter(_Once.apply(len(given), *given, *sources))
        many = tuple(None if result is None else next(marked) for result in many)
        return many if isinstance(results, tuple) else many[0]

    return wrapped
