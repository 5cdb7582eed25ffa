# SPDX-License-Identifier: Apache-2.0
"""`encode_batch_topk`: the n·k largest pre-activations of a whole batch, without the ``[n, m]`` matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, _dispatch
from ..codes import SparseCodes
from ._once import once_differentiable

ACTIVATIONS = ("relu", "none")


def _fwd_fake(x, W_enc, b_enc, norms, aux_mask, k, k_aux, activation, backend=None):
    n = x.shape[0]
    return (
        x.new_empty(n * k),
        x.new_empty(n * k, dtype=torch.int32),
        x.new_empty(n + 1, dtype=torch.int64),
        x.new_empty((), dtype=_checks.accumulator(x.dtype)),
        x.new_empty(n, k_aux),
        x.new_empty(n, k_aux, dtype=torch.int32),
    )


_fwd = _dispatch.define(
    "encode_batch_topk_fwd(Tensor x, Tensor W_enc, Tensor? b_enc, Tensor? norms, Tensor? aux_mask, SymInt k, "
    "SymInt k_aux, str activation, *, str? backend=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd_fake,
)


def _with_auxiliary(
    grad: Tensor | None, indices: Tensor, offsets: Tensor, grad_aux: Tensor, aux_indices: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ragged and of fixed-width entries as those of one ragged form: auxiliary ones behind each row."""
    (n, width), size = aux_indices.shape, indices.shape[0]
    position = torch.arange(size, device=indices.device)
    row = torch.searchsorted(offsets[1:].contiguous(), position, right=True)  # n: behind the entries in use
    place = torch.where(row < n, position + row * width, size + n * width)
    aux_place = offsets[1:, None] + width * torch.arange(n, device=indices.device)[:, None]
    aux_place = aux_place + torch.arange(width, device=indices.device)

    def joined(main: Tensor | None, aux: Tensor) -> Tensor:
        out = aux.new_zeros(size + n * width + 1)  # the last one takes what is not in use
        if main is not None:
            out = out.index_copy(0, place, main)
        return out.index_copy(0, aux_place.flatten(), aux.flatten())

    step = width * torch.arange(n + 1, device=offsets.device)
    return joined(grad, grad_aux), joined(indices, aux_indices), offsets + step


class _EncodeBatchTopK(torch.autograd.Function):
    generate_vmap_rule = True  # from those of the raw ops

    @staticmethod
    def forward(x, W_enc, b_enc, norms, aux_mask, k, k_aux, activation, row_sparse, backend):
        return _fwd(x, W_enc, b_enc, norms, aux_mask, k, k_aux, activation, backend=backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, W_enc, _, _, aux_mask, _, ctx.k_aux, ctx.activation, ctx.row_sparse, ctx.backend = inputs
        values, indices, offsets, smallest, aux_values, aux_indices = output
        ctx.mark_non_differentiable(indices, offsets, smallest, aux_indices)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, W_enc, aux_mask, values, indices, offsets, aux_values, aux_indices)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _, __, ___, grad_aux, ____):
        if grad is None and grad_aux is None:
            return (None,) * 10
        x, W_enc, mask, values, indices, offsets, aux_values, aux_indices = ctx.saved_tensors
        if grad is not None and ctx.activation == "relu":  # positive, but rounded to 0 in 16 bits: padding
            grad = torch.where(values != 0, grad, 0.0)
        if ctx.k_aux and grad_aux is not None:
            # None through padding: a ReLU at or below 0, an unmasked latent.
            live = aux_values != 0 if ctx.activation == "relu" else mask[aux_indices.long()]
            grad_aux = torch.where(live, grad_aux, 0.0)
            grad, indices, offsets = _with_auxiliary(grad, indices, offsets, grad_aux, aux_indices)
        elif grad is None:
            return (None,) * 10
        need_x, need_W, need_b = ctx.needs_input_grad[:3]
        grad_x, rows, grad_W, grad_b = torch.ops.fusae.encode_bwd.default(
            grad, indices, offsets, x, W_enc, need_x, need_W, need_b, ctx.row_sparse, backend=ctx.backend
        )
        if need_W and ctx.row_sparse:
            grad_W = torch.sparse_coo_tensor(
                rows[None], grad_W, W_enc.shape, is_coalesced=True, check_invariants=False
            )
        none = (None,) * 7
        return grad_x if need_x else None, grad_W if need_W else None, grad_b if need_b else None, *none


