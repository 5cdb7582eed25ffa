# SPDX-License-Identifier: Apache-2.0
"""The conformance cases can fail: backends with one planted bug each, of kinds seen in real kernels, are all caught.

A mutant is the reference with one raw op replaced. Its test passes when some case rejects it; a bug that gets through
means that a case is missing.
"""

import importlib.util
from pathlib import Path

import pytest
import torch

from fusae import _dispatch, reference
from fusae.testing import CASES
from fusae.testing.conformance import check_backward, check_forward

_spec = importlib.util.spec_from_file_location("planted_loss", Path(__file__).parent / "planted_loss.py")
_planted_loss = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_planted_loss)

MUTANTS = dict(_planted_loss.MUTANTS)  # of decode_loss and codes_from_dense


def mutant(op):
    def register(function):
        MUTANTS[function.__name__] = (op, function)
        return function

    return register


def _reorder(values, indices, order):
    return values.gather(1, order), indices.gather(1, order)


# --- selection ------------------------------------------------------------------------------------------------------


@mutant("topk_fwd")
def ties_to_the_higher_latent(pre, k):
    values, indices = reference.topk_fwd(pre.flip(1), k)
    return values, pre.shape[1] - 1 - indices


@mutant("topk_fwd")
def nan_dropped_by_a_comparison(pre, k):
    return reference.topk_fwd(torch.where(pre.isnan(), -torch.inf, pre), k)


@mutant("topk_fwd")
def minus_zero_below_zero(pre, k):
    key = torch.where((pre == 0) & torch.signbit(pre), -torch.finfo(pre.dtype).smallest_normal, pre)
    indices = reference.topk_fwd(key, k)[1]
    return pre.gather(1, indices.long()), indices


@mutant("topk_fwd")
def buffer_of_five_hundred_candidates(pre, k):
    """Overflow drops what comes late."""
    values, indices = reference.topk_fwd(pre[:, :500] if k <= 500 else pre, k)
    return values, indices


@mutant("topk_fwd")
def last_columns_forgotten(pre, k):
    whole = pre.shape[1] // 8 * 8
    return reference.topk_fwd(pre[:, :whole] if whole >= k else pre, k)


@mutant("topk_fwd")
def rows_taken_for_contiguous(pre, k):
    return reference.topk_fwd(torch.as_strided(pre, pre.shape, (pre.shape[1], 1)), k)


@mutant("topk_fwd")
def subnormals_flushed(pre, k):
    tiny = (pre.abs() < torch.finfo(pre.dtype).smallest_normal) & (pre != 0)
    return reference.topk_fwd(pre.masked_fill(tiny, 0.0), k)


def _pre(x, W_enc, b_enc):
    acc = reference.accumulator(x.dtype)
    return x.to(acc) @ W_enc.to(acc).T + (0 if b_enc is None else b_enc.to(acc))


def _encode(change=None, **fixed):
    def run(x, W_enc, b_enc, norms, aux_mask, k, k_aux, activation, select):
        args = dict(
            x=x, W_enc=W_enc, b_enc=b_enc, norms=norms, aux_mask=aux_mask, k=k, k_aux=k_aux, activation=activation,
            select=select,
        )  # fmt: skip
        return reference.encode_topk_fwd(**{**args, **(change(args) if change else {}), **fixed})

    return run


@mutant("encode_topk_fwd")
def selection_after_rounding(x, W_enc, b_enc, norms, aux_mask, k, k_aux, activation, select):
    values, indices, *aux = reference.encode_topk_fwd(x, W_enc, b_enc, norms, aux_mask, k, k_aux, activation, select)
    order = torch.sort(values.float(), dim=1, descending=True, stable=True).indices
    tied = torch.sort(indices.gather(1, order), dim=1, stable=True).indices
    order = order.gather(1, tied)
    order = order.gather(1, torch.sort(values.gather(1, order).float(), dim=1, descending=True, stable=True).indices)
    return *_reorder(values, indices, order), *aux


