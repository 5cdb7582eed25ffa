# SPDX-License-Identifier: Apache-2.0
"""`encode_topk`: the k largest pre-activations of every row, without the ``[n, m]`` matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, _dispatch
from ..codes import SparseCodes
from ._once import once_differentiable

ACTIVATIONS = ("relu", "none")
SELECTS = ("topk", "abs", "group_max")


def _fwd_fake(x, W_enc, b_enc, norms, aux_mask, k, k_aux, activation, select, backend=None):
    n = x.shape[0]
    return (
        x.new_empty(n, k),
        x.new_empty(n, k, dtype=torch.int32),
        x.new_empty(n, k_aux),
        x.new_empty(n, k_aux, dtype=torch.int32),
    )


_fwd = _dispatch.define(
    "encode_topk_fwd(Tensor x, Tensor W_enc, Tensor? b_enc, Tensor? norms, Tensor? aux_mask, SymInt k, SymInt k_aux, "
    "str activation, str select, *, str? backend=None) -> (Tensor, Tensor, Tensor, Tensor)",
    _fwd_fake,
    ("x",),
)


def _gate(grad: Tensor | None, values: Tensor, indices: Tensor, mask: Tensor | None, activation: str) -> Tensor:
    """Gradient of the selected pre-activations: none through padding (a ReLU at or below 0, an unmasked latent)."""
    if grad is None:
        return torch.zeros_like(values)
    if activation == "relu":
        return torch.where(values == 0, 0.0, grad)
    return grad if mask is None else torch.where(mask[indices.long()], grad, 0.0)


class _EncodeTopK(torch.autograd.Function):
    generate_vmap_rule = True  # from those of the raw ops

    @staticmethod
    def forward(x, W_enc, b_enc, norms, aux_mask, k, k_aux, activation, select, row_sparse, backend):
        return _fwd(x, W_enc, b_enc, norms, aux_mask, k, k_aux, activation, select, backend=backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, W_enc, b_enc, _, aux_mask, _, ctx.k_aux, ctx.activation, _, ctx.row_sparse, ctx.backend = inputs
        ctx.mark_non_differentiable(output[1], output[3])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, W_enc, aux_mask, *output)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_values, _, grad_aux, __):
        if grad_values is None and grad_aux is None:
            return (None,) * 11
        x, W_enc, mask, values, indices, aux_values, aux_indices = ctx.saved_tensors
        grad = _gate(grad_values, values, indices, None, ctx.activation)
        if ctx.k_aux and grad_aux is not None:
            grad_aux = _gate(grad_aux, aux_values, aux_indices, mask, ctx.activation)
            grad, indices = torch.cat([grad, grad_aux], 1), torch.cat([indices, aux_indices], 1)
        need_x, need_W, need_b = ctx.needs_input_grad[:3]
        grad_x, rows, grad_W, grad_b = torch.ops.fusae.encode_bwd.default(
            grad, indices, None, x, W_enc, need_x, need_W, need_b, ctx.row_sparse, backend=ctx.backend
        )
        if need_W and ctx.row_sparse:
            grad_W = torch.sparse_coo_tensor(
                rows[None], grad_W, W_enc.shape, is_coalesced=True, check_invariants=False
            )
        none = (None,) * 8
        return grad_x if need_x else None, grad_W if need_W else None, grad_b if need_b else None, *none


@_dispatch.public("encode_topk_fwd", "encode_bwd")
def encode_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    activation: str = "relu",
    select: str = "topk",
    *,
    norms: Tensor | None = None,
    aux_mask: Tensor | None = None,
    k_aux: int = 0,
    sparse_grad: bool = False,
    backend: str | None = None,
) -> SparseCodes | tuple[SparseCodes, SparseCodes]:
    """The `k` latents of every row with the largest pre-activation ``x W_encᵀ + b_enc``, exactly; no ``[n, m]``.

    Args:
        x: ``[..., d]`` activations; float32, bfloat16, float16 or float64, any strides.
        W_enc: ``[m, d]`` encoder, row = latent, dtype of `x`.
        b_enc: ``[m]`` encoder bias, dtype of `x`, or None.
        k: latents kept per row, ``1 <= k <= m``.
        activation: 'relu' (a selected latent at or below 0 gets value +0 and no gradient) or 'none'.
        select: 'topk' by pre-activation; 'abs' by its magnitude (AbsTopK, arXiv:2510.00404; activation 'none'); or
            'group_max', the largest pre-activation of each of `k` groups of m / k neighbouring latents (GroupMax, as in
            EleutherAI's sparsify), in the order of the groups.
        norms: ``[m]`` float32; selection by ``pre · norms`` (pass the decoder row norms). Values stay pre-activations.
        aux_mask: ``[m]`` bool (dead latents): a second, independent top-`k_aux` among the latents where it is true,
            from the same pass (AuxK, Gao et al. 2024, arXiv:2406.04093). Filled up with value 0 where there are fewer.
        k_aux: width of the second selection; 0 without `aux_mask`.
        sparse_grad: give ``W_enc.grad`` as a coalesced ``torch.sparse_coo`` tensor of the touched rows.
        backend: run on this backend or raise (default: the first that can).

    Returns:
        `SparseCodes` ``[..., k]``, or a pair (main, auxiliary) when `aux_mask` is given. Sorted (but for 'group_max'):
        larger score first, equal scores by the lower latent, NaN largest of all; decided on float32 sums before
        activation and rounding. Gradients reach `x`, `W_enc` and `b_enc` through the selected latents only; there is no
        forward-mode derivative (``torch.func.jvp``) and no second one. Under ``torch.vmap`` a batched `x` is one call;
        batched weights and the gradients of a batch take one call per element.

    Equivalent to::

        values, indices = torch.topk(torch.nn.functional.linear(x, W_enc, b_enc), k)
        values = values.relu()
    """
    x, W_enc, b_enc = _checks.encoder(x, W_enc, b_enc)
    m, d = W_enc.shape
    k = _checks.count("k", k, m, "m")
    _checks.choice("activation", activation, ACTIVATIONS)
    _checks.choice("select", select, SELECTS)
    if select == "abs" and activation != "none":
        raise ValueError(
            f"activation must be 'none' with select 'abs' (a ReLU would empty the negative ones), got {activation!r}"
        )
    if select == "group_max" and m % k:
        raise ValueError(f"k must divide m = {m} with select 'group_max' (k groups of latents of one size), got {k}")
    norms = _checks.norms(norms, m, x)
    k_aux = _checks.auxiliary(aux_mask, k_aux, m, x)
    values, indices, aux_values, aux_indices = _EncodeTopK.apply(
        x.reshape(-1, d), W_enc, b_enc, norms, aux_mask, k, k_aux, activation, select, sparse_grad,
        _dispatch.requested(backend),
    )  # fmt: skip
    batch = x.shape[:-1]
    codes = SparseCodes(values.reshape(*batch, k), indices.reshape(*batch, k), m)
    if aux_mask is None:
        return codes
    return codes, SparseCodes(aux_values.reshape(*batch, k_aux), aux_indices.reshape(*batch, k_aux), m)
