# SPDX-License-Identifier: Apache-2.0
"""Selections and encoders in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .sums import accumulator, activate, largest, latent_sums, rows_of, weighted_rows


def topk_fwd(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of every row of `pre` ``[n, m]``: values ``[n, k]`` and int32 indices ``[n, k]``."""
    indices = largest(pre, k)
    return pre.gather(1, indices), indices.to(torch.int32)


def topk_bwd(grad_values: Tensor, indices: Tensor, m: int) -> Tensor:
    """``[n, m]`` with `grad_values` ``[n, k]`` scattered to `indices`."""
    grad = grad_values.new_zeros(grad_values.shape[0], m)
    return grad.scatter_(1, indices.long(), grad_values)


def _pre_activations(x: Tensor, W_enc: Tensor, b_enc: Tensor | None) -> Tensor:
    acc = accumulator(x.dtype)
    pre = x.to(acc) @ W_enc.to(acc).T
    return pre if b_enc is None else pre + b_enc.to(acc)


def encode_topk_fwd(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    norms: Tensor | None,
    aux_mask: Tensor | None,
    k: int,
    k_aux: int,
    activation: str,
    select: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Top-k of the pre-activations ``x W_encᵀ + b_enc``, and a second top-k over the latents where `aux_mask` is true.

    `select` 'topk' scores a latent by its pre-activation, 'abs' by its magnitude; `norms` ``[m]`` multiplies scores.
    'group_max' takes the best of each of k groups of latents, by pre-activation.
    Rows of the second selection with fewer than `k_aux` masked latents are filled up with unmasked ones, lowest index
    first, with value 0.
    """
    pre = _pre_activations(x, W_enc, b_enc)
    score = pre.abs() if select == "abs" else pre
    if norms is not None:
        score = score * norms.to(pre.dtype)
    if select == "group_max":
        size = W_enc.shape[0] // k
        indices = largest(score.reshape(-1, size), 1).view(-1, k) + size * torch.arange(k, device=x.device)
    else:
        indices = largest(score, k)
    values = activate(pre.gather(1, indices), activation).to(x.dtype)
    return values, indices.to(torch.int32), *_auxiliary(pre, score, aux_mask, k_aux, activation, x.dtype)


def _auxiliary(
    pre: Tensor, score: Tensor, aux_mask: Tensor | None, k_aux: int, activation: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The second selection of `encode_topk_fwd` and `encode_batch_topk_fwd`."""
    if aux_mask is None or k_aux == 0:
        return pre.new_empty(pre.shape[0], 0, dtype=dtype), pre.new_empty(pre.shape[0], 0, dtype=torch.int32)
    # Two stable sorts: by score, then masked before unmasked. Unmasked latents all score the same: lowest index first.
    first = torch.sort(score.masked_fill(~aux_mask, 0.0), dim=-1, descending=True, stable=True).indices
    masked = aux_mask.expand_as(score).gather(1, first).to(torch.int8)
    masked_first = torch.sort(masked, dim=-1, descending=True, stable=True)
    aux_indices = first.gather(1, masked_first.indices)[:, :k_aux]
    aux_values = activate(pre.gather(1, aux_indices), activation).masked_fill(~aux_mask[aux_indices], 0.0)
    return aux_values.to(dtype), aux_indices.to(torch.int32)


def _ragged(kept: Tensor, size: int | None, *dense: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The entries where `kept` ``[n, m]``, latents ascending: indices, offsets, and those entries of the `dense` ones.

    With `size`, the storage has that many entries: it is filled up with 0, and what does not fit is left out.
    """
    offsets = torch.zeros(kept.shape[0] + 1, dtype=torch.int64, device=kept.device)
    torch.cumsum(kept.sum(1), 0, out=offsets[1:])
    row, latent = torch.nonzero(kept, as_tuple=True)
    entries = [latent.to(torch.int32), *(part[row, latent] for part in dense)]
    if size is not None:
        entries = [torch.cat([e[:size], e.new_zeros(max(0, size - len(e)))]) for e in entries]
    return entries[0], offsets, entries[1:]


def encode_threshold_fwd(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    threshold: Tensor,
    norms: Tensor | None,
    bandwidth: float,
    capacity: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Ragged codes of the pre-activations whose score is not at most `threshold` ``[m]`` (NaN stays).

    With a `bandwidth` above 0, entries in the open window ``|pre - threshold| < bandwidth / 2`` are stored too, with
    value 0 below the threshold. Returns values, int32 indices, offsets, the state of every entry (bit 0: above the
    threshold, bit 1: in the window) and l0 ``[n]``, the entries above; the last two are empty without a bandwidth.
    """
    pre = _pre_activations(x, W_enc, b_enc)
    above = ~((pre if norms is None else pre * norms.to(pre.dtype)) <= threshold)
    near = (pre - threshold).abs() < bandwidth / 2
    values = torch.where(above, pre, 0.0).to(x.dtype)
    if bandwidth == 0:
        indices, offsets, (values,) = _ragged(above, capacity, values)
        return values, indices, offsets, indices.new_empty(0, dtype=torch.uint8), pre.new_empty(0)
    state = above.to(torch.uint8) + 2 * near.to(torch.uint8)
    indices, offsets, (values, state) = _ragged(above | near, capacity, values, state)
    return values, indices, offsets, state, above.sum(1).to(pre.dtype)


def encode_threshold_bwd(
    indices: Tensor,
    offsets: Tensor,
    state: Tensor,
    grad_values: Tensor | None,
    grad_l0: Tensor | None,
    threshold: Tensor,
    bandwidth: float,
    straight_through: bool,
    need_threshold: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the stored pre-activations (in the dtype of `threshold`) and of `threshold`.

    The step of height 1 in l0, of height `threshold` in a value, has the derivative 1 / bandwidth in the window: minus
    that for the threshold and, with `straight_through`, plus that for the pre-activation.
    """
    row, used = rows_of(indices, offsets)
    latent, state = indices[used].long(), state[used]
    through, jump = threshold.new_zeros(indices.shape), threshold.new_zeros(indices.shape)
    if grad_values is not None:
        through[used] = torch.where(state & 1 != 0, grad_values[used].to(threshold.dtype), 0.0)
        jump[used] = threshold[latent] * grad_values[used]
    if grad_l0 is not None:
        jump[used] += grad_l0[row]
    jump[used] = torch.where(state & 2 != 0, jump[used] / bandwidth, 0.0)
    grad_threshold = threshold.new_zeros(threshold.shape[0] if need_threshold else 0)
    if need_threshold:
        grad_threshold.index_add_(0, latent, jump[used], alpha=-1)
    return through + jump if straight_through else through, grad_threshold


def encode_batch_topk_fwd(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    norms: Tensor | None,
    aux_mask: Tensor | None,
    k: int,
    k_aux: int,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Ragged codes of the n·k largest scores of all rows, and the auxiliary selection of `encode_topk_fwd`.

    Returns values, int32 indices, offsets, the smallest positive score that was selected (+Inf where there is none),
    auxiliary values and indices. A ReLU leaves out what is at or below 0; the storage has n·k entries, 0 behind.
    """
    pre = _pre_activations(x, W_enc, b_enc)
    score = pre if norms is None else pre * norms.to(pre.dtype)
    size = pre.shape[0] * k
    kept = torch.zeros(pre.numel(), dtype=torch.bool, device=x.device)
    kept[largest(score.reshape(1, -1), size)[0]] = True
    kept = kept.view(pre.shape)
    if activation == "relu":
        kept &= ~(pre <= 0)
    positive = torch.where(kept & (score > 0), score, torch.inf)
    smallest = torch.cat([positive.flatten(), positive.new_full((1,), torch.inf)]).min()
    indices, offsets, (values,) = _ragged(kept, size, pre.to(x.dtype))
    return values, indices, offsets, smallest, *_auxiliary(pre, score, aux_mask, k_aux, activation, x.dtype)


def encode_bwd(
    grad_pre: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    x: Tensor,
    W_enc: Tensor,
    need_x: bool,
    need_W: bool,
    need_b: bool,
    row_sparse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of selected pre-activations ``x[i] · W_enc[j] + b_enc[j]``, given the gradient of each one.

    Returns (grad_x ``[n, d]``, rows int64 ``[u]``, grad_W ``[m, d]`` or ``[u, d]``, grad_b ``[m]``), empty where not
    needed. With `row_sparse`, grad_W holds the u latents with a non-zero coefficient, ascending.
    """
    acc = accumulator(x.dtype)
    row, used = rows_of(indices, offsets)
    coef, latent = grad_pre.reshape(-1)[used].to(acc), indices.reshape(-1)[used].long()
    m = W_enc.shape[0]
    grad_x, grad_b = x.new_empty(0), x.new_empty(0)
    rows, grad_W = latent.new_empty(0), x.new_empty(0)
    if need_x:
        total = torch.zeros(x.shape, dtype=acc, device=x.device)
        grad_x = total.index_add_(0, row, weighted_rows(coef, W_enc[latent].to(acc))).to(x.dtype)
    if need_W:
        rows, grad_W = latent_sums(coef, latent, x[row].to(acc), m, W_enc.dtype, row_sparse)
    if need_b:
        grad_b = coef.new_zeros(m).index_add_(0, latent, coef).to(W_enc.dtype)
    return grad_x, rows, grad_W, grad_b