@_dispatch.public("encode_batch_topk_fwd", "encode_bwd")
def encode_batch_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    activation: str = "relu",
    *,
    norms: Tensor | None = None,
    aux_mask: Tensor | None = None,
    k_aux: int = 0,
    sparse_grad: bool = False,
    backend: str | None = None,
) -> tuple[SparseCodes, Tensor] | tuple[SparseCodes, Tensor, SparseCodes]:
    """The ``n·k`` largest pre-activations ``x W_encᵀ + b_enc`` of all n rows together, exactly; no ``[n, m]``.

    BatchTopK (Bussmann et al. 2024, arXiv:2412.06410): k latents per row on average, as many as the row deserves.

    Args:
        x: ``[..., d]`` activations; float32, bfloat16, float16 or float64, any strides. Leading dimensions are joined
            into n rows.
        W_enc: ``[m, d]`` encoder, row = latent, dtype of `x`.
        b_enc: ``[m]`` encoder bias, dtype of `x`, or None.
        k: latents kept per row on average, ``1 <= k <= m``.
        activation: 'relu' (what is selected at or below 0 is left out) or 'none'.
        norms: ``[m]`` float32; selection by ``pre · norms`` (pass the decoder row norms, or for a crosscoder their sum
            over layers). Values stay pre-activations.
        aux_mask: ``[m]`` bool (dead latents): a second, independent top-`k_aux` of every row among the latents where it
            is true, from the same pass, as in `encode_topk`.
        k_aux: width of the second selection; 0 without `aux_mask`.
        sparse_grad: give ``W_enc.grad`` as a coalesced ``torch.sparse_coo`` tensor of the touched rows.
        backend: run on this backend or raise (default: the first that can).

    Returns:
        (codes, smallest), or (codes, smallest, auxiliary) when `aux_mask` is given.

        codes: ragged `SparseCodes` of n rows, latents ascending in every row, in a storage of ``n·k`` entries (no size
        is read by the host) with 0 behind those in use. Larger score first, NaN largest of all, equal scores by the
        lower row, then by the lower latent; decided on float32 sums before activation and rounding.

        smallest: float32 scalar, the smallest positive score that was selected (+Inf where there is none). Its running
        mean is the threshold for inference, with `encode_threshold`.

        auxiliary: fixed-width codes ``[..., k_aux]``, as `encode_topk` gives them.

        Gradients reach `x`, `W_enc` and `b_enc` through the selected entries only; there is no forward-mode derivative
        and no second one. Under ``torch.vmap`` every element is a batch of its own, and a call.

    Equivalent to::

        pre = torch.nn.functional.linear(x, W_enc, b_enc)
        values, places = torch.topk(pre.relu().flatten(), n * k)
        codes = fusae.codes_from_dense(torch.zeros(n * m).scatter(0, places, values).view(n, m))
        smallest = values[values > 0].min()
    """
    x, W_enc, b_enc = _checks.encoder(x, W_enc, b_enc)
    m, d = W_enc.shape
    k = _checks.count("k", k, m, "m")
    _checks.choice("activation", activation, ACTIVATIONS)
    norms = _checks.norms(norms, m, x)
    k_aux = _checks.auxiliary(aux_mask, k_aux, m, x)
    values, indices, offsets, smallest, aux_values, aux_indices = _EncodeBatchTopK.apply(
        x.reshape(-1, d), W_enc, b_enc, norms, aux_mask, k, k_aux, activation, sparse_grad,
        _dispatch.requested(backend),
    )  # fmt: skip
    codes = SparseCodes(values, indices, m, offsets)
    if aux_mask is None:
        return codes, smallest
    batch = x.shape[:-1]
    return codes, smallest, SparseCodes(aux_values.reshape(*batch, k_aux), aux_indices.reshape(*batch, k_aux), m)
