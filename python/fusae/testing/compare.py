# SPDX-License-Identifier: Apache-2.0
"""Comparisons that decide whether a backend is right. Each raises ``AssertionError`` with the place and the numbers.

Budgets, not tolerances: a result may be about twice as wrong as plain torch in the same dtype is, measured against
float64, and no more. ``tests/test_compare.py`` feeds these functions planted errors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def accumulator_eps(dtype: torch.dtype) -> float:
    """Machine epsilon of the dtype in which sums over `dtype` are taken."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def _finite_max(t: Tensor) -> float:
    finite = t[torch.isfinite(t)]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _place(flat: int, shape: torch.Size) -> str:
    index = []
    for size in reversed(shape):
        flat, i = divmod(flat, size)
        index.append(i)
    return str(list(reversed(index)))


def _same_kind(actual: Tensor, wanted: Tensor, what: str, *, dtype: bool = True) -> None:
    if actual.shape != wanted.shape:
        raise AssertionError(f"{what}: shape {list(wanted.shape)} wanted, got {list(actual.shape)}")
    if dtype and actual.dtype != wanted.dtype:
        raise AssertionError(f"{what}: dtype {wanted.dtype} wanted, got {actual.dtype}")


def assert_same_nonfinite(actual: Tensor, reference: Tensor, what: str = "result") -> None:
    """NaN, +Inf and -Inf stand at the same places."""
    a, r = actual.detach(), reference.detach()
    for kind, test in (("NaN", torch.isnan), ("+Inf", torch.isposinf), ("-Inf", torch.isneginf)):
        wrong = test(a) != test(r)
        if wrong.any():
            first = int(wrong.flatten().nonzero()[0])
            raise AssertionError(
                f"{what}: {kind} differs at {int(wrong.sum())} of {a.numel()} places, first at "
                f"{_place(first, a.shape)}: got {a.flatten()[first].item()}, reference {r.flatten()[first].item()}"
            )


def assert_equal(actual: Tensor, wanted: Tensor, what: str = "result", *, signed_zero: bool = False) -> None:
    """Equal bit by bit. Any NaN equals any NaN; ``-0.0 == +0.0`` unless `signed_zero`."""
    _same_kind(actual, wanted, what)
    a, w = actual.detach(), wanted.detach()
    wrong = a != w
    if a.is_floating_point():
        wrong &= ~(torch.isnan(a) & torch.isnan(w))
        if signed_zero:
            wrong |= (torch.signbit(a) != torch.signbit(w)) & ~torch.isnan(w)
    if wrong.any():
        first = int(wrong.flatten().nonzero()[0])
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {a.numel()} elements differ, first at {_place(first, a.shape)}: "
            f"got {a.flatten()[first].item()}, wanted {w.flatten()[first].item()}"
        )


def assert_within_budget(actual: Tensor, reference: Tensor, oracle: Tensor, what: str = "result") -> None:
    """``err(actual) <= 2 (err(reference) + eps(dtype) max|oracle|)``, errors against `oracle`, largest element.

    Args:
        actual: the result under test.
        reference: the same computation in plain torch, same dtype.
        oracle: the same computation in float64.

    NaN and Inf have to stand where the reference has them; the budget counts elsewhere.
    """
    _same_kind(actual, reference, what)
    _same_kind(actual, oracle, what, dtype=False)
    assert_same_nonfinite(actual, reference, what)
    usable = torch.isfinite(reference) & torch.isfinite(oracle)
    if not usable.any():
        return
    a, r, o = (t.detach().double()[usable] for t in (actual, reference, oracle))
    error, reference_error = (a - o).abs(), float((r - o).abs().max())
    top = float(o.abs().max())
    budget = 2 * (reference_error + torch.finfo(actual.dtype).eps * top)
    if not float(error.max()) <= budget:
        worst = int(error.argmax())
        flat = int(usable.flatten().nonzero()[worst])
        raise AssertionError(
            f"{what} ({actual.dtype}): error {float(error[worst]):.3g} exceeds the budget {budget:.3g} at "
            f"{_place(flat, actual.shape)}: got {float(a[worst]):.9g}, oracle {float(o[worst]):.9g}, reference "
            f"{float(r[worst]):.9g}; {int((error > budget).sum())} of {a.numel()} elements over budget; reference "
            f"error {reference_error:.3g}, max |oracle| {top:.3g}"
        )


