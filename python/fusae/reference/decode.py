# SPDX-License-Identifier: Apache-2.0
"""Codes of dense activations, decoders and losses in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .sums import accumulator, latent_sums, rows_of, weighted_rows


def codes_from_dense_fwd(f: Tensor, capacity: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """The non-zeros of `f` ``[n, m]``: values and int32 indices in a storage of `capacity`, int64 offsets ``[n + 1]``.

    The offsets count every non-zero; those past the capacity are left out. The rest of the storage holds 0.
    """
    offsets = torch.zeros(f.shape[0] + 1, dtype=torch.int64, device=f.device)
    torch.cumsum((f != 0).sum(1), 0, out=offsets[1:])
    if capacity is None:
        row, latent = torch.nonzero(f, as_tuple=True)
        return f[row, latent], latent.to(torch.int32), offsets
    values, latents = f.new_zeros(capacity), torch.zeros(capacity, dtype=torch.int32, device=f.device)
    if f.shape[0]:
        row, latent = torch.nonzero_static(f, size=capacity, fill_value=0).unbind(1)
        used = torch.arange(capacity, device=f.device) < offsets[-1]
        values, latents = f[row, latent].masked_fill(~used, 0.0), latent.to(torch.int32)
    return values, latents, offsets


def codes_from_dense_bwd(grad_values: Tensor, indices: Tensor, offsets: Tensor, m: int) -> Tensor:
    """``[n, m]`` with `grad_values` at the places of the entries, 0 elsewhere."""
    row, used = rows_of(indices, offsets)
    grad = grad_values.new_zeros(offsets.shape[0] - 1, m)
    grad[row, indices[used].long()] = grad_values[used]
    return grad


def decode_fwd(values: Tensor, indices: Tensor, offsets: Tensor | None, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """``y[i] = Σ_j values[i, j] · W_dec[indices[i, j]] + b_dec`` ``[n, d]``. Entries of value 0 add nothing."""
    acc = accumulator(W_dec.dtype)
    row, used = rows_of(indices, offsets)
    n = indices.shape[0] if offsets is None else offsets.shape[0] - 1
    coef, latent = values.reshape(-1)[used].to(acc), indices.reshape(-1)[used].long()
    if latent.numel() and int(latent.min()) < 0:  # indexing raises past m, but takes a negative one from the end
        raise IndexError(f"indices must be in [0, {W_dec.shape[0]}), got {int(latent.min())}")
    y = torch.zeros(n, W_dec.shape[1], dtype=acc, device=W_dec.device)
    y.index_add_(0, row, weighted_rows(coef, W_dec[latent].to(acc)))
    return (y if b_dec is None else y + b_dec.to(acc)).to(W_dec.dtype)


def decode_bwd(
    grad_y: Tensor,
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    W_dec: Tensor,
    need_values: bool,
    need_W: bool,
    row_sparse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `decode_fwd`: (grad_values like `values`, rows int64 ``[u]``, grad_W ``[m, d]`` or ``[u, d]``).

    ``grad_values[i, j] = grad_y[i] · W_dec[indices[i, j]]`` for every stored entry, zero-valued ones included; storage
    past ``offsets[-1]`` gets 0.
    """
    acc = accumulator(W_dec.dtype)
    row, used = rows_of(indices, offsets)
    coef, latent = values.reshape(-1)[used].to(acc), indices.reshape(-1)[used].long()
    grad_values, grad_W, rows = values.new_empty(0), values.new_empty(0), latent.new_empty(0)
    if need_values:
        grad_values = torch.zeros_like(values, memory_format=torch.contiguous_format)
        dots = (grad_y[row].to(acc) * W_dec[latent].to(acc)).sum(-1)
        grad_values.view(-1)[used] = dots.to(values.dtype)
    if need_W:
        rows, grad_W = latent_sums(coef, latent, grad_y[row].to(acc), W_dec.shape[0], W_dec.dtype, row_sparse)
    return grad_values, rows, grad_W


