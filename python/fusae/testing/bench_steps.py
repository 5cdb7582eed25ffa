# SPDX-License-Identifier: Apache-2.0
"""Training steps that the benchmarks compare, and what they are made of; see `workloads`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import reference
from ..ops import decode_loss, encode_batch_topk, encode_threshold, encode_topk
from ..optim import Adam
from .bench_inputs import Call, Inputs, over

LR = 1e-4
SPARSITY = 1e-3
BANDWIDTH = 1e-3  # of JumpReLU, for rows of unit mean squared norm


def leaves_of(inputs: Inputs) -> list[Tensor]:
    """Copies of the parameters that take gradients: W_enc, b_enc, W_dec, b_dec."""
    made = (inputs.W_enc, inputs.b_enc, inputs.W_dec, inputs.b_dec)
    return [t.clone(memory_format=torch.contiguous_format).requires_grad_() for t in made]


def prime(optimizer: torch.optim.Optimizer) -> None:
    """Have the optimiser make its moments now, by a step whose gradient is zero: nothing moves."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def train_step(inputs: Inputs, loss_of: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer) -> Call:
    """Forward, loss, backward, update; returns the loss. For contenders with their own modules as well."""

    def call(x: Tensor) -> Tensor:
        loss = loss_of(x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return over(inputs.xs, call)


def squared_error(y: Tensor, x: Tensor) -> Tensor:
    """Squared error summed over d, averaged over rows, in float32 or wider."""
    return (y - x).to(reference.accumulator(x.dtype)).square().sum(-1).mean()


def bag(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    return F.embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum") + b_dec


def prefixes_of(m: int) -> list[int]:
    """The five nested dictionaries of the Matryoshka benchmark: m/16, m/8, m/4, m/2, m."""
    return [m >> i for i in (4, 3, 2, 1, 0)]


def matryoshka_fusae(inputs: Inputs, k: int, backend: str) -> Call:
    leaves = leaves_of(inputs)
    optimizer = Adam(leaves, lr=LR, backend=backend)
    prime(optimizer)
    W_enc, b_enc, W_dec, b_dec = leaves
    prefixes = prefixes_of(len(W_dec))

    def loss_of(x: Tensor) -> Tensor:
        codes = encode_topk(x - b_dec, W_enc, b_enc, k, backend=backend, sparse_grad=True)
        return decode_loss(codes, W_dec, b_dec, x, prefixes, sparse_grad=True, backend=backend).loss / len(x)

    return train_step(inputs, loss_of, optimizer)


def matryoshka_batch_fusae(inputs: Inputs, k: int, backend: str) -> Call:
    """`matryoshka_fusae` with the n·k largest of the batch, as the form is published (arXiv:2503.17547)."""
    leaves = leaves_of(inputs)
    optimizer = Adam(leaves, lr=LR, backend=backend)
    prime(optimizer)
    W_enc, b_enc, W_dec, b_dec = leaves
    prefixes = prefixes_of(len(W_dec))

    def loss_of(x: Tensor) -> Tensor:
        codes, _ = encode_batch_topk(x - b_dec, W_enc, b_enc, k, backend=backend, sparse_grad=True)
        return decode_loss(codes, W_dec, b_dec, x, prefixes, sparse_grad=True, backend=backend).loss / len(x)

    return train_step(inputs, loss_of, optimizer)


def matryoshka_batch_torch(inputs: Inputs, k: int, backend: str) -> Call:
    leaves = leaves_of(inputs)
    optimizer = torch.optim.Adam(leaves, lr=LR, fused=True)
    prime(optimizer)
    W_enc, b_enc, W_dec, b_dec = leaves

    def loss_of(x: Tensor) -> Tensor:
        pre = F.linear(x, W_enc, b_enc - W_enc @ b_dec).relu()
        values, places = pre.flatten().topk(len(x) * k)
        dense = torch.zeros_like(pre).flatten().scatter(0, places, values).view_as(pre)
        return sum(squared_error(dense[:, :p] @ W_dec[:p] + b_dec, x) for p in prefixes_of(len(W_dec)))

    return train_step(inputs, loss_of, optimizer)


def matryoshka_torch(inputs: Inputs, k: int, backend: str) -> Call:
    leaves = leaves_of(inputs)
    optimizer = torch.optim.Adam(leaves, lr=LR, fused=True)
    prime(optimizer)
    W_enc, b_enc, W_dec, b_dec = leaves

    def loss_of(x: Tensor) -> Tensor:
        pre = F.linear(x, W_enc, b_enc - W_enc @ b_dec)
        values, indices = torch.topk(pre, k)
        dense = torch.zeros_like(pre).scatter(1, indices, values.relu())
        return sum(squared_error(dense[:, :p] @ W_dec[:p] + b_dec, x) for p in prefixes_of(len(W_dec)))

    return train_step(inputs, loss_of, optimizer)


def threshold_of(inputs: Inputs, k: int) -> Tensor:
    """``[m]`` float32, the same for all latents: about k pre-activations of a row are above it, on average."""
    pre = F.linear(inputs.xs[0][:256], inputs.W_enc, inputs.bias).float().flatten()
    size = min(k * min(256, len(inputs.xs[0])), len(pre) - 1)
    two = pre.topk(size + 1).values[-2:]
    return two.mean().expand(len(inputs.W_enc)).contiguous()


def _thresholds(inputs: Inputs, k: int) -> tuple[Tensor, float]:
    """A leaf of thresholds, and the width of their window."""
    x = inputs.xs[0]
    threshold = threshold_of(inputs, k).to(reference.accumulator(x.dtype)).requires_grad_()
    return threshold, BANDWIDTH * float(x.double().square().sum(-1).mean().sqrt())


def jumprelu_fusae(inputs: Inputs, k: int, backend: str) -> Call:
    """JumpReLU with an L0 penalty and trained thresholds (arXiv:2407.14435)."""
    leaves, (threshold, width) = leaves_of(inputs), _thresholds(inputs, k)
    W_enc, b_enc, W_dec, b_dec = leaves
    optimizer = Adam([*leaves, threshold], lr=LR, backend=backend)
    prime(optimizer)

    def loss_of(x: Tensor) -> Tensor:
        codes, l0 = encode_threshold(
            x - b_dec, W_enc, b_enc, threshold, bandwidth=width, sparse_grad=True, backend=backend
        )
        loss = decode_loss(codes, W_dec, b_dec, x, sparse_grad=True, backend=backend).loss
        return loss / len(x) + SPARSITY * l0.mean()

    return train_step(inputs, loss_of, optimizer)


class _Jump(torch.autograd.Function):
    """``pre`` above the threshold, else 0. The jump of height θ has the derivative θ / width in the window."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.width = width
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.width / 2
        return grad * (pre > threshold), (near * grad).sum(0) * (-threshold / ctx.width), None


class _Count(torch.autograd.Function):
    """1 above the threshold, else 0, with the derivative 1 / width in the window."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.width = width
        return (pre > threshold).to(threshold.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.width / 2
        return None, (near * grad).sum(0) / -ctx.width, None


def jumprelu_torch(inputs: Inputs, k: int, backend: str) -> Call:
    """The same with dense ``[n, m]`` activations."""
    leaves, (threshold, width) = leaves_of(inputs), _thresholds(inputs, k)
    W_enc, b_enc, W_dec, b_dec = leaves
    optimizer = torch.optim.Adam([*leaves, threshold], lr=LR, fused=True)
    prime(optimizer)

    def loss_of(x: Tensor) -> Tensor:
        pre = F.linear(x, W_enc, b_enc - W_enc @ b_dec)
        y = _Jump.apply(pre, threshold, width) @ W_dec + b_dec
        return squared_error(y, x) + SPARSITY * _Count.apply(pre, threshold, width).sum(-1).mean()

    return train_step(inputs, loss_of, optimizer)