def assert_grads(actual: Tensor, reference: Tensor, oracle: Tensor, what: str = "gradient") -> None:
    """A gradient within the element budget, and also as a whole, so that one dropped row cannot hide.

    On top of `assert_within_budget`: relative L2 error and cosine of the whole, signed bias (a common factor of 1.01
    shows here even in bfloat16), L2 error of every row, and rows that are zero in the oracle are exactly zero.
    """
    assert_within_budget(actual, reference, oracle, what)
    if not torch.isfinite(reference).all() or not torch.isfinite(oracle).all() or actual.numel() == 0:
        return
    a, r, o = (t.detach().double().reshape(t.shape[0], -1) for t in (actual, reference, oracle))
    eps, acc_eps = torch.finfo(actual.dtype).eps, accumulator_eps(actual.dtype)
    length, length_a = float(o.norm()), float(a.norm())
    if length == 0:
        assert_equal(actual, torch.zeros_like(actual), f"{what} (zero in the oracle)")
        return
    rel, rel_reference = float((a - o).norm()) / length, float((r - o).norm()) / length
    bound = 2 * (rel_reference + eps)
    if not rel <= bound:
        raise AssertionError(
            f"{what}: relative L2 error {rel:.3g} exceeds {bound:.3g} (reference: {rel_reference:.3g})"
        )
    cosine = float((a * o).sum()) / (length * length_a)
    if not 1 - cosine <= bound**2 + 1e-12:
        raise AssertionError(f"{what}: cosine to the oracle is 1 - {1 - cosine:.3g}, 1 - {bound**2:.3g} wanted")
    # Rounding errors are independent, so their mean shrinks with the number of elements; a wrong factor does not.
    mass = float(o.abs().sum())
    bias, bias_reference = (float(((t - o) * o.sign()).sum()) / mass for t in (a, r))
    bound = 2 * abs(bias_reference) + 4 * eps * length / mass + 4 * acc_eps
    if not abs(bias) <= bound:
        raise AssertionError(f"{what}: signed bias {bias:+.3g} exceeds {bound:.3g} (scaled by {1 + bias:.4f}?)")
    row_length, row_error, row_reference = o.norm(dim=1), (a - o).norm(dim=1), (r - o).norm(dim=1)
    bound = 2 * (row_reference + 2 * eps * row_length) + 8 * acc_eps * float(row_length.max())
    bad = (row_error > bound).nonzero().flatten()
    if bad.numel():
        i = int(bad[0])
        raise AssertionError(
            f"{what}: {bad.numel()} of {a.shape[0]} rows are off, first row {i}: L2 error {float(row_error[i]):.3g} "
            f"over {float(bound[i]):.3g}; norm {float(a[i].norm()):.6g}, oracle {float(row_length[i]):.6g}"
            + (" (row dropped?)" if not a[i].any() else "")
        )
    stray = ((row_length == 0) & (a != 0).any(dim=1)).nonzero().flatten()
    if stray.numel():
        raise AssertionError(f"{what}: {stray.numel()} rows without a gradient are not zero, first row {int(stray[0])}")


def _assert_indices(indices: Tensor, shape: tuple[int, int], m: int, what: str) -> None:
    if indices.dtype != torch.int32:
        raise AssertionError(f"{what}: indices must be int32, got {indices.dtype}")
    if tuple(indices.shape) != shape:
        raise AssertionError(f"{what}: indices of shape {list(shape)} wanted, got {list(indices.shape)}")
    outside = (indices < 0) | (indices >= m)
    if outside.any():
        row, column = outside.nonzero()[0].tolist()
        raise AssertionError(f"{what}: index {int(indices[row, column])} outside [0, {m}) at row {row}, place {column}")
    ordered = indices.sort(dim=1).values
    twice = ordered[:, 1:] == ordered[:, :-1]
    if twice.any():
        row, column = twice.nonzero()[0].tolist()
        raise AssertionError(f"{what}: latent {int(ordered[row, column])} is selected twice in row {row}")


