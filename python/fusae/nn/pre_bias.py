# SPDX-License-Identifier: Apache-2.0
"""The gradient of the bias that is subtracted from the input."""

from __future__ import annotations

import torch


class PreBias(torch.autograd.Function):
    """`b_enc` as it is; its gradient also reaches `b_dec`, which was subtracted from the input.

    The pre-activation is ``W_enc (x - b_dec) + b_enc``, so ``∂/∂b_dec = -(∂/∂b_enc) W_enc``: one product with the
    summed gradient in place of the gradient of every row of x.
    """

    @staticmethod
    def forward(b_enc, b_dec, W_enc):
        return b_enc.view_as(b_enc)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx, grad):
        (W_enc,) = ctx.saved_tensors
        return grad, -(grad.to(W_enc.dtype) @ W_enc) if ctx.needs_input_grad[1] else None, None