@mutant("encode_topk_fwd")
def relu_before_the_selection(x, W_enc, b_enc, norms, aux_mask, k, k_aux, activation, select):
    pre = _pre(x, W_enc, b_enc)
    pre = pre.relu() if activation == "relu" else pre
    score = (pre.abs() if select == "abs" else pre) * (1 if norms is None else norms)
    indices = torch.sort(score, dim=1, descending=True, stable=True).indices[:, :k]
    return (
        pre.gather(1, indices).to(x.dtype),
        indices.int(),
        *_encode()(x, W_enc, b_enc, norms, aux_mask, k, k_aux, activation, select)[2:],
    )


@mutant("encode_topk_fwd")
def padding_all_at_latent_zero(*args):
    values, indices, *aux = reference.encode_topk_fwd(*args)
    return values, torch.where(values == 0, 0, indices), *aux


@mutant("encode_topk_fwd")
def negative_zero_after_relu(*args):
    values, indices, *aux = reference.encode_topk_fwd(*args)
    return torch.where(values == 0, -0.0, values), indices, *aux


@mutant("encode_topk_fwd")
def bias_added_after_the_selection(x, W_enc, b_enc, norms, aux_mask, k, k_aux, activation, select):
    _, indices, *aux = reference.encode_topk_fwd(x, W_enc, None, norms, aux_mask, k, k_aux, activation, select)
    pre = _pre(x, W_enc, b_enc)
    values = pre.gather(1, indices.long())
    return (values.relu() if activation == "relu" else values).to(x.dtype), indices, *aux


MUTANTS["norms_forgotten"] = ("encode_topk_fwd", _encode(norms=None))
MUTANTS["select_abs_forgotten"] = ("encode_topk_fwd", _encode(select="topk"))
MUTANTS["activation_forgotten"] = ("encode_topk_fwd", _encode(activation="none"))
MUTANTS["half_precision_sums"] = (
    "encode_topk_fwd",
    _encode(lambda a: {"x": a["x"].bfloat16().to(a["x"].dtype), "W_enc": a["W_enc"].bfloat16().to(a["x"].dtype)}),
)


@mutant("encode_topk_fwd")
def values_multiplied_by_the_norms(x, W_enc, b_enc, norms, *rest):
    values, indices, *aux = reference.encode_topk_fwd(x, W_enc, b_enc, norms, *rest)
    return (values if norms is None else (values * norms[indices.long()]).to(values.dtype)), indices, *aux


@mutant("encode_topk_fwd")
def auxiliary_selection_excludes_the_main_one(x, W_enc, b_enc, norms, aux_mask, k, k_aux, activation, select):
    main = reference.encode_topk_fwd(x, W_enc, b_enc, norms, None, k, 0, activation, select)
    if aux_mask is None:
        return main
    mask = aux_mask.clone()
    mask[main[1].long().flatten()] = False
    return *main[:2], *reference.encode_topk_fwd(x, W_enc, b_enc, norms, mask, k, k_aux, activation, select)[2:]


@mutant("encode_topk_fwd")
def auxiliary_padding_left_unset(*args):
    values, indices, aux_values, aux_indices = reference.encode_topk_fwd(*args)
    mask = args[4]
    if mask is not None and aux_values.numel():
        aux_values = aux_values.masked_fill(~mask[aux_indices.long()], torch.nan)
    return values, indices, aux_values, aux_indices


# --- gradients ------------------------------------------------------------------------------------------------------


