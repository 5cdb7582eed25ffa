# SPDX-License-Identifier: Apache-2.0
"""`codes_from_dense`: the non-zero entries of dense activations, as codes."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, _dispatch
from ..codes import SparseCodes
from ._once import once_differentiable


def _fwd_fake(f, capacity, backend=None):
    storage = torch.library.get_ctx().new_dynamic_size() if capacity is None else capacity
    return (
        f.new_empty(storage),
        f.new_empty(storage, dtype=torch.int32),
        f.new_empty(f.shape[0] + 1, dtype=torch.int64),
    )


def _bwd_fake(grad_values, indices, offsets, m, backend=None):
    return grad_values.new_empty(offsets.shape[0] - 1, m)


_fwd = _dispatch.define(
    "codes_from_dense_fwd(Tensor f, SymInt? capacity, *, str? backend=None) -> (Tensor, Tensor, Tensor)", _fwd_fake
)
_bwd = _dispatch.define(
    "codes_from_dense_bwd(Tensor grad_values, Tensor indices, Tensor offsets, SymInt m, *, str? backend=None) "
    "-> Tensor",
    _bwd_fake,
)


class _CodesFromDense(torch.autograd.Function):
    generate_vmap_rule = True  # from those of the raw ops

    @staticmethod
    def forward(f, capacity, backend):
        return _fwd(f, capacity, backend=backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        f, _, ctx.backend = inputs
        _, indices, offsets = output
        ctx.mark_non_differentiable(indices, offsets)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(indices, offsets)
        ctx.m = f.shape[1]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_values, *_):
        if grad_values is None:
            return None, None, None
        return _bwd(grad_values, *ctx.saved_tensors, ctx.m, backend=ctx.backend), None, None


@_dispatch.public("codes_from_dense_fwd", "codes_from_dense_bwd")
def codes_from_dense(f: Tensor, capacity: int | None = None, *, backend: str | None = None) -> SparseCodes:
    """The non-zero entries of dense activations as ragged codes, latents ascending in every row.

    Args:
        f: ``[n, m]`` activations; float32, bfloat16, float16 or float64, any strides. NaN is not zero, -0.0 is.
        capacity: entries of storage to allocate; the number of non-zeros is then never read by the host. ``offsets``
            count all of them: codes that did not fit raise wherever the host reads them. None: as many as there are,
            which takes one host sync on a GPU.
        backend: run on this backend or raise (default: the first that can).

    Returns:
        Ragged `SparseCodes`; unused storage holds 0. Gradients of the values reach those entries of `f`, and 0 the
        others; there is no forward-mode derivative (``torch.func.jvp``) and no second one.

    Equivalent to::

        rows, latents = torch.nonzero(f, as_tuple=True)
        values = f[rows, latents]
    """
    f = _checks.floating("f", f)
    if f.ndim != 2:
        raise ValueError(f"f must have shape [n, m], got {list(f.shape)}")
    if f.shape[1] < 1 or (not torch.compiler.is_compiling() and f.shape[1] >= 2**31):
        raise ValueError(f"f must have between 1 and 2**31 - 1 latents (columns), got shape {list(f.shape)}")
    if capacity is not None:
        capacity = _checks.count("capacity", capacity, 2**62, "2**62", lower=0)
    values, indices, offsets = _CodesFromDense.apply(f, capacity, _dispatch.requested(backend))
    return SparseCodes(values, indices, f.shape[1], offsets)
