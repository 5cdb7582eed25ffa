# SPDX-License-Identifier: Apache-2.0
"""Every raw op in plain torch: the specification, and a backend that runs anywhere.

The functions have the signatures of the raw ops. Sums are taken in float32 (float64 for float64 inputs), whatever the
dtype of the inputs; run on float64 copies, they are the oracle that every other backend is measured against.

Order of selection: larger score first, NaN largest of all, equal scores by the lower index; ``-0.0 == +0.0``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over inputs of `dtype` are taken."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _largest(score: Tensor, k: int) -> Tensor:
    """Indices of the k largest of every row ``[n, k]``, in the order of selection."""
    return torch.sort(score, dim=-1, descending=True, stable=True).indices[:, :k]


def _activate(pre: Tensor, activation: str) -> Tensor:
    """'relu' maps everything ``<= 0`` to +0 and keeps NaN; 'none' is the identity."""
    return pre.masked_fill(pre <= 0, 0.0) if activation == "relu" else pre


def topk_fwd(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of every row of `pre` ``[n, m]``: values ``[n, k]`` and int32 indices ``[n, k]``."""
    indices = _largest(pre, k)
    return pre.gather(1, indices), indices.to(torch.int32)


def topk_bwd(grad_values: Tensor, indices: Tensor, m: int) -> Tensor:
    """``[n, m]`` with `grad_values` ``[n, k]`` scattered to `indices`."""
    grad = grad_values.new_zeros(grad_values.shape[0], m)
    return grad.scatter_(1, indices.long(), grad_values)


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
    row, used = _rows_of(indices, offsets)
    grad = grad_values.new_zeros(offsets.shape[0] - 1, m)
    grad[row, indices[used].long()] = grad_values[used]
    return grad


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
        indices = _largest(score.reshape(-1, size), 1).view(-1, k) + size * torch.arange(k, device=x.device)
    else:
        indices = _largest(score, k)
    values = _activate(pre.gather(1, indices), activation).to(x.dtype)
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
    aux_values = _activate(pre.gather(1, aux_indices), activation).masked_fill(~aux_mask[aux_indices], 0.0)
    return aux_values.to(dtype), aux_indices.to(torch.int32)