@mutant("topk_bwd")
def gradient_read_as_contiguous(grad_values, indices, m):
    flat = torch.as_strided(grad_values, (grad_values.untyped_storage().nbytes() // grad_values.itemsize,), (1,))
    flat = flat.repeat(grad_values.numel() // max(1, len(flat)) + 1)
    return reference.topk_bwd(flat[: grad_values.numel()].view(grad_values.shape), indices, m)


@mutant("encode_bwd")
def one_row_dropped(grad_pre, indices, *rest):
    grad_pre = grad_pre.clone()
    grad_pre[-1:] = 0.0
    return reference.encode_bwd(grad_pre, indices, *rest)


@mutant("encode_bwd")
def a_hot_latent_overflows_its_counter(grad_pre, indices, *rest):
    """Only the first 127 rows of a latent are added up."""
    hot = torch.nn.functional.one_hot(indices.long(), rest[2].shape[0]).sum(1).cumsum(0).gather(1, indices.long()) > 127
    return reference.encode_bwd(torch.where(hot, 0.0, grad_pre), indices, *rest)


@mutant("encode_bwd")
def bias_gradient_counts_rows(grad_pre, indices, offsets, x, W_enc, *rest):
    *others, grad_b = reference.encode_bwd(grad_pre, indices, offsets, x, W_enc, *rest)
    return *others, grad_b * 1.01


@mutant("encode_bwd")
def sums_in_the_dtype_of_the_weights(grad_pre, indices, offsets, x, W_enc, need_x, need_W, need_b, row_sparse):
    grad_x, rows, grad_W, grad_b = reference.encode_bwd(
        grad_pre, indices, offsets, x, W_enc, need_x, need_W, need_b, row_sparse
    )
    if need_b:
        grad_b = torch.zeros_like(grad_b)
        for g, i in zip(grad_pre, indices.long(), strict=True):
            grad_b.index_put_((i,), g.to(grad_b.dtype), accumulate=True)
    return grad_x, rows, grad_W, grad_b


@mutant("encode_bwd")
def sparse_rows_unsorted(*args):
    grad_x, rows, grad_W, grad_b = reference.encode_bwd(*args)
    return (grad_x, rows.flip(0), grad_W.flip(0), grad_b) if args[-1] else (grad_x, rows, grad_W, grad_b)


@mutant("encode_bwd")
def sparse_rows_with_padding(*args):
    grad_x, rows, grad_W, grad_b = reference.encode_bwd(*args)
    if args[-1] and args[6] and len(rows) < args[4].shape[0]:
        spare = (torch.bincount(rows, minlength=args[4].shape[0]) == 0).nonzero()[0]
        rows, order = torch.cat([rows, spare]).sort()
        grad_W = torch.cat([grad_W, torch.zeros_like(grad_W[:1] if len(grad_W) else args[4][:1])])[order]
    return grad_x, rows, grad_W, grad_b


# --- decode ---------------------------------------------------------------------------------------------------------


@mutant("decode_fwd")
def zero_times_infinity(values, indices, offsets, W_dec, b_dec):
    if offsets is not None:
        return reference.decode_fwd(values, indices, offsets, W_dec, b_dec)
    y = torch.einsum("nk,nkd->nd", values.double(), W_dec[indices.long()].double())
    return (y if b_dec is None else y + b_dec.double()).to(W_dec.dtype)


@mutant("decode_fwd")
def last_entry_of_a_ragged_row_skipped(values, indices, offsets, W_dec, b_dec):
    if offsets is not None:
        values = values.clone()
        ends = offsets[1:][offsets[1:] > offsets[:-1]] - 1
        values[ends] = 0.0
    return reference.decode_fwd(values, indices, offsets, W_dec, b_dec)


@mutant("decode_fwd")
def ragged_storage_read_to_its_end(values, indices, offsets, W_dec, b_dec):
    if offsets is not None and len(offsets) > 1:
        offsets, indices = offsets.clone(), indices.clamp(max=W_dec.shape[0] - 1)
        offsets[-1] = len(values)
    return reference.decode_fwd(values, indices, offsets, W_dec, b_dec)


@mutant("decode_fwd")
def bias_left_out_of_empty_rows(values, indices, offsets, W_dec, b_dec):
    y = reference.decode_fwd(values, indices, offsets, W_dec, b_dec)
    if offsets is not None:
        y[offsets[1:] == offsets[:-1]] = 0.0
    return y


@mutant("decode_fwd")
def last_columns_of_an_odd_width(values, indices, offsets, W_dec, b_dec):
    y = reference.decode_fwd(values, indices, offsets, W_dec, b_dec)
    y[:, W_dec.shape[1] // 8 * 8 :] = 0.0
    return y


@mutant("decode_bwd")
def padding_gets_no_value_gradient(grad_y, values, *rest):
    grad_values, rows, grad_W = reference.decode_bwd(grad_y, values, *rest)
    return (grad_values.masked_fill(values == 0, 0.0) if grad_values.numel() else grad_values), rows, grad_W


@mutant("decode_bwd")
def a_latent_overwritten_instead_of_added(grad_y, values, indices, offsets, W_dec, need_values, need_W, row_sparse):
    grad_values, rows, grad_W = reference.decode_bwd(
        grad_y, values, indices, offsets, W_dec, need_values, need_W, row_sparse
    )
    if need_W and not row_sparse and offsets is None and values.numel():
        grad_W[indices[-1].long()] = (values[-1, :, None].float() * grad_y[-1].float()).to(grad_W.dtype)
    return grad_values, rows, grad_W


# --- adam -----------------------------------------------------------------------------------------------------------


def _adam(**change):
    names = (
        "rows",
        "lr",
        "beta1",
        "beta2",
        "eps",
        "weight_decay",
        "step",
        "decoupled",
        "masked",
        "project",
        "renormalise",
    )

    def run(param, exp_avg, exp_avg_sq, grad, *rest):
        options = dict(zip(names, rest, strict=True))
        options.update({key: f(options[key]) for key, f in change.items()})
        reference.adam_rows_(param, exp_avg, exp_avg_sq, grad, *options.values())

    return run


MUTANTS["step_counted_from_zero"] = ("adam_rows_", _adam(step=lambda step: step + 1))
MUTANTS["learning_rate_off_by_one_percent"] = ("adam_rows_", _adam(lr=lambda lr: 1.01 * lr))
MUTANTS["betas_in_half_precision"] = ("adam_rows_", _adam(beta2=lambda b: float(torch.tensor(b).half())))
MUTANTS["decay_added_to_the_gradient"] = ("adam_rows_", _adam(decoupled=lambda _: False))
MUTANTS["decay_decoupled"] = ("adam_rows_", _adam(decoupled=lambda _: True))
MUTANTS["projection_forgotten"] = ("adam_rows_", _adam(project=lambda _: False))
MUTANTS["renormalisation_forgotten"] = ("adam_rows_", _adam(renormalise=lambda _: False))
MUTANTS["eps_forgotten"] = ("adam_rows_", _adam(eps=lambda _: 0.0))


@mutant("adam_rows_")
def masked_step_touches_every_row(param, exp_avg, exp_avg_sq, grad, rows, *rest):
    if rows is not None:
        full = torch.zeros(param.shape, dtype=grad.dtype, device=grad.device)
        full[rows] = grad
        grad, rows = full, torch.arange(len(param), device=grad.device)
    reference.adam_rows_(param, exp_avg, exp_avg_sq, grad, rows, *rest)


@mutant("adam_rows_")
def zero_rows_divided_by_their_length(param, exp_avg, exp_avg_sq, *rest):
    reference.adam_rows_(param, exp_avg, exp_avg_sq, *rest)
    if rest[-1]:
        param /= param.norm(dim=1, keepdim=True)


@mutant("adam_rows_")
def moments_rounded_to_the_dtype_of_the_parameter(param, exp_avg, exp_avg_sq, *rest):
    reference.adam_rows_(param, exp_avg, exp_avg_sq, *rest)
    exp_avg.copy_(exp_avg.to(param.dtype))


# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_is_caught(name, planted, caught_by):
    assert caught_by(planted(*MUTANTS[name]), MUTANTS[name][0]) is not None, f"no case notices: {name}"


@pytest.mark.parametrize("op", _dispatch.ops())
def test_the_reference_itself_is_not_caught(op, planted):
    """On one small case of each op, planted the same way."""
    target = planted(op, getattr(reference, op))
    case = min((c for c in CASES if op in c.raw_ops and 0 not in c.shape.values()), key=lambda c: c.moved)
    check_forward(case, target, torch.float32)
    if op != "adam_rows_":
        check_backward(case, target, torch.float32)
