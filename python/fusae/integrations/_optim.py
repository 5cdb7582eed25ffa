# SPDX-License-Identifier: Apache-2.0
"""What tools do to parameters at the end of a step, in fewer passes over memory; the same optimiser, its own state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


def clip_grad_norm_(parameters: list[Tensor], max_norm: float) -> None:
    """``torch.nn.utils.clip_grad_norm_`` that does not multiply by 1."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if not all(g.device.type == "cpu" for g in grads):  # elsewhere the host does not wait for the norm
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        return
    factor = max_norm / (float(torch.nn.utils.get_total_norm(grads)) + 1e-6)
    if not factor >= 1:  # NaN too
        torch._foreach_mul_(grads, factor)


def _fusible(optimizer: torch.optim.Optimizer) -> bool:
    """Plain Adam on the CPU whose maker left the choice of implementation to torch."""
    return type(optimizer) is torch.optim.Adam and all(
        group["fused"] is None
        and not (group["foreach"] or group["capturable"] or group["differentiable"])
        and all(p.device.type == "cpu" and p.is_floating_point() for p in group["params"])
        for group in optimizer.param_groups
    )


@torch.no_grad()
def align(optimizer: torch.optim.Optimizer) -> None:
    """Gradients and moments in the memory order of their parameter.

    torch's fused Adam goes through all of them in the order of memory and does not look whether that is the same.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == p.shape and value.stride() != p.stride():
                    state[key] = torch.empty_like(p, dtype=value.dtype).copy_(value)
            if p.grad is not None and not p.grad.is_sparse and p.grad.stride() != p.stride():
                p.grad = torch.empty_like(p).copy_(p.grad)


@contextlib.contextmanager
def fused_adam(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """In the block, ``torch.optim.Adam`` on the CPU takes its step in one pass (torch's own `fused`), if it can.

    State, hyperparameters, schedulers and checkpoints stay as they are.
    """
    if not _fusible(optimizer):
        yield
        return
    align(optimizer)
    before = [group["fused"] for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group["fused"] = True
        yield
    finally:
        for group, fused in zip(optimizer.param_groups, before, strict=True):
            group["fused"] = fused