def _first_row(bad: Tensor) -> tuple[int, str]:
    rows = bad.nonzero().flatten()
    return int(rows[0]), f"{rows.numel()} of {bad.numel()} rows, first row {int(rows[0])}"


def selection_band(reference: Tensor, oracle: Tensor, dtype: torch.dtype) -> float:
    """How far one score may be from the oracle: twice the reference's own error plus one rounding of a sum."""
    usable = torch.isfinite(reference) & torch.isfinite(oracle)
    error = (reference.double() - oracle.double())[usable]
    top = _finite_max(oracle[usable])
    return 2 * ((float(error.abs().max()) if error.numel() else 0.0) + accumulator_eps(dtype) * top)


def assert_topk(
    pre: Tensor,
    values: Tensor,
    indices: Tensor,
    k: int,
    *,
    score: Tensor | None = None,
    activation: str = "none",
    band: float = 0.0,
    mask: Tensor | None = None,
    what: str = "top-k",
) -> None:
    """A top-k selection by its invariants.

    Args:
        pre: ``[n, m]`` float64 pre-activations of the oracle.
        values, indices: ``[n, k]`` codes under test.
        score: ``[n, m]`` float64, what the selection goes by (default: `pre`).
        activation: 'relu' or 'none', applied to the pre-activations before rounding to the dtype of `values`.
        band: how far a pre-activation or score of the backend may be from the oracle's (`selection_band`). 0 means that
            the selection has to be exact: ties go to the lower latent.
        mask: ``[m]`` bool: select among these first; then unmasked ones, lowest index first, with value 0.

    Checked: int32 indices in range and distinct; values are the rounded activations of the latents they name; NaN is
    the largest; nothing unselected lies above anything selected by more than the band; sorted by score; ties.
    """
    n, m = pre.shape
    score = pre if score is None else score
    _assert_indices(indices, (n, k), m, what)
    if values.shape != indices.shape:
        raise AssertionError(f"{what}: values of shape {list(indices.shape)} wanted, got {list(values.shape)}")
    at = indices.long()
    wanted = pre.gather(1, at)
    if mask is not None:
        wanted = wanted.masked_fill(~mask[at], 0.0)
    assert_values(values, wanted, activation, band, what)
    if mask is not None:
        chosen = min(k, int(mask.sum()))
        _assert_padding(at[:, chosen:], mask, what)
        at = at[:, :chosen]
        if not bool(mask[at].all()):
            row, where = _first_row(~mask[at].all(1))
            raise AssertionError(f"{what}: unmasked latents before masked ones in {where}")
    if n and at.shape[1]:
        _assert_order(score, at, band, mask, what)


def assert_values(values: Tensor, wanted: Tensor, activation: str, band: float, what: str) -> None:
    if activation == "relu":
        negative = torch.signbit(values) & ~torch.isnan(values)
        if negative.any():
            raise AssertionError(f"{what}: {int(negative.sum())} values with a minus sign (-0.0 included) after ReLU")
        wanted = wanted.masked_fill(wanted <= 0, 0.0)
    limits = torch.finfo(values.dtype)
    rounded = wanted.to(values.dtype)
    assert_same_nonfinite(values, rounded, f"{what} values")
    if band == 0:
        assert_equal(values, rounded, f"{what} values")
        return
    finite = torch.isfinite(rounded) & torch.isfinite(wanted)
    error = (values.double() - wanted).abs().masked_fill(~finite, 0.0)
    allowed = wanted.abs() * limits.eps + band + limits.smallest_normal * limits.eps
    bad = (error > allowed) & finite
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.numel()} values are not the activations of the latents they name, first "
            f"at row {row}, place {column}: got {float(values[row, column]):.9g}, oracle "
            f"{float(wanted[row, column]):.9g}, allowed error {float(allowed[row, column]):.3g}"
        )


