# SPDX-License-Identifier: Apache-2.0
"""`encode_threshold`: every pre-activation above the threshold of its latent, without the ``[n, m]`` matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, _dispatch
from ..codes import SparseCodes
from ._once import once_differentiable


def _fwd_fake(x, W_enc, b_enc, threshold, norms, bandwidth, capacity, backend=None):
    size = torch.library.get_ctx().new_dynamic_size() if capacity is None else capacity
    n, window = x.shape[0], bandwidth > 0
    return (
        x.new_empty(size),
        x.new_empty(size, dtype=torch.int32),
        x.new_empty(n + 1, dtype=torch.int64),
        x.new_empty(size if window else 0, dtype=torch.uint8),
        threshold.new_empty(n if window else 0),
    )


def _bwd_fake(
    indices, offsets, state, grad_values, grad_l0, threshold, bandwidth, straight_through, need_threshold, backend=None
):
    grad_threshold = threshold.new_empty(threshold.shape[0] if need_threshold else 0)
    return threshold.new_empty(indices.shape), grad_threshold


_fwd = _dispatch.define(
    "encode_threshold_fwd(Tensor x, Tensor W_enc, Tensor? b_enc, Tensor threshold, Tensor? norms, float bandwidth, "
    "SymInt? capacity, *, str? backend=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd_fake,
)
_bwd = _dispatch.define(
    "encode_threshold_bwd(Tensor indices, Tensor offsets, Tensor state, Tensor? grad_values, Tensor? grad_l0, "
    "Tensor threshold, float bandwidth, bool straight_through, bool need_threshold, *, str? backend=None) "
    "-> (Tensor, Tensor)",
    _bwd_fake,
)


class _EncodeThreshold(torch.autograd.Function):
    generate_vmap_rule = True  # from those of the raw ops

    @staticmethod
    def forward(x, W_enc, b_enc, threshold, norms, bandwidth, capacity, straight_through, row_sparse, backend):
        return _fwd(x, W_enc, b_enc, threshold, norms, bandwidth, capacity, backend=backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, W_enc, _, threshold, _, ctx.bandwidth, _, ctx.straight_through, ctx.row_sparse, ctx.backend = inputs
        values, indices, offsets, state, l0 = output
        ctx.mark_non_differentiable(indices, offsets, state, *(() if ctx.bandwidth else (l0,)))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, W_enc, threshold, values, indices, offsets, state)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_values, _, __, ___, grad_l0):
        if grad_values is None and grad_l0 is None:
            return (None,) * 10
        x, W_enc, threshold, values, indices, offsets, state = ctx.saved_tensors
        need_x, need_W, need_b, need_threshold = ctx.needs_input_grad[:4]
        grad_threshold = None
        if not ctx.bandwidth:  # above the threshold, but rounded to 0 in 16 bits: padding
            grad_pre = torch.where(values != 0, grad_values, 0.0)
        else:
            state = torch.where(values != 0, state, state & 2)  # likewise; its window still counts
            grad_pre, grad_threshold = _bwd(
                indices, offsets, state, grad_values, grad_l0, threshold, ctx.bandwidth, ctx.straight_through,
                need_threshold, backend=ctx.backend,
            )  # fmt: skip
        grad_x = rows = grad_W = grad_b = None
        if need_x or need_W or need_b:
            grad_x, rows, grad_W, grad_b = torch.ops.fusae.encode_bwd.default(
                grad_pre, indices, offsets, x, W_enc, need_x, need_W, need_b, ctx.row_sparse, backend=ctx.backend
            )
        if need_W and ctx.row_sparse:
            grad_W = torch.sparse_coo_tensor(
                rows[None], grad_W, W_enc.shape, is_coalesced=True, check_invariants=False
            )
        wanted = zip(ctx.needs_input_grad, (grad_x, grad_W, grad_b, grad_threshold), strict=False)
        return *(grad if need else None for need, grad in wanted), *(None,) * 6


@_dispatch.public("encode_threshold_fwd", "encode_threshold_bwd", "encode_bwd")
def encode_threshold(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    threshold: Tensor | float,
    *,
    norms: Tensor | None = None,
    bandwidth: float | None = None,
    straight_through: bool = False,
    capacity: int | None = None,
    sparse_grad: bool = False,
    backend: str | None = None,
) -> SparseCodes | tuple[SparseCodes, Tensor]:
    """Every latent whose pre-activation ``x W_encᵀ + b_enc`` is above its threshold, as ragged codes; no ``[n, m]``.

    ReLU (threshold 0), JumpReLU (Rajamanoharan et al. 2024, arXiv:2407.14435) and BatchTopK at inference (one threshold
    for all; arXiv:2412.06410). A value is the pre-activation itself, not its distance from the threshold.

    Args:
        x: ``[..., d]`` activations; float32, bfloat16, float16 or float64, any strides. Leading dimensions are joined
            into n rows.
        W_enc: ``[m, d]`` encoder, row = latent, dtype of `x`.
        b_enc: ``[m]`` encoder bias, dtype of `x`, or None.
        threshold: ``[m]`` or a single one: a tensor, float32 (float64 where `x` is), or a number. The comparison is
            strict, on float32 sums before rounding; an entry stays unless it is at most its threshold, so NaN stays.
        norms: ``[m]`` float32; ``pre · norms`` is compared (pass the decoder row norms). Values stay pre-activations.
            Not with `bandwidth`: fold the norms into the weights instead.
        bandwidth: for training thresholds, the width of the window around a threshold in which the step counts as a
            ramp, in units of pre-activations. The codes then also hold the entries below the threshold with
            ``|pre - threshold| < bandwidth / 2``. Their value is 0: as padding, they are not active and change no
            reconstruction; but a loss of the values reaches the threshold through them. A window as wide as the
            pre-activations stores them all.
        straight_through: let the window's gradient, with the opposite sign, reach the pre-activation as well, and not
            the threshold alone (Anthropic, January 2025 update). Only with `bandwidth`.
        capacity: entries of storage to allocate; the number of entries is then never read by the host. ``offsets``
            count all of them: codes that did not fit raise wherever the host reads them. None: as many as there are,
            which takes one host sync on a GPU. Unused storage holds 0.
        sparse_grad: give ``W_enc.grad`` as a coalesced ``torch.sparse_coo`` tensor of the touched rows.
        backend: run on this backend or raise (default: the first that can).

    Returns:
        Ragged `SparseCodes` of n rows, latents ascending in every row. With `bandwidth`, a pair (codes, l0), where l0
        ``[n]`` float32 is the number of latents above their threshold in every row, differentiable by the same window:
        any loss of the values and of l0 trains the thresholds.

        Gradients: `x`, `W_enc` and `b_enc` through the entries above their threshold, if their value is not 0 (in 16
        bits it may round to that). With `bandwidth`, for ``in_window = |pre - threshold| < bandwidth / 2`` and the
        gradients g of a value and g0 of its row's l0,
        ``threshold.grad[j] = -Σ_i in_window[i, j] (threshold[j] g[i, j] + g0[i]) / bandwidth``; `straight_through` adds
        the terms of that sum, without the minus sign, to the gradients of their pre-activations. There is no
        forward-mode derivative and no second one. ``torch.vmap`` takes one call per element, and needs a `capacity`.

    Equivalent to::

        pre = torch.nn.functional.linear(x, W_enc, b_enc)
        codes = fusae.codes_from_dense(pre * (pre > threshold))
        l0 = (pre > threshold).sum(-1)
    """
    x, W_enc, b_enc = _checks.encoder(x, W_enc, b_enc)
    m, d = W_enc.shape
    threshold = _thresholds(threshold, m, x)
    if bandwidth is None:
        if straight_through:
            raise ValueError("bandwidth must be given with straight_through: it is the width of its window, got None")
        if threshold.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "bandwidth must be given for a threshold that requires a gradient, got None; "
                "pass the width of the window, or threshold.detach()"
            )
    else:
        _checks.number("bandwidth", bandwidth, above=True)
    if norms is not None and bandwidth is not None:
        raise ValueError("norms must be None with bandwidth; scale W_enc, b_enc and the threshold instead")
    norms = _checks.norms(norms, m, x)
    if capacity is not None:
        capacity = _checks.count("capacity", capacity, 2**62, "2**62", lower=0)
    values, indices, offsets, _, l0 = _EncodeThreshold.apply(
        x.reshape(-1, d), W_enc, b_enc, threshold, norms, float(bandwidth or 0.0), capacity, straight_through,
        sparse_grad, _dispatch.requested(backend),
    )  # fmt: skip
    codes = SparseCodes(values, indices, m, offsets)
    return codes if bandwidth is None else (codes, l0)


def _thresholds(threshold: Tensor | float, m: int, x: Tensor) -> Tensor:
    """One for each latent, in the dtype of sums."""
    dtype = _checks.accumulator(x.dtype)
    if not isinstance(threshold, Tensor):
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
            raise TypeError(f"threshold must be a torch.Tensor or a number, got {type(threshold).__name__}")
        return torch.full((m,), threshold, dtype=dtype, device=x.device)
    _checks.floating("threshold", threshold)
    if threshold.dtype not in (torch.float32, dtype):
        raise TypeError(f"threshold must be float32 (it is compared with float32 sums), got {threshold.dtype}")
    _checks.like("threshold", threshold, "x", x, dtype=False)
    if threshold.ndim == 0:
        threshold = threshold.expand(m)
    return _checks.vector("threshold", threshold, m, "one per latent, or a single one").to(dtype)
