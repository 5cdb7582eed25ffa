# SPDX-License-Identifier: Apache-2.0
"""Comparisons of ragged codes: their form, a selection by thresholds, the best of a batch. As those of `compare`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..codes import SparseCodes
from .compare import assert_values


def assert_form(codes: SparseCodes, n: int, m: int, dtype: torch.dtype, what: str) -> tuple[Tensor, Tensor]:
    """Ragged codes of n rows over m latents, ascending in every row, 0 behind the entries in use.

    Returns the row and the latent of every entry in use.
    """
    if codes.offsets is None or codes.shape != (n, m) or codes.dtype != dtype:
        raise AssertionError(f"{what}: ragged {dtype} codes of [{n}, {m}] wanted, got {codes}")
    offsets = codes.offsets
    width = offsets[1:] - offsets[:-1]
    used, storage = int(offsets[-1]), len(codes.values)
    if int(offsets[0]) != 0 or bool((width < 0).any()) or used > storage:
        raise AssertionError(f"{what}: offsets must rise from 0 to at most {storage}, got {offsets.tolist()[:20]}")
    if bool(codes.values[used:].any()) or bool(codes.indices[used:].any()):
        raise AssertionError(f"{what}: storage behind the {used} entries in use is not 0")
    row = torch.repeat_interleave(torch.arange(n, device=offsets.device), width)
    latent = codes.indices[:used].long()
    outside = (latent < 0) | (latent >= m)
    if bool(outside.any()):
        raise AssertionError(f"{what}: index {int(latent[outside][0])} outside [0, {m})")
    key = row * m + latent
    rise = key[1:] > key[:-1]
    if not bool(rise.all()):
        at = int((~rise).nonzero()[0])
        raise AssertionError(
            f"{what}: latents must ascend in every row, got {int(latent[at])} then {int(latent[at + 1])} in row "
            f"{int(row[at + 1])}"
        )
    return row, latent


def _entries(mask: Tensor, pre: Tensor, limit: Tensor) -> str:
    row, latent = mask.nonzero()[0].tolist()
    place = f"first at row {row}, latent {latent}: pre-activation {float(pre[row, latent]):.9g}"
    return f"{int(mask.sum())} entries, {place}, threshold {float(limit[row, latent]):.9g}"


def assert_threshold(
    pre: Tensor,
    codes: SparseCodes,
    threshold: Tensor,
    *,
    score: Tensor | None = None,
    band: float = 0.0,
    bandwidth: float = 0.0,
    l0: Tensor | None = None,
    what: str = "encode_threshold",
) -> None:
    """A selection by thresholds.

    Args:
        pre: ``[n, m]`` float64 pre-activations of the oracle.
        codes: ragged codes under test.
        threshold: ``[m]``.
        score: ``[n, m]`` float64, what is compared with the threshold (default: `pre`).
        band: how far a pre-activation or score of the backend may be from the oracle's. 0: exact.
        bandwidth: the entries in the window are stored too, those below the threshold with value 0.
        l0: ``[n]``, entries above the threshold, with a bandwidth.

    Checked: the form; every entry above its threshold (NaN too) is stored with its value, none below but for
    the window.
    """
    n, m = pre.shape
    row, latent = assert_form(codes, n, m, codes.dtype, what)
    limit = threshold.double().expand(n, m)
    score = pre if score is None else score
    distance = (pre - limit).abs()
    above, surely_above = ~(score <= limit - band), ~(score <= limit + band)
    near, surely_near = (distance < bandwidth / 2 + band), (distance < bandwidth / 2 - band)
    if bandwidth == 0:
        near = surely_near = torch.zeros_like(above)
    stored = torch.zeros(n, m, dtype=torch.bool, device=pre.device)
    stored[row, latent] = True
    missing, extra = (surely_above | surely_near) & ~stored, stored & ~(above | near)
    if bool(missing.any()):
        raise AssertionError(f"{what}: entries above their threshold are missing: {_entries(missing, pre, limit)}")
    if bool(extra.any()):
        raise AssertionError(f"{what}: entries that do not pass are stored: {_entries(extra, pre, limit)}")
    values = codes.values[: len(row)]
    sure, never = surely_above[row, latent], ~above[row, latent]
    assert_values(values[sure][None], pre[row, latent][sure][None], "none", band, what)
    if bool((values[never] != 0).any()):
        raise AssertionError(f"{what}: an entry of the window below its threshold has a value other than 0")
    if l0 is not None:
        low, high = surely_above.sum(1), above.sum(1)
        if bool(((l0 < low) | (l0 > high)).any()):
            at = int(((l0 < low) | (l0 > high)).nonzero()[0])
            raise AssertionError(f"{what}: l0 of row {at} is {float(l0[at])}, {int(low[at])} to {int(high[at])} wanted")


def assert_batch_topk(
    pre: Tensor,
    codes: SparseCodes,
    smallest: Tensor,
    size: int,
    *,
    score: Tensor | None = None,
    activation: str = "relu",
    band: float = 0.0,
    what: str = "encode_batch_topk",
) -> None:
    """The `size` best scores of a batch, without those that a ReLU empties.

    Arguments as of `assert_threshold`. Checked: the form; values; how many; nothing left out scores more than 2 bands
    above anything selected; NaN; the smallest positive score.
    """
    n, m = pre.shape
    row, latent = assert_form(codes, n, m, codes.dtype, what)
    score = pre if score is None else score
    values, selected = codes.values[: len(row)], score[row, latent]
    assert_values(values[None], pre[row, latent][None], "none", band, what)
    stored = torch.zeros(n, m, dtype=torch.bool, device=pre.device)
    stored[row, latent] = True
    if activation == "relu" and bool((pre[row, latent] <= -band).any()):
        raise AssertionError(f"{what}: an entry at or below 0 is stored after a ReLU")
    fewest = most = size
    if activation == "relu":  # how many of the best it leaves
        best = pre.flatten()[torch.sort(score.flatten(), descending=True, stable=True).indices[:size]]
        fewest, most = (int((~(best <= margin)).sum()) for margin in (band, -band))
    if not fewest <= len(row) <= most:
        raise AssertionError(f"{what}: {fewest} to {most} entries wanted, got {len(row)}")
    nan_left = int((torch.isnan(score) & ~stored).sum())
    if nan_left and int(torch.isnan(selected).sum()) < len(row):
        raise AssertionError(f"{what}: {nan_left} NaN left out before others (NaN is the largest)")
    finite = selected[~torch.isnan(selected)]
    left = score[~stored & ~torch.isnan(score)]
    if len(row) == size and finite.numel() and left.numel() and float(left.max() - finite.min()) > 2 * band:
        raise AssertionError(
            f"{what}: an unselected entry scores {float(left.max()):.9g}, a selected one {float(finite.min()):.9g}, "
            f"allowed difference {2 * band:.3g}"
        )
    positive = finite[finite > 0]
    wanted = float(positive.min()) if positive.numel() else float("inf")
    if smallest.shape != () or not (wanted == float(smallest) or abs(float(smallest) - wanted) <= band):
        raise AssertionError(f"{what}: smallest positive score {wanted:.9g} wanted, got {smallest}")
