# SPDX-License-Identifier: Apache-2.0
"""What adapters share: when to stand aside, and dense activations in and out of sparse ops."""

from __future__ import annotations

import torch
import torch.autograd.forward_ad
from torch import Tensor

from ..codes import SparseCodes
from ..ops import codes_from_dense, decode

# Above this share of active latents dense products are faster than sparse ones, and the tool's own code runs.
DENSE = 1 / 16
SAMPLED = 8  # rows that it is judged by


def transformed() -> bool:
    """Whether a functorch transform or a forward-mode derivative is under way, which the tool's own code serves."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def eager() -> bool:
    """Whether ops run as they are called: no functorch transform, no forward-mode derivative, no ``torch.compile``."""
    return not transformed() and not torch.compiler.is_compiling()


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on there; torch raises for devices that have none."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def hooked(module: torch.nn.Module) -> bool:
    """Whether somebody watches or edits what passes through a hook point, or through every module."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch.nn.modules.module._has_any_global_hook()
    )


def sampled(rows: Tensor) -> Tensor:
    """A few of the rows ``[n, ...]``, from all over."""
    return rows[:: max(1, rows.shape[0] // SAMPLED)]


def mostly_zero(f: Tensor) -> bool:
    """Whether few enough of the activations ``[..., m]`` are non-zero for the sparse decoder, judged by some rows."""
    some = sampled(f.detach().reshape(-1, f.shape[-1]))
    return int(some.count_nonzero()) <= DENSE * some.numel()


class _DenseOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, place: Tensor, shape: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(place)
        f = values.new_zeros(shape)  # no view of another: it may be detached in place
        f.view(-1).index_copy_(0, place, values)
        return f

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return grad.reshape(-1)[place], None, None


def dense_of(codes: SparseCodes, batch: torch.Size) -> Tensor:
    """``codes.to_dense()`` with the leading shape `batch`, in one pass over the result; differentiable."""
    n = batch.numel()
    indices = codes.indices.flatten().long()
    if codes.offsets is None:
        values = codes.values.flatten()
        place = torch.arange(n, device=indices.device)[:, None].mul(codes.m).expand(n, codes.values.shape[-1])
        place = place.reshape(-1) + indices
    else:
        used = codes._used()
        values, rows = codes.values[:used], torch.arange(n, device=indices.device) * codes.m
        place = torch.repeat_interleave(rows, codes.offsets.diff(), output_size=used) + indices[:used]
    return _DenseOf.apply(values, place, (*batch, codes.m))


class _DecodeDense(torch.autograd.Function):
    @staticmethod
    def forward(ctx, f: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
        codes = codes_from_dense(f)
        ctx.save_for_backward(f, W_dec, codes.values, codes.indices, codes.offsets)
        return decode(codes, W_dec, b_dec)

    @staticmethod
    def backward(ctx, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        f, W_dec, *parts = ctx.saved_tensors
        need_f, need_W, need_b = ctx.needs_input_grad
        grad_f = grad_y @ W_dec.T if need_f else None
        grad_W = None
        if need_W and torch.is_grad_enabled():  # somebody takes a second derivative
            grad_W = f.T @ grad_y
        elif need_W:
            values, indices, offsets = parts
            with torch.enable_grad():
                rows = W_dec.detach().requires_grad_()
                y = decode(SparseCodes(values, indices, W_dec.shape[0], offsets), rows)
            (grad_W,) = torch.autograd.grad(y, rows, grad_y)
        return grad_f, grad_W, grad_y.sum(0) if need_b else None


def decode_dense(f: Tensor, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """``f W_dec + b_dec`` for activations that are mostly zero, with all gradients of the dense product.

    Args:
        f: ``[..., m]`` activations, whoever made or edited them; one pass finds the non-zeros.
        W_dec: ``[m, d]``, row = latent (a ``[d, m]`` parameter's transposed view costs nothing where its memory is
            latent-major). Dtype of `f`.
        b_dec: ``[d]`` or None.

    Returns:
        ``[..., d]``. The gradient of `f` is dense: latents that are off get theirs too, as attribution needs. Second
        derivatives are those of the dense product.

    Equivalent to: ``f @ W_dec + b_dec``
    """
    if autocasts(f.device):
        low = torch.get_autocast_dtype(f.device.type)
        f, W_dec, b_dec = f.to(low), W_dec.to(low), None if b_dec is None else b_dec.to(low)
    flat = f.reshape(-1, f.shape[-1])
    return _DecodeDense.apply(flat, W_dec, b_dec).reshape(*f.shape[:-1], W_dec.shape[1])
