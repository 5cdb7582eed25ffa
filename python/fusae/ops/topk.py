# SPDX-License-Identifier: Apache-2.0
"""`topk`: row-wise top-k of a materialised matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, _dispatch
from ..codes import SparseCodes
from ._once import once_differentiable


def _fwd_fake(pre, k, backend=None):
    return pre.new_empty(pre.shape[0], k), pre.new_empty(pre.shape[0], k, dtype=torch.int32)


def _bwd_fake(grad_values, indices, m, backend=None):
    return grad_values.new_empty(grad_values.shape[0], m)


_fwd = _dispatch.define("topk_fwd(Tensor pre, SymInt k, *, str? backend=None) -> (Tensor, Tensor)", _fwd_fake, ("pre",))
_bwd = _dispatch.define(
    "topk_bwd(Tensor grad_values, Tensor indices, SymInt m, *, str? backend=None) -> Tensor",
    _bwd_fake,
    ("grad_values", "indices"),
)


class _TopK(torch.autograd.Function):
    generate_vmap_rule = True  # from those of the raw ops

    @staticmethod
    def forward(pre, k, backend):
        return _fwd(pre, k, backend=backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pre, _, ctx.backend = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1])
        ctx.m = pre.shape[1]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_values, _):
        if grad_values is None:
            return None, None, None
        (indices,) = ctx.saved_tensors
        return _bwd(grad_values, indices, ctx.m, backend=ctx.backend), None, None


@_dispatch.public("topk_fwd", "topk_bwd")
def topk(pre: Tensor, k: int, *, backend: str | None = None) -> SparseCodes:
    """The `k` largest entries of every row, as fixed-width codes.

    Args:
        pre: ``[..., m]`` pre-activations or activations; float32, bfloat16, float16 or float64, any strides.
        k: entries kept per row, ``1 <= k <= m``.
        backend: run on this backend or raise (default: the first that can).

    Returns:
        `SparseCodes` with values and indices ``[..., k]``, sorted: larger value first, equal values by the lower index,
        NaN largest of all. Gradients scatter back to the selected entries; there is no forward-mode derivative
        (``torch.func.jvp``) and no second one.

    Equivalent to::

        values, indices = torch.sort(pre, dim=-1, descending=True, stable=True)
        values, indices = values[..., :k], indices[..., :k]
    """
    pre = _checks.floating("pre", pre)
    if pre.ndim < 1:
        raise ValueError("pre must have shape [..., m], got a scalar")
    m = pre.shape[-1]
    k = _checks.count("k", k, m, "m")
    values, indices = _TopK.apply(pre.reshape(-1, m), k, _dispatch.requested(backend))
    shape = (*pre.shape[:-1], k)
    return SparseCodes(values.reshape(shape), indices.reshape(shape), m)
