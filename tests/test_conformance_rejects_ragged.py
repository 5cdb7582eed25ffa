# SPDX-License-Identifier: Apache-2.0
"""As test_conformance_rejects.py, for `encode_threshold`, `encode_batch_topk` and group_max."""

import pytest
import torch

from fusae import reference

MUTANTS = {}


def mutant(op):
    def register(function):
        MUTANTS[function.__name__] = (op, function)
        return function

    return register


# --- encode_threshold ------------------------------------------------------------------------------------------------


@mutant("encode_threshold_fwd")
def at_the_threshold_counts(x, W_enc, b_enc, threshold, *rest):
    return reference.encode_threshold_fwd(x, W_enc, b_enc, torch.nextafter(threshold, threshold - 1), *rest)


@mutant("encode_threshold_fwd")
def nan_dropped_by_a_comparison(x, W_enc, b_enc, threshold, norms, bandwidth, capacity):
    x = torch.where(x.isnan(), 0.0, x)
    W_enc = torch.where(W_enc.isnan(), 0.0, W_enc)
    return reference.encode_threshold_fwd(x, W_enc, b_enc, threshold, norms, bandwidth, capacity)


@mutant("encode_threshold_fwd")
def one_threshold_for_all(x, W_enc, b_enc, threshold, *rest):
    return reference.encode_threshold_fwd(x, W_enc, b_enc, threshold[:1].expand_as(threshold), *rest)


@mutant("encode_threshold_fwd")
def compared_after_rounding(x, W_enc, b_enc, threshold, *rest):
    threshold = threshold.to(x.dtype).to(threshold.dtype)
    W_enc = W_enc.bfloat16().to(W_enc.dtype)
    return reference.encode_threshold_fwd(x, W_enc, b_enc, threshold, *rest)


@mutant("encode_threshold_fwd")
def distance_from_the_threshold(x, W_enc, b_enc, threshold, *rest):
    values, indices, *others = reference.encode_threshold_fwd(x, W_enc, b_enc, threshold, *rest)
    return torch.where(values != 0, values - threshold[indices.long()], 0.0).to(values.dtype), indices, *others


@mutant("encode_threshold_fwd")
def norms_forgotten(x, W_enc, b_enc, threshold, norms, *rest):
    return reference.encode_threshold_fwd(x, W_enc, b_enc, threshold, None, *rest)


@mutant("encode_threshold_fwd")
def row_buffer_of_two_hundred(*args):
    values, indices, offsets, state, l0 = reference.encode_threshold_fwd(*args)
    rank = torch.arange(len(values)) - offsets.repeat_interleave(torch.cat([offsets.diff(), offsets.new_zeros(1)]))[
        : len(values)
    ] if int(offsets[-1]) == len(values) else torch.zeros(len(values))  # fmt: skip
    return torch.where(rank < 200, values, 0.0), indices, offsets, state, l0


@mutant("encode_threshold_fwd")
def storage_left_as_it_was(*args):
    values, indices, offsets, *others = reference.encode_threshold_fwd(*args)
    values[int(offsets[-1]) :] = torch.nan
    return values, indices, offsets, *others


@mutant("encode_threshold_fwd")
def window_closed(x, W_enc, b_enc, threshold, norms, bandwidth, capacity):
    return reference.encode_threshold_fwd(x, W_enc, b_enc, threshold, norms, bandwidth * (1 + 1e-6), capacity)


@mutant("encode_threshold_fwd")
def values_inside_the_window_below(x, W_enc, b_enc, threshold, norms, bandwidth, capacity):
    if not bandwidth:
        return reference.encode_threshold_fwd(x, W_enc, b_enc, threshold, norms, bandwidth, capacity)
    args = x, W_enc, b_enc, threshold - bandwidth / 4, norms, bandwidth, capacity
    return reference.encode_threshold_fwd(*args)


@mutant("encode_threshold_fwd")
def l0_counts_the_window(x, *args):
    values, indices, offsets, state, l0 = reference.encode_threshold_fwd(x, *args)
    return values, indices, offsets, state, offsets.diff().to(l0.dtype) if l0.numel() else l0


@mutant("encode_threshold_fwd")
def state_of_the_window_forgotten(*args):
    values, indices, offsets, state, l0 = reference.encode_threshold_fwd(*args)
    return values, indices, offsets, state & 1, l0


def _backward(change):
    def run(indices, offsets, state, grad_values, grad_l0, threshold, bandwidth, through, need):
        names = "state", "grad_values", "grad_l0", "threshold", "bandwidth", "through"
        given = dict(zip(names, (state, grad_values, grad_l0, threshold, bandwidth, through), strict=True))
        given.update(change(**given))
        return reference.encode_threshold_bwd(indices, offsets, *given.values(), need)

    return run


for _name, _change in {
    "no_gradient_for_the_threshold_from_padding": lambda state, **_: {"state": state & (state & 1) * 3},
    "l0_has_no_gradient": lambda **_: {"grad_l0": None},
    "step_of_height_one_in_the_values": lambda threshold, **_: {"threshold": torch.ones_like(threshold)},
    "half_the_bandwidth": lambda bandwidth, **_: {"bandwidth": bandwidth / 2},
    "always_straight_through": lambda **_: {"through": True},
    "never_straight_through": lambda **_: {"through": False},
    "values_of_the_window_pass_back": lambda state, **_: {"state": state | (state >> 1)},
}.items():
    MUTANTS[_name] = ("encode_threshold_bwd", _backward(_change))


@mutant("encode_threshold_bwd")
def threshold_pushed_the_wrong_way(*args):
    grad_pre, grad_threshold = reference.encode_threshold_bwd(*args)
    return grad_pre, -grad_threshold


