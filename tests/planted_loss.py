# SPDX-License-Identifier: Apache-2.0
"""Planted bugs of `decode_loss` and `codes_from_dense`, for test_conformance_rejects.py."""

import torch

from fusae import reference

MUTANTS = {}


def mutant(op):
    def register(function):
        MUTANTS[function.__name__] = (op, function)
        return function

    return register


# --- decode_loss ----------------------------------------------------------------------------------------------------

LOSS = ("values", "indices", "offsets", "W_dec", "b_dec", "target", "prefixes", "weights", "by_rank", "need_mixed",
        "need_dots")  # fmt: skip
LOSS_BWD = ("factor", "values", "indices", "offsets", "W_dec", "mixed", "prefixes", "by_rank", "need_values", "need_W",
            "row_sparse")  # fmt: skip


def _decode_loss(change):
    return lambda *args: reference.decode_loss_fwd(*change(dict(zip(LOSS, args, strict=True))).values())


def _decode_loss_bwd(change):
    return lambda *args: reference.decode_loss_bwd(*change(dict(zip(LOSS_BWD, args, strict=True))).values())


def _shifted(prefixes):
    return [p - 1 for p in prefixes[:-1]] + prefixes[-1:]


MUTANTS["prefix_without_its_last_latent"] = (
    "decode_loss_fwd", _decode_loss(lambda a: {**a, "prefixes": _shifted(a["prefixes"])}),
)  # fmt: skip
MUTANTS["rank_taken_for_latent"] = ("decode_loss_fwd", _decode_loss(lambda a: {**a, "by_rank": False}))
MUTANTS["weights_forgotten"] = ("decode_loss_fwd", _decode_loss(lambda a: {**a, "weights": [1.0] * len(a["weights"])}))
MUTANTS["weights_in_reverse"] = ("decode_loss_fwd", _decode_loss(lambda a: {**a, "weights": a["weights"][::-1]}))
MUTANTS["target_rounded_to_the_weights"] = (
    "decode_loss_fwd", _decode_loss(lambda a: {**a, "target": a["target"].to(a["W_dec"].dtype)}),
)  # fmt: skip
MUTANTS["bias_left_out_of_the_residual"] = ("decode_loss_fwd", _decode_loss(lambda a: {**a, "b_dec": None}))
MUTANTS["latents_meet_the_wrong_prefix"] = (
    "decode_loss_bwd", _decode_loss_bwd(lambda a: {**a, "prefixes": _shifted(a["prefixes"])}),
)  # fmt: skip
MUTANTS["factor_in_half_precision"] = (
    "decode_loss_bwd", _decode_loss_bwd(lambda a: {**a, "factor": a["factor"].half().to(a["factor"].dtype)}),
)  # fmt: skip
MUTANTS["factor_forgotten"] = (
    "decode_loss_bwd", _decode_loss_bwd(lambda a: {**a, "factor": torch.ones_like(a["factor"])}),
)  # fmt: skip


@mutant("decode_loss_fwd")
def squares_of_rounded_residuals(*args):
    _, residual, mixed, dots = reference.decode_loss_fwd(*args)
    sse = []
    for p in args[6]:
        key = torch.arange(args[1].shape[1]) if args[8] else args[1]
        kept = torch.where(key < p, args[0], 0.0)
        one = reference.decode_loss_fwd(kept, *args[1:6], [args[3].shape[0]], [1.0], False, False, False)
        sse.append(one[1].to(one[0].dtype).square().sum())
    return torch.stack(sse), residual, mixed, dots


@mutant("decode_loss_fwd")
def padding_gets_no_dot(*args):
    *rest, dots = reference.decode_loss_fwd(*args)
    return *rest, dots.masked_fill(args[0] == 0, 0.0) if dots.numel() else dots


@mutant("decode_loss_fwd")
def gradient_of_the_full_residual_only(*args):
    sse, residual, mixed, dots = reference.decode_loss_fwd(*args)
    return sse, residual, residual.expand(mixed.shape).clone() if mixed.numel() else mixed, dots


# --- codes_from_dense -----------------------------------------------------------------------------------------------


def _from_dense(change):
    return lambda f, capacity: reference.codes_from_dense_fwd(*change(f, capacity))


MUTANTS["nan_taken_for_zero"] = ("codes_from_dense_fwd", _from_dense(lambda f, c: (f.nan_to_num(nan=0.0), c)))
MUTANTS["positives_only"] = ("codes_from_dense_fwd", _from_dense(lambda f, c: (f.relu(), c)))
MUTANTS["subnormals_taken_for_zero"] = (
    "codes_from_dense_fwd",
    _from_dense(lambda f, c: (f.masked_fill(f.abs() < torch.finfo(f.dtype).smallest_normal, 0.0), c)),
)
MUTANTS["dense_taken_for_contiguous"] = (
    "codes_from_dense_fwd",
    _from_dense(lambda f, c: (torch.as_strided(f, f.shape, (f.shape[1], 1)), c)),
)


@mutant("codes_from_dense_fwd")
def minus_zero_stored(f, capacity):
    return reference.codes_from_dense_fwd(torch.where(torch.signbit(f) & (f == 0), -1e-30, f).to(f.dtype), capacity)


@mutant("codes_from_dense_fwd")
def offsets_end_with_the_capacity(f, capacity):
    values, indices, offsets = reference.codes_from_dense_fwd(f, capacity)
    return values, indices, offsets if capacity is None else offsets.clamp(max=capacity)


@mutant("codes_from_dense_bwd")
def gradient_by_place_in_the_row(grad_values, indices, offsets, m):
    row = torch.repeat_interleave(offsets[:-1], offsets.diff())
    indices = indices.clone()
    indices[: len(row)] = torch.arange(len(row)) - row
    return reference.codes_from_dense_bwd(grad_values, indices, offsets, m)
