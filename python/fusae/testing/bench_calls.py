# SPDX-License-Identifier: Apache-2.0
"""How a benchmark calls a function that computes an op: `fusae`'s own, or anybody's with the same arguments.

``CALLS[op](function)`` is a builder as in `workloads`. The function takes the arguments of the public op of that name,
without `backend`; the two backward passes take the forward function and differentiate it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..codes import SparseCodes
from .bench_inputs import Build, Call, Inputs, codes_of, over
from .bench_steps import prefixes_of, threshold_of

Function = Callable[..., Any]
_PRE_BYTES = 2**29  # of pre-activations that are held for cold caches


def parts(result: Any) -> Any:
    """Codes as a tuple of tensors, on their own or as the first of a tuple; anything else as it is."""
    first, *rest = result if type(result) is tuple else (result,)
    if not isinstance(first, SparseCodes):
        return result
    found = (first.values, first.indices, *([] if first.offsets is None else [first.offsets]))
    return (*found, *rest)


def pre_activations(inputs: Inputs) -> list[Tensor]:
    """``[n, m]`` of every batch, of as many batches as are held in half a gigabyte (at least one)."""
    one = len(inputs.xs[0]) * len(inputs.W_enc) * inputs.W_enc.element_size()
    kept, bias = inputs.xs[: max(1, _PRE_BYTES // one)], inputs.bias
    return [torch.nn.functional.linear(x, inputs.W_enc, bias) for x in kept]


def _topk(function: Function) -> Build:
    def build(inputs: Inputs, k: int, backend: str) -> Call:
        return over(pre_activations(inputs), lambda pre: parts(function(pre, k)))

    return build


def _encode(function: Function, argument: Callable[[Inputs, int], Any]) -> Build:
    def build(inputs: Inputs, k: int, backend: str) -> Call:
        bias, given = inputs.bias, argument(inputs, k)
        return over(inputs.xs, lambda x: parts(function(x, inputs.W_enc, bias, given)))

    return build


def _decode(function: Function) -> Build:
    def build(inputs: Inputs, k: int, backend: str) -> Call:
        return over(codes_of(inputs, k), lambda codes: function(codes, inputs.W_dec, inputs.b_dec))

    return build


def _decode_loss(function: Function, nested: bool = False) -> Build:
    """Squared error of the reconstruction from given codes, and the gradients of values, W_dec and b_dec."""

    def build(inputs: Inputs, k: int, backend: str) -> Call:
        W_dec, b_dec = inputs.W_dec.clone().requires_grad_(), inputs.b_dec.clone().requires_grad_()
        prefixes = (prefixes_of(len(W_dec)),) if nested else ()

        def call(pair: tuple[SparseCodes, Tensor]) -> tuple[Tensor, ...]:
            codes = pair[0].detach()
            codes.values.requires_grad_()
            loss = function(codes, W_dec, b_dec, pair[1], *prefixes)
            loss = loss if isinstance(loss, Tensor) else loss[0]
            return loss.detach(), *torch.autograd.grad(loss, (codes.values, W_dec, b_dec))

        return over(list(zip(codes_of(inputs, k), inputs.xs, strict=True)), call)

    return build


def _from_dense(function: Function) -> Build:
    def build(inputs: Inputs, k: int, backend: str) -> Call:
        return over([codes.to_dense() for codes in codes_of(inputs, k)], lambda f: parts(function(f)))

    return build


def _encode_bwd(function: Function) -> Build:
    """Gradients of x, W_enc, b_enc through a graph that is kept (one batch: the graph may hold ``[n, m]``)."""

    def build(inputs: Inputs, k: int, backend: str) -> Call:
        leaves = [t.clone().requires_grad_() for t in (inputs.xs[0], inputs.W_enc, inputs.bias)]
        values = parts(function(*leaves, k))[0]
        grad = inputs.xs[0].flatten()[: values.numel()]
        grad = grad.repeat(-(-values.numel() // len(grad)))[: values.numel()].view(values.shape)
        return lambda: torch.autograd.grad(values, leaves, grad, retain_graph=True)

    return build


def _decode_bwd(function: Function) -> Build:
    """Gradients of values, W_dec, b_dec through a graph that is kept."""

    def build(inputs: Inputs, k: int, backend: str) -> Call:
        codes = codes_of(inputs, k)[0].detach()
        leaves = [codes.values.requires_grad_(), inputs.W_dec.clone().requires_grad_()]
        leaves.append(inputs.b_dec.clone().requires_grad_())
        y = function(codes, *leaves[1:])
        grad = (2 / len(y)) * (y.detach() - inputs.xs[0])
        return lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)

    return build


#: op -> what makes a builder of a function with the arguments of that op
CALLS: dict[str, Callable[[Function], Build]] = {
    "topk": _topk,
    "encode_topk": lambda function: _encode(function, lambda _, k: k),
    "encode_threshold": lambda function: _encode(function, threshold_of),
    "encode_batch_topk": lambda function: _encode(function, lambda _, k: k),
    "encode_topk_bwd": _encode_bwd,
    "decode": _decode,
    "decode_bwd": _decode_bwd,
    "decode_loss": _decode_loss,
    "decode_loss_prefixes": lambda function: _decode_loss(function, nested=True),
    "codes_from_dense": _from_dense,
}
#: Arguments of the function that is given, as an error message shows them.
SIGNATURES = {
    "topk": "(pre [n, m], k) -> (values, indices)",
    "encode_topk": "(x [n, d], W_enc [m, d], b_enc [m], k) -> (values, indices), both [n, k]",
    "encode_threshold": "(x [n, d], W_enc [m, d], b_enc [m], threshold [m]) -> (values, indices, offsets [n + 1])",
    "encode_batch_topk": "(x [n, d], W_enc [m, d], b_enc [m], k) -> (values, indices, offsets [n + 1], smallest)",
    "encode_topk_bwd": "as encode_topk, differentiable",
    "decode": "(codes, W_dec [m, d], b_dec [d]) -> y [n, d]; codes.values and codes.indices are [n, k]",
    "decode_bwd": "as decode, differentiable",
    "decode_loss": "(codes, W_dec, b_dec, target [n, d]) -> squared error, a scalar, differentiable",
    "decode_loss_prefixes": "(codes, W_dec, b_dec, target, prefixes) -> sum of squared errors, differentiable",
    "codes_from_dense": "(f [n, m]) -> (values, indices, offsets [n + 1])",
}