def _assert_padding(fill: Tensor, mask: Tensor, what: str) -> None:
    """Places left over when the mask has fewer latents than asked for: the lowest unmasked ones, ascending."""
    wanted = (~mask).nonzero().flatten()[: fill.shape[1]].expand_as(fill)
    bad = (fill != wanted).any(1)
    if bad.any():
        row, where = _first_row(bad)
        raise AssertionError(
            f"{what}: filled up with latents {fill[row].tolist()[:8]}, the lowest unmasked ones are "
            f"{wanted[row].tolist()[:8]} ({where})"
        )


def _assert_order(score: Tensor, at: Tensor, band: float, mask: Tensor | None, what: str) -> None:
    n, k = at.shape
    candidates = torch.ones_like(score, dtype=torch.bool) if mask is None else mask.expand_as(score)
    got = score.gather(1, at)
    is_nan = torch.isnan(score) & candidates
    nan_wanted = is_nan.sum(1).clamp(max=k)
    leading = torch.isnan(got).cumprod(1).sum(1)
    if (torch.isnan(got).sum(1) != nan_wanted).any():
        row, where = _first_row(torch.isnan(got).sum(1) != nan_wanted)
        raise AssertionError(
            f"{what}: {int(torch.isnan(got[row]).sum())} NaN selected, {int(nan_wanted[row])} wanted (NaN is the "
            f"largest); {where}"
        )
    if (leading != nan_wanted).any():
        raise AssertionError(f"{what}: NaN is not in front in {_first_row(leading != nan_wanted)[1]}")
    place = torch.arange(k, device=at.device).expand_as(at)
    after_nan = place >= nan_wanted[:, None]
    rest = got.masked_fill(~after_nan, math.inf)  # the finite and infinite part, NaN places neutral
    # inf - inf is NaN and compares false: equal infinities are in order.
    rise = (rest[:, 1:] - rest[:, :-1] > 2 * band) & after_nan[:, 1:]
    if rise.any():
        row, where = _first_row(rise.any(1))
        column = int(rise[row].nonzero()[0])
        raise AssertionError(
            f"{what}: not sorted in {where}: score {float(rest[row, column]):.9g} before "
            f"{float(rest[row, column + 1]):.9g}, allowed rise {2 * band:.3g}"
        )
    left = candidates.scatter(1, at, False)
    best_left = score.masked_fill(~left, -math.inf).nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    best_left = best_left.max(1).values
    worst_taken = rest.masked_fill(~after_nan, math.inf).min(1).values
    missed = best_left - worst_taken > 2 * band
    if missed.any():
        row, where = _first_row(missed)
        raise AssertionError(
            f"{what}: an unselected latent scores {float(best_left[row]):.9g}, a selected one "
            f"{float(worst_taken[row]):.9g}, allowed difference {2 * band:.3g}; {where}"
        )
    if band == 0:
        _assert_ties(score, at, candidates, what)


def _assert_ties(score: Tensor, at: Tensor, candidates: Tensor, what: str) -> None:
    """Equal scores: the lower latent is selected, and stands first. NaN equals NaN."""
    key = score.masked_fill(~candidates, -math.inf)
    order = torch.sort(key, dim=1, descending=True, stable=True).indices
    if not bool(candidates.all()):  # unmasked latents share the key of a true -inf: put them behind it
        behind = torch.sort(candidates.gather(1, order).to(torch.int8), dim=1, descending=True, stable=True).indices
        order = order.gather(1, behind)
    wanted = order[:, : at.shape[1]]
    bad = (wanted != at).any(1)
    if bad.any():
        row, where = _first_row(bad)
        column = int((wanted[row] != at[row]).nonzero()[0])
        raise AssertionError(
            f"{what}: a tie is decided wrongly in {where}: latent {int(at[row, column])} at place {column}, latent "
            f"{int(wanted[row, column])} wanted (equal scores by the lower latent)"
        )