# --- encode_batch_topk -----------------------------------------------------------------------------------------------


@mutant("encode_batch_topk_fwd")
def k_of_every_row(x, W_enc, b_enc, norms, aux_mask, k, k_aux, activation):
    parts = [
        reference.encode_batch_topk_fwd(row[None], W_enc, b_enc, norms, aux_mask, k, k_aux, activation) for row in x
    ]
    whole = reference.encode_batch_topk_fwd(x, W_enc, b_enc, norms, aux_mask, k, k_aux, activation)
    if not parts:
        return whole
    values, indices, offsets, smallest, *aux = whole
    width = torch.stack([part[2][-1] for part in parts])
    offsets = torch.cat([width.new_zeros(1), width.cumsum(0)])
    used = [torch.cat([part[i][: int(part[2][-1])] for part in parts]) for i in (0, 1)]
    padded = [torch.cat([u, u.new_zeros(len(values) - len(u))]) for u in used]
    return *padded, offsets, torch.stack([part[3] for part in parts]).min(), *aux


@mutant("encode_batch_topk_fwd")
def ties_to_the_higher_row(x, *args):
    values, indices, offsets, smallest, *aux = reference.encode_batch_topk_fwd(x.flip(0), *args)
    width = offsets.diff()
    order = torch.arange(len(width)).flip(0)
    entries = [torch.arange(int(offsets[i]), int(offsets[i + 1])) for i in order.tolist()]
    at = torch.cat([*entries, torch.arange(int(offsets[-1]), len(values))])
    offsets = torch.cat([offsets[:1], width.flip(0).cumsum(0)])
    return values[at], indices[at], offsets, smallest, *(a.flip(0) for a in aux)


@mutant("encode_batch_topk_fwd")
def prefiltered_by_four_k(x, W_enc, b_enc, norms, aux_mask, k, k_aux, activation):
    """What is beyond the 4k best of a row is never seen."""
    pre = torch.nn.functional.linear(x.double(), W_enc.double(), None if b_enc is None else b_enc.double())
    args = x, W_enc, b_enc, norms, aux_mask, k, k_aux, activation
    values, indices, offsets, *others = reference.encode_batch_topk_fwd(*args)
    wide = offsets.diff() > 4 * k
    if bool(wide.any()):
        row = torch.repeat_interleave(torch.arange(len(pre)), offsets.diff())
        values[: len(row)][wide[row]] = 0.0
    return values, indices, offsets, *others


@mutant("encode_batch_topk_fwd")
def padding_of_the_relu_stays(x, W_enc, b_enc, norms, aux_mask, k, k_aux, activation):
    values, *others = reference.encode_batch_topk_fwd(x, W_enc, b_enc, norms, aux_mask, k, k_aux, "none")
    return values.relu(), *others


@mutant("encode_batch_topk_fwd")
def norms_of_the_batch_forgotten(x, W_enc, b_enc, norms, *rest):
    return reference.encode_batch_topk_fwd(x, W_enc, b_enc, None, *rest)


@mutant("encode_batch_topk_fwd")
def smallest_is_a_value_and_not_a_score(x, W_enc, b_enc, norms, *rest):
    values, indices, offsets, smallest, *aux = reference.encode_batch_topk_fwd(x, W_enc, b_enc, norms, *rest)
    positive = values[values > 0]
    return values, indices, offsets, positive.min().to(smallest.dtype) if len(positive) else smallest, *aux


@mutant("encode_batch_topk_fwd")
def nan_of_the_batch_dropped(x, W_enc, *rest):
    x, W_enc = (torch.where(t.isnan(), 0.0, t) for t in (x, W_enc))
    return reference.encode_batch_topk_fwd(x, W_enc, *rest)


@mutant("encode_batch_topk_fwd")
def auxiliary_of_the_batch_ignores_its_mask(x, W_enc, b_enc, norms, aux_mask, *rest):
    mask = None if aux_mask is None else torch.ones_like(aux_mask)
    return reference.encode_batch_topk_fwd(x, W_enc, b_enc, norms, mask, *rest)


# --- group_max -------------------------------------------------------------------------------------------------------


def _group_max(change):
    def run(x, W_enc, b_enc, norms, aux_mask, k, k_aux, activation, select):
        args = x, W_enc, b_enc, norms, aux_mask, k, k_aux, activation, select
        result = reference.encode_topk_fwd(*args)
        return change(args, result) if select == "group_max" else result

    return run


def _sorted(args, result):
    values, indices, *aux = result
    order = torch.sort(values, dim=1, descending=True, stable=True).indices
    return values.gather(1, order), indices.gather(1, order), *aux


def _interleaved(args, result):
    """Groups of every k-th latent in place of neighbours."""
    x, W, b, norms, aux_mask, k, *_ = args
    order = torch.arange(len(W)).view(-1, k).T.reshape(-1)
    norms = None if norms is None else norms[order]
    values, indices, *_ = reference.encode_topk_fwd(
        x, W[order], None if b is None else b[order], norms, None, k, 0, *args[7:]
    )
    return values, order[indices.long()].int(), *result[2:]


MUTANTS["groups_sorted"] = ("encode_topk_fwd", _group_max(_sorted))
MUTANTS["groups_interleaved"] = ("encode_topk_fwd", _group_max(_interleaved))
MUTANTS["indices_within_the_group"] = (
    "encode_topk_fwd", _group_max(lambda args, r: (r[0], (r[1] % (len(args[1]) // args[5])).int(), *r[2:])),
)  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_is_caught(name, planted, caught_by):
    assert caught_by(planted(*MUTANTS[name]), MUTANTS[name][0]) is not None, f"no case notices: {name}"