def _groups(indices: Tensor, offsets: Tensor | None, prefixes: list[int], by_rank: bool) -> Tensor:
    """Group of every stored entry in use: the prefixes, the last one left out, that its latent or rank has passed."""
    _, used = rows_of(indices, offsets)
    key = torch.arange(indices.shape[1], device=indices.device).expand(indices.shape) if by_rank else indices
    inner = torch.tensor(prefixes[:-1], dtype=torch.int64, device=indices.device)
    return torch.bucketize(key.reshape(-1)[used].long(), inner, right=True)


def _row_total(rows: Tensor) -> Tensor:
    """The sum of ``[n]``, in parts that torch does not split among threads."""
    return torch.stack([part.sum() for part in rows.split(2**14)]).sum()


def decode_loss_fwd(
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    prefixes: list[int],
    weights: list[float],
    by_rank: bool,
    need_mixed: bool,
    need_dots: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Residuals ``r_g = target - b_dec - Σ_j values[i, j] · W_dec[indices[i, j]]`` over the entries in groups 0..g.

    Returns (``Σ r_g²`` ``[G]``, the last residual ``[n, d]``, and where needed and G > 1 ``mixed[g] = Σ_{h >= g}
    weights[h] r_h`` ``[G, n, d]``, and where needed ``mixed[group] · W_dec[index]`` of every stored entry, from what
    was not rounded yet). A single prefix has the weight 1. Storage past ``offsets[-1]`` gets 0.
    """
    acc = accumulator(W_dec.dtype)
    row, used = rows_of(indices, offsets)
    coef, latent = values.reshape(-1)[used].to(acc), indices.reshape(-1)[used].long()
    if latent.numel() and int(latent.min()) < 0:  # indexing raises past m, but takes a negative one from the end
        raise IndexError(f"indices must be in [0, {W_dec.shape[0]}), got {int(latent.min())}")
    group, rows = _groups(indices, offsets, prefixes, by_rank), W_dec[latent].to(acc)
    residual = target.to(acc) if b_dec is None else target.to(acc) - b_dec.to(acc)
    residuals = []
    for g in range(len(prefixes)):
        chosen = group == g
        residual = residual.index_add(0, row[chosen], weighted_rows(-coef[chosen], rows[chosen]))
        residuals.append(residual)
    sse = torch.stack([_row_total(r.square().sum(-1)) for r in residuals])
    mixed = [residual]
    if len(prefixes) > 1:
        mixed = [weights[-1] * residual]
        for weight, r in zip(weights[-2::-1], residuals[-2::-1], strict=True):
            mixed.insert(0, weight * r + mixed[0])
    dots = values.new_empty(0, dtype=acc)
    if need_dots:
        dots = torch.zeros(values.shape, dtype=acc, device=values.device)
        dots.view(-1)[used] = (torch.stack(mixed)[group, row] * rows).sum(-1)
    keep = need_mixed and len(prefixes) > 1
    mixed = torch.stack(mixed).to(W_dec.dtype) if keep else W_dec.new_empty(0)
    return sse, residual.to(W_dec.dtype), mixed, dots


def decode_loss_bwd(
    factor: Tensor,
    values: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    W_dec: Tensor,
    mixed: Tensor,
    prefixes: list[int],
    by_rank: bool,
    need_values: bool,
    need_W: bool,
    row_sparse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `decode_bwd` where entries meet the row ``mixed[group, i]``; sums are multiplied by `factor` in the end."""
    acc = accumulator(W_dec.dtype)
    row, used = rows_of(indices, offsets)
    coef, latent = values.reshape(-1)[used].to(acc), indices.reshape(-1)[used].long()
    met = mixed[_groups(indices, offsets, prefixes, by_rank), row].to(acc)
    grad_values, grad_W, rows = values.new_empty(0), values.new_empty(0), latent.new_empty(0)
    if need_values:
        grad_values = torch.zeros_like(values, memory_format=torch.contiguous_format)
        grad_values.view(-1)[used] = (factor * (met * W_dec[latent].to(acc)).sum(-1)).to(values.dtype)
    if need_W:
        rows, grad_W = latent_sums(coef, latent, met, W_dec.shape[0], acc, row_sparse)
        grad_W = (factor * grad_W).to(W_dec.dtype)
    return grad_values, rows, grad_W
