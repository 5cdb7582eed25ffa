# SPDX-License-Identifier: Apache-2.0
"""Ragged encoders: what passes the threshold of its latent, and the best of the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from .latents import _ByLatent
from .native import _C, DTYPES, ptr
from .selection import Encoder


def encode_threshold_fwd(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    threshold: Tensor,
    norms: Tensor | None,
    bandwidth: float,
    capacity: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    encoder, threshold, window = Encoder(x, W_enc, b_enc, norms), threshold.contiguous(), bandwidth > 0
    lists = _C.RowLists(encoder.n)
    for first, rows in encoder.blocks():
        encoder.run("threshold", first, rows, lists, first, ptr(threshold), bandwidth / 2)
    offsets = torch.empty(encoder.n + 1, dtype=torch.int64)
    _C.lists_offsets(lists, 0, False, ptr(offsets))
    used = int(offsets[-1])
    values, indices, state = _storage(x, used, used if capacity is None else capacity, window)
    l0 = torch.empty(encoder.n if window else 0, dtype=torch.float32)
    _C.lists_write(
        lists, False, ptr(offsets), ptr(values), DTYPES[x.dtype], ptr(indices), len(values), ptr(threshold),
        bandwidth / 2, ptr(state) if window else 0, ptr(l0) if window else 0, encoder.threads,
    )  # fmt: skip
    return values, indices, offsets, state, l0


def _storage(x: Tensor, used: int, size: int, window: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Values, indices and states of ragged codes, 0 behind the entries in use."""
    values, indices = x.new_empty(size), torch.empty(size, dtype=torch.int32)
    state = torch.empty(size if window else 0, dtype=torch.uint8)
    for part in (values, indices, state):
        part[used:] = 0
    return values, indices, state


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
    used, storage = int(offsets[-1]), indices.shape[0]
    if used > storage:
        raise IndexError(
            f"the codes have {used} entries and a storage of {storage}: a capacity was too small; "
            f"encode with capacity >= {used}, or with None"
        )
    state, latent = state[:used], indices[:used].long()
    through = torch.zeros(indices.shape, dtype=torch.float32)
    jump = torch.zeros(indices.shape, dtype=torch.float32)
    if grad_values is not None:
        through[:used] = torch.where(state & 1 != 0, grad_values[:used].float(), 0.0)
        jump[:used] = threshold[latent] * grad_values[:used]
    if grad_l0 is not None:
        jump[:used] += grad_l0.repeat_interleave(offsets[1:] - offsets[:-1])
    jump[:used] = torch.where(state & 2 != 0, jump[:used] / bandwidth, 0.0)
    grad_threshold = torch.zeros(threshold.shape[0] if need_threshold else 0, dtype=torch.float32)
    if need_threshold:
        entries = _ByLatent(-jump, indices, offsets, threshold.shape[0])
        entries.run(jump.new_zeros(1, 1), coef_sum=grad_threshold)
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
    encoder = Encoder(x, W_enc, b_enc, norms, aux_mask, k_aux, activation)
    lists, keep = _C.RowLists(encoder.n), encoder.n * k
    # With a ReLU nothing at or below 0 is wanted. (A norm can be 0, so that does not hold for scores.)
    start = 0.0 if encoder.relu and norms is None else float("nan")
    threshold = torch.full((encoder.n,), start, dtype=torch.float32)

    def cut(most: int = 2 * keep + 4096) -> None:
        _C.batch_cut(lists, ptr(threshold), keep, most, ptr(encoder.norms), encoder.threads)

    for first, rows in encoder.blocks():
        encoder.run("batch_topk", first, rows, lists, first, ptr(threshold), keep, between=cut)
    cut(keep)
    offsets = torch.empty(encoder.n + 1, dtype=torch.int64)
    smallest = _C.lists_offsets(lists, ptr(encoder.norms), encoder.relu, ptr(offsets))
    values, indices, _ = _storage(x, int(offsets[-1]), keep)
    _C.lists_write(
        lists, encoder.relu, ptr(offsets), ptr(values), DTYPES[x.dtype], ptr(indices), keep, 0, 0.0, 0, 0,
        encoder.threads,
    )  # fmt: skip
    smallest = torch.tensor(smallest, dtype=torch.float32)
    return values, indices, offsets, smallest, encoder.aux_values, encoder.aux_indices