def _ragged(
    kept: Tensor, size: int | None, *dense: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
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
    grad_values: Tensor | None,
    grad_l0: Tensor | None,
    indices: Tensor,
    offsets: Tensor,
    state: Tensor,
    threshold: Tensor,
    bandwidth: float,
    straight_through: bool,
    need_threshold: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the stored pre-activations (in the dtype of `threshold`) and of `threshold`.

    The step of height 1 in l0, of height `threshold` in a value, has the derivative 1 / bandwidth in the window: minus
    that for the threshold and, with `straight_through`, plus that for the pre-activation.
    """
    row, used = _rows_of(indices, offsets)
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
    kept[_largest(score.reshape(1, -1), size)[0]] = True
    kept = kept.view(pre.shape)
    if activation == "relu":
        kept &= ~(pre <= 0)
    positive = torch.where(kept & (score > 0), score, torch.inf)
    smallest = torch.cat([positive.flatten(), positive.new_full((1,), torch.inf)]).min()
    indices, offsets, (values,) = _ragged(kept, size, pre.to(x.dtype))
    return values, indices, offsets, smallest, *_auxiliary(pre, score, aux_mask, k_aux, activation, x.dtype)


def _rows_of(indices: Tensor, offsets: Tensor | None) -> tuple[Tensor, slice]:
    """Row of every stored entry (flat), and the slice of the storage that is in use."""
    if offsets is None:
        n, k = indices.shape
        return torch.arange(n, device=indices.device).repeat_interleave(k), slice(None)
    used, width = int(offsets[-1]), offsets[1:] - offsets[:-1]
    if int(offsets[0]) != 0 or used > indices.shape[0] or bool((width < 0).any()):
        raise IndexError(
            f"offsets must rise from 0 to at most the storage of {indices.shape[0]} entries, "
            f"got {int(offsets[0])} to {used}" + (", falling between" if bool((width < 0).any()) else "")
        )
    return torch.repeat_interleave(torch.arange(width.shape[0], device=indices.device), width), slice(0, used)


def _weighted_rows(coef: Tensor, rows: Tensor) -> Tensor:
    """``coef[i] * rows[i]``, exactly zero where the coefficient is zero (also beside an infinite row)."""
    return (coef[:, None] * rows).masked_fill((coef == 0)[:, None], 0.0)


def _latent_sums(
    coef: Tensor, indices: Tensor, rows: Tensor, m: int, dtype: torch.dtype, row_sparse: bool
) -> tuple[Tensor, Tensor]:
    """``out[j] = sum of coef[i] * rows[i] over the entries i of latent j``; touched latents only, with `row_sparse`."""
    total = rows.new_zeros(m, rows.shape[1])
    total.index_add_(0, indices, _weighted_rows(coef, rows))
    if not row_sparse:
        return indices.new_empty(0), total.to(dtype)
    touched = torch.unique(indices[coef != 0])
    return touched, total[touched].to(dtype)


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
    row, used = _rows_of(indices, offsets)
    coef, latent = grad_pre.reshape(-1)[used].to(acc), indices.reshape(-1)[used].long()
    m = W_enc.shape[0]
    grad_x, grad_b = x.new_empty(0), x.new_empty(0)
    rows, grad_W = latent.new_empty(0), x.new_empty(0)
    if need_x:
        total = torch.zeros(x.shape, dtype=acc, device=x.device)
        grad_x = total.index_add_(0, row, _weighted_rows(coef, W_enc[latent].to(acc))).to(x.dtype)
    if need_W:
        rows, grad_W = _latent_sums(coef, latent, x[row].to(acc), m, W_enc.dtype, row_sparse)
    if need_b:
        grad_b = coef.new_zeros(m).index_add_(0, latent, coef).to(W_enc.dtype)
    return grad_x, rows, grad_W, grad_b


def decode_fwd(
    values: Tensor, indices: Tensor, offsets: Tensor | None, W_dec: Tensor, b_dec: Tensor | None
) -> Tensor:
    """``y[i] = Σ_j values[i, j] · W_dec[indices[i, j]] + b_dec`` ``[n, d]``. Entries of value 0 add nothing."""
    acc = accumulator(W_dec.dtype)
    row, used = _rows_of(indices, offsets)
    n = indices.shape[0] if offsets is None else offsets.shape[0] - 1
    coef, latent = values.reshape(-1)[used].to(acc), indices.reshape(-1)[used].long()
    if latent.numel() and int(latent.min()) < 0:  # indexing raises past m, but takes a negative one from the end
        raise IndexError(f"indices must be in [0, {W_dec.shape[0]}), got {int(latent.min())}")
    y = torch.zeros(n, W_dec.shape[1], dtype=acc, device=W_dec.device)
    y.index_add_(0, row, _weighted_rows(coef, W_dec[latent].to(acc)))
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
    row, used = _rows_of(indices, offsets)
    coef, latent = values.reshape(-1)[used].to(acc), indices.reshape(-1)[used].long()
    grad_values, grad_W, rows = values.new_empty(0), values.new_empty(0), latent.new_empty(0)
    if need_values:
        grad_values = torch.zeros_like(values, memory_format=torch.contiguous_format)
        dots = (grad_y[row].to(acc) * W_dec[latent].to(acc)).sum(-1)
        grad_values.view(-1)[used] = dots.to(values.dtype)
    if need_W:
        rows, grad_W = _latent_sums(coef, latent, grad_y[row].to(acc), W_dec.shape[0], W_dec.dtype, row_sparse)
    return grad_values, rows, grad_W


def _groups(indices: Tensor, offsets: Tensor | None, prefixes: list[int], by_rank: bool) -> Tensor:
    """Group of every stored entry in use: the prefixes, the last one left out, that its latent or rank has passed."""
    _, used = _rows_of(indices, offsets)
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
    row, used = _rows_of(indices, offsets)
    coef, latent = values.reshape(-1)[used].to(acc), indices.reshape(-1)[used].long()
    if latent.numel() and int(latent.min()) < 0:  # indexing raises past m, but takes a negative one from the end
        raise IndexError(f"indices must be in [0, {W_dec.shape[0]}), got {int(latent.min())}")
    group, rows = _groups(indices, offsets, prefixes, by_rank), W_dec[latent].to(acc)
    residual = target.to(acc) if b_dec is None else target.to(acc) - b_dec.to(acc)
    residuals = []
    for g in range(len(prefixes)):
        chosen = group == g
        residual = residual.index_add(0, row[chosen], _weighted_rows(-coef[chosen], rows[chosen]))
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
    row, used = _rows_of(indices, offsets)
    coef, latent = values.reshape(-1)[used].to(acc), indices.reshape(-1)[used].long()
    met = mixed[_groups(indices, offsets, prefixes, by_rank), row].to(acc)
    grad_values, grad_W, rows = values.new_empty(0), values.new_empty(0), latent.new_empty(0)
    if need_values:
        grad_values = torch.zeros_like(values, memory_format=torch.contiguous_format)
        grad_values.view(-1)[used] = (factor * (met * W_dec[latent].to(acc)).sum(-1)).to(values.dtype)
    if need_W:
        rows, grad_W = _latent_sums(coef, latent, met, W_dec.shape[0], acc, row_sparse)
        grad_W = (factor * grad_W).to(W_dec.dtype)
    return grad_values, rows, grad_W


def _check_rows(rows: Tensor, m: int) -> None:
    """A sparse gradient is not checked when it is built: its rows may be out of range, unordered or repeated."""
    if rows.numel() and (int(rows[0]) < 0 or int(rows[-1]) >= m or not bool((rows[1:] > rows[:-1]).all())):
        raise IndexError(
            f"grad: rows must lie in [0, {m}) and ascend, each once, got {rows.numel()} rows from "
            f"{int(rows.min())} to {int(rows.max())}; build the gradient with check_invariants=True, or coalesce it"
        )


def adam_rows_(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    rows: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    decoupled: bool,
    masked: bool,
    project: bool,
    renormalise: bool,
) -> None:
    """One Adam step of the rows of `param` ``[m, d]`` in place. See `fusae.adam_rows_` for the formula."""
    acc = accumulator(param.dtype)
    if rows is not None:
        _check_rows(rows, param.shape[0])
    touched = slice(None) if rows is None or not masked else rows
    if rows is None or masked:
        g = grad.to(acc)
    else:
        g = torch.zeros(param.shape, dtype=acc, device=param.device)
        g[rows] = grad.to(acc)
    w, mean, square = param[touched].to(acc), exp_avg[touched].to(acc), exp_avg_sq[touched].to(acc)
    if project:
        length2 = (w * w).sum(-1, keepdim=True)
        g = g - torch.where(length2 > 0, (g * w).sum(-1, keepdim=True) / length2, 0.0) * w
    if weight_decay:
        if decoupled:
            w = w * (1 - lr * weight_decay)
        else:
            g = g + weight_decay * w
    mean = mean + (g - mean) * (1 - beta1)
    square = beta2 * square + (1 - beta2) * g * g
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    # SparseAdam adds eps before the bias correction of the second moment, Adam after it.
    eps = eps / correction2**0.5 if masked else eps
    w = w - (lr / correction1) * mean / ((square / correction2).sqrt() + eps)
    if renormalise:
        length = w.norm(dim=-1, keepdim=True)
        w = torch.where(length > 0, w / length, w)
    param[touched] = w.to(param.dtype)
    exp_avg[touched] = mean.to(exp_avg.dtype)
    exp_avg_sq[touched] = square.to(exp_avg_sq.dtype)
