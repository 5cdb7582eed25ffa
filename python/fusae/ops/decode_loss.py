# SPDX-License-Identifier: Apache-2.0
"""`decode_loss`: squared errors of a reconstruction, or of nested ones, in the pass that decodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks, _dispatch
from ..codes import SparseCodes
from ._once import once_differentiable

NESTED = ("latents", "rank")


class DecodeLoss(NamedTuple):
    """What `decode_loss` returns, on the device of the codes.

    Attributes:
        loss: scalar ``Σ_g weights[g] · sse[g]`` in float32 (float64 for float64); the output that has a gradient.
        sse: ``[G]`` squared error of every prefix, summed over rows and dimensions; no gradient.
        residual: ``[..., d]`` target minus the full reconstruction, in the dtype of `W_dec`; no gradient.
    """

    loss: Tensor
    sse: Tensor
    residual: Tensor


def _fwd_fake(
    values, indices, offsets, W_dec, b_dec, target, prefixes, weights, by_rank, need_mixed, need_dots, backend=None
):
    n, d = target.shape
    groups, acc = len(prefixes), _checks.accumulator(W_dec.dtype)
    return (
        W_dec.new_empty(groups, dtype=acc),
        W_dec.new_empty(n, d),
        W_dec.new_empty((groups, n, d) if need_mixed and groups > 1 else 0),
        values.new_empty(values.shape if need_dots else 0, dtype=acc),
    )


def _bwd_fake(
    factor, values, indices, offsets, W_dec, mixed, prefixes, by_rank, need_values, need_W, row_sparse, backend=None
):
    m, d = W_dec.shape
    u = torch.library.get_ctx().new_dynamic_size() if need_W and row_sparse else 0
    return (
        values.new_empty(values.shape if need_values else 0),
        indices.new_empty(u, dtype=torch.int64),
        W_dec.new_empty((u, d) if row_sparse else (m, d)) if need_W else values.new_empty(0),
    )


_fwd = _dispatch.define(
    "decode_loss_fwd(Tensor values, Tensor indices, Tensor? offsets, Tensor W_dec, Tensor? b_dec, Tensor target, "
    "SymInt[] prefixes, float[] weights, bool by_rank, bool need_mixed, bool need_dots, *, str? backend=None) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _fwd_fake,
)
_bwd = _dispatch.define(
    "decode_loss_bwd(Tensor factor, Tensor values, Tensor indices, Tensor? offsets, Tensor W_dec, Tensor mixed, "
    "SymInt[] prefixes, bool by_rank, bool need_values, bool need_W, bool row_sparse, *, str? backend=None) "
    "-> (Tensor, Tensor, Tensor)",
    _bwd_fake,
)


class _DecodeLoss(torch.autograd.Function):
    """The raw ops take weights divided by a bound of their sum, so that 16-bit rows hold means of errors: neither sums,
    which could be out of range, nor as small as a loss per element.

    Gradients meet entry and latent through ``mixed[g] = Σ_{h ≥ g} weights[h] · residual_h``: -2 · scale · grad · mixed
    is the gradient of the reconstruction as the entries of group g see it.
    """

    generate_vmap_rule = True  # from those of the raw ops

    @staticmethod
    def forward(values, indices, offsets, W_dec, b_dec, target, prefixes, weights, by_rank, scale, need_mixed,
                need_dots, row_sparse, backend):  # fmt: skip
        sse, residual, mixed, dots = _fwd(
            values, indices, offsets, W_dec, b_dec, target, prefixes, weights, by_rank, need_mixed, need_dots,
            backend=backend,
        )  # fmt: skip
        loss = scale * torch.stack([w * s for w, s in zip(weights, sse.unbind(), strict=True)]).sum()
        return loss, sse, residual, mixed, dots

    @staticmethod
    def setup_context(ctx, inputs, output):
        values, indices, offsets, W_dec, b_dec, target, ctx.prefixes, _, ctx.by_rank, ctx.scale = inputs[:10]
        ctx.row_sparse, ctx.backend = inputs[12:]
        _, sse, residual, mixed, dots = output
        ctx.mark_non_differentiable(sse, residual, mixed, dots)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(values, indices, offsets, W_dec, residual, mixed, dots, b_dec, target)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 14
        # What the gradients depend on is all saved, for `once_differentiable` to see: b_dec and target too.
        values, indices, offsets, W_dec, residual, mixed, dots, b_dec, target = ctx.saved_tensors
        need_values, _, _, need_W, need_b, need_target = ctx.needs_input_grad[:6]
        grad_values = grad_W = grad_b = grad_target = None
        factor = -2.0 * ctx.scale * grad
        mixed = mixed if len(ctx.prefixes) > 1 else residual[None]
        known = need_values and dots.shape == values.shape
        if known:
            grad_values = (factor * dots).to(values.dtype)
        if need_W or (need_values and not known):
            dotted, rows, grad_W = _bwd(
                factor, values, indices, offsets, W_dec, mixed, ctx.prefixes, ctx.by_rank, need_values and not known,
                need_W, ctx.row_sparse, backend=ctx.backend,
            )  # fmt: skip
            grad_values = grad_values if known or not need_values else dotted
            if not need_W:
                grad_W = None
            elif ctx.row_sparse:
                grad_W = torch.sparse_coo_tensor(
                    rows[None], grad_W, W_dec.shape, is_coalesced=True, check_invariants=False
                )
        if need_b:
            grad_b = (factor * mixed[0].sum(0, dtype=factor.dtype)).to(b_dec.dtype)
        if need_target:
            grad_target = (-factor * mixed[0].to(factor.dtype)).to(target.dtype)
        return grad_values, None, None, grad_W, grad_b, grad_target, *(None,) * 8


def _nesting(codes: SparseCodes, prefixes: Sequence[int] | None, nested: str) -> list[int]:
    """The prefixes, checked: ascending, the last one the whole of the codes."""
    _checks.choice("nested", nested, NESTED)
    if nested == "rank" and codes.offsets is not None:
        raise ValueError(
            "nested='rank' needs codes of fixed width, in order of rank as encode_topk gives them; got ragged codes"
        )
    whole, name = (codes.m, "m") if nested == "latents" else (codes.values.shape[-1], "k")
    if prefixes is None:
        return [whole]
    if not isinstance(prefixes, (tuple, list)) or not prefixes:
        raise TypeError(f"prefixes must be a list of ints that ascend to {name} = {whole}, got {prefixes!r}")
    for p in prefixes:
        _checks.count("prefixes", p, whole, name)
    if prefixes[-1] != whole or any(b <= a for a, b in zip(prefixes, prefixes[1:], strict=False)):
        raise ValueError(f"prefixes must ascend and end with {name} = {whole}, got {list(prefixes)}")
    return list(prefixes)


def _weights(weights: Sequence[float] | None, groups: int) -> list[float]:
    if weights is None:
        return [1.0] * groups
    if not isinstance(weights, (tuple, list)) or len(weights) != groups:
        raise ValueError(f"weights must be {groups} numbers, one for each prefix, got {weights!r}")
    for w in weights:
        if not torch.compiler.is_compiling():
            _checks.number("weights", w)
    return [float(w) for w in weights]


@_dispatch.public("decode_loss_fwd", "decode_loss_bwd")
def decode_loss(
    codes: SparseCodes,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    prefixes: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    *,
    nested: str = "latents",
    sparse_grad: bool = False,
    backend: str | None = None,
) -> DecodeLoss:
    """Squared errors ``||target - x̂||²`` of the reconstruction ``x̂ = Σ_j v_j W_dec[i_j] + b_dec``, without writing x̂.

    With `prefixes`, also of the reconstructions from the first entries only, in the same gather: nested dictionaries
    (Matryoshka SAEs, arXiv:2503.17547) with ``nested='latents'``, nested codes (HierarchicalTopK, arXiv:2505.24473)
    with ``nested='rank'``. The backward pass costs no further gather for them.

    Args:
        codes: fixed-width ``[..., k]`` or ragged codes over m latents, values in the dtype of `W_dec`. An entry of
            value 0 contributes nothing. Indices must lie in ``[0, m)``.
        W_dec: ``[m, d]`` decoder, row = latent; float32, bfloat16, float16 or float64, any strides.
        b_dec: ``[d]`` decoder bias, dtype of `W_dec`, or None.
        target: ``[..., d]`` (ragged codes: ``[n, d]``), in the dtype of `W_dec` or in float32.
        prefixes: G ascending ints; prefix g is the entries with latent (``nested='latents'``) or place in the row
            (``nested='rank'``) below ``prefixes[g]``. The last one is all: m, or k. None: that one alone.
        weights: of the prefixes in the loss, numbers >= 0 (default: all 1).
        nested: 'latents' or 'rank'. 'rank' needs codes of fixed width, in order of rank as `encode_topk` gives them.
        sparse_grad: give ``W_dec.grad`` as a coalesced ``torch.sparse_coo`` tensor of the touched rows.
        backend: run on this backend or raise (default: the first that can).

    Returns:
        A named tuple (loss, sse ``[G]``, residual ``[..., d]``); see `DecodeLoss`. The reconstruction is ``target -
        residual``. Gradients of the loss reach the values (every stored entry), `W_dec`, `b_dec` and `target`; there is
        no forward-mode derivative (``torch.func.jvp``) and no second one. Under ``torch.vmap``, one call per element.

    Errors are taken and summed in float32 (float64 for float64), in an order that does not depend on the number of
    threads; in 16-bit dtypes the residual is rounded once, when it is returned. The backward pass keeps one row per
    prefix, ``[G, n, d]`` in the dtype of `W_dec` (nothing beyond the residual for G = 1), and for values that require
    a gradient a float32 number per entry; under ``torch.no_grad()`` nothing.

    Equivalent to::

        dense, order = codes.to_dense(), torch.arange(m)
        sse = torch.stack([(target - (dense * (order < p)) @ W_dec - b_dec).square().sum() for p in prefixes])
        loss = (weights * sse).sum()
    """
    codes = _checks.codes("codes", codes)
    W_dec = _checks.dense("W_dec", W_dec)
    if W_dec.ndim != 2 or W_dec.shape[0] != codes.m:
        hint = " (transposed?)" if W_dec.ndim == 2 and W_dec.shape[1] == codes.m else ""
        raise ValueError(
            f"W_dec must have shape [{codes.m}, d], row = latent, to match codes, got {list(W_dec.shape)}{hint}"
        )
    values, W_dec, b_dec = _checks.autocast(codes.values, W_dec, b_dec)
    _checks.floating("W_dec", W_dec)
    _checks.like("codes", values, "W_dec", W_dec)
    d = W_dec.shape[1]
    if b_dec is not None:
        _checks.vector("b_dec", b_dec, d, "one per output dimension")
        _checks.like("b_dec", b_dec, "W_dec", W_dec)
    _checks.floating("target", target)
    shape = (*codes.batch_shape, d)
    if target.shape != shape:
        raise ValueError(f"target must have shape {list(shape)} to match codes and W_dec, got {list(target.shape)}")
    _checks.like("target", target, "W_dec", W_dec, dtype=False)
    if target.dtype not in (W_dec.dtype, _checks.accumulator(W_dec.dtype)):
        raise TypeError(
            f"target must have dtype {W_dec.dtype} like W_dec, or {_checks.accumulator(W_dec.dtype)}, "
            f"got {target.dtype}"
        )
    prefixes = _nesting(codes, prefixes, nested)
    weights = _weights(weights, len(prefixes))
    scale = max(weights) * 2 ** (len(weights) - 1).bit_length()  # at least their sum, by a power of two: exact
    relative = [w / scale for w in weights] if scale > 0 else [1.0] * len(prefixes)
    indices, offsets = codes.indices, codes.offsets
    if offsets is None:
        flat = codes.batch_shape.numel(), values.shape[-1]
        values, indices = values.reshape(flat), indices.reshape(flat)
    training = torch.is_grad_enabled()  # whether arguments require gradients cannot be seen from within torch.vmap
    loss, sse, residual, _, _ = _DecodeLoss.apply(
        values, indices, offsets, W_dec, b_dec, target.reshape(-1, d), prefixes, relative, nested == "rank", scale,
        training, training and values.requires_grad, sparse_grad, _dispatch.requested(backend),
    )  # fmt: skip
    return DecodeLoss(loss, sse, residual.reshape(shape))
