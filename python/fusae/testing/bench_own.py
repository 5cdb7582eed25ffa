# SPDX-License-Identifier: Apache-2.0
"""The gate for a function of somebody else: does it compute the op, at the sizes at which it is to be timed?"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..codes import SparseCodes
from . import workloads
from .bench_calls import CALLS, SIGNATURES, Function, pre_activations, threshold_of
from .bench_gate import compare_results, results
from .compare import assert_topk, assert_within_budget, selection_band
from .ragged import assert_batch_topk, assert_threshold

ROWS = 32  # of each of the two batches that are compared


def as_codes(op: str, result: Any, m: int) -> SparseCodes:
    """Codes that a function returned: `SparseCodes`, or a tuple of values, indices and (ragged ones) offsets."""
    first, *rest = result if isinstance(result, tuple) else (result,)
    if isinstance(first, SparseCodes):
        return first
    ragged = op in ("encode_threshold", "encode_batch_topk", "codes_from_dense")
    tensors = [first, *rest][: 3 if ragged else 2]
    if len(tensors) < (3 if ragged else 2) or not all(isinstance(t, Tensor) for t in tensors):
        got = ", ".join(type(t).__name__ for t in (first, *rest))
        raise AssertionError(f"{op}: the function must be {SIGNATURES[op]}, it returned ({got})")
    values, indices, *offsets = tensors
    if indices.is_floating_point() or values.shape != indices.shape:
        raise AssertionError(
            f"{op}: values and indices of one shape wanted, indices of integers; got {list(values.shape)} "
            f"{values.dtype} and {list(indices.shape)} {indices.dtype}"
        )
    return SparseCodes(values.detach(), indices.int(), m, *(t.long() for t in offsets))


def slack(inputs: workloads.Inputs, i: int = 0) -> float:
    """How far a pre-activation may be off besides: in 16-bit dtypes, by being rounded before the selection."""
    x, W = inputs.xs[i], inputs.W_enc
    if x.dtype in (torch.float32, torch.float64):
        return 0.0
    return torch.finfo(x.dtype).eps * float((x.float() @ W.float().T + inputs.bias.float()).abs().max())


def _assert_close(op: str, own: list[Tensor], reference: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    """Results in 16-bit dtypes, which a function may round where it likes: within four times what one rounding and the
    reference are off."""
    if len(own) != len(reference):
        raise AssertionError(f"{op}: {len(reference)} tensors wanted, got {len(own)}")
    for number, (a, r, o) in enumerate(zip(own, reference, exact, strict=True)):
        if a.shape != o.shape:
            raise AssertionError(f"{op}, result {number}: shape {list(o.shape)} wanted, got {list(a.shape)}")
        a, r, o = (t.detach().double() for t in (a, r, o))
        limit = 4 * (float((r - o).abs().max()) + torch.finfo(dtype).eps * float(o.abs().max()))
        error = (a - o).abs().nan_to_num(nan=torch.inf)
        if float(error.max()) > limit:
            raise AssertionError(
                f"{op}, result {number}: {int((error > limit).sum())} of {a.numel()} elements are off by more than "
                f"{limit:.3g}, the worst by {float(error.max()):.3g}"
            )


def _check_codes(op: str, function: Function, inputs: workloads.Inputs, k: int) -> None:
    exact, bias, m = inputs.to(torch.float64), inputs.bias, len(inputs.W_enc)
    wide = inputs.to(torch.promote_types(bias.dtype, torch.float32))
    threshold = threshold_of(inputs, k)
    dense = pre_activations(inputs)
    for i, x in enumerate(inputs.xs):
        pre = exact.xs[i] @ exact.W_enc.T + bias.double()
        band = selection_band(wide.xs[i] @ wide.W_enc.T + bias.to(wide.W_enc.dtype), pre, bias.dtype)
        band += slack(inputs, i)
        if op == "topk":
            codes = as_codes(op, function(dense[i], k), m)
            tie = torch.finfo(torch.float64).tiny  # which of two equal entries it takes is its own affair
            assert_topk(dense[i].double(), codes.values, codes.indices, k, band=tie, what=op)
            continue
        result = function(x, inputs.W_enc, bias, threshold if op == "encode_threshold" else k)
        codes = as_codes(op, result, m)
        if op == "encode_topk":
            assert_topk(pre, codes.values, codes.indices, k, activation="relu", band=band, what=op)
        elif op == "encode_threshold":
            assert_threshold(pre, codes, threshold, band=band)
        else:
            given = result[-1] if isinstance(result, tuple) and len(result) in (2, 4) else None
            used = codes.values[: int(codes.offsets[-1])]
            smallest = used[used > 0].min() if given is None else given
            assert_batch_topk(pre, codes, smallest, k * len(pre), band=band)


def _check_decode(function: Function, inputs: workloads.Inputs, k: int) -> None:
    exact, (reference, _) = inputs.to(torch.float64), workloads.PUBLIC["decode"]
    for codes in workloads.codes_of(inputs, k):
        wide = SparseCodes(codes.values.double(), codes.indices, codes.m)
        own = function(codes, inputs.W_dec, inputs.b_dec)
        if not isinstance(own, Tensor):
            raise AssertionError(f"decode: the function must be {SIGNATURES['decode']}, got {type(own).__name__}")
        ours = reference(codes, inputs.W_dec, inputs.b_dec, backend="reference")
        assert_within_budget(own, ours, reference(wide, exact.W_dec, exact.b_dec, backend="reference"), "decode")


def few(op: str, inputs: workloads.Inputs, k: int) -> workloads.Inputs:
    """Two batches of a few rows of the same inputs. For a gradient through a selection, without those whose k-th
    latent rounding decides; where it decides in nearly all, the eight rows where it does least."""
    inputs = dataclasses.replace(inputs, xs=[x[:ROWS].clone() for x in inputs.xs[:2]])
    if op != "encode_topk_bwd" or k == len(inputs.W_enc):
        return inputs
    exact, kept = inputs.to(torch.float64), []
    for i, (x, wide) in enumerate(zip(inputs.xs, exact.xs, strict=True)):
        top = torch.topk(wide @ exact.W_enc.T + exact.bias, k + 1).values
        gap = top[:, k - 1] - top[:, -1]
        sure = gap > max(1e-4, 8 * slack(inputs, i))
        kept.append(x[sure] if int(sure.sum()) >= 8 else x[gap.topk(min(8, len(x))).indices])
    return dataclasses.replace(inputs, xs=kept)


def check(op: str, function: Function, inputs: workloads.Inputs, k: int) -> None:
    """Raise AssertionError unless `function` computes `op` (a key of `CALLS`) on a few rows of the inputs.

    A function that raises is wrong too; the message says what it raised.
    """
    inputs = few(op, inputs, k)
    try:
        if op in ("topk", "encode_topk", "encode_threshold", "encode_batch_topk"):
            return _check_codes(op, function, inputs, k)
        if op == "decode":
            return _check_decode(function, inputs, k)
        name, ours = getattr(function, "__name__", "the function"), workloads.CONTENDERS[op]["fusae"]
        own = results(CALLS[op](function), inputs, k, "")
        if op == "codes_from_dense" and len(own) == 3:
            own = [own[0], own[1].int(), own[2].long()]
        exact = inputs.to(torch.float64)
        reference, oracle = (results(ours, data, k, "reference") for data in (inputs, exact))
        if inputs.W_enc.dtype in (torch.float32, torch.float64):
            return compare_results(op, name, own, reference, oracle)
        return _assert_close(op, own, reference, oracle, inputs.W_enc.dtype)
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"{op}: the function raised {type(error).__name__}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Difference:
    """One place at which two results differ."""

    tensor: str
    place: str
    own: float
    reference: float


def differences(op: str, function: Function, inputs: workloads.Inputs, k: int, most: int = 8) -> list[Difference]:
    """The largest differences between what a function gives and the reference, on a few rows; empty where the results
    cannot be compared place by place."""
    inputs = few(op, inputs, k)
    try:
        own = results(CALLS[op](function), inputs, k, "")
        reference = results(workloads.CONTENDERS[op]["fusae"], inputs, k, "reference")
    except Exception:
        return []
    names = ("values", "indices", "offsets", "smallest") if "encode" in op or "codes" in op or op == "topk" else ("y",)
    found: list[tuple[float, Difference]] = []
    for i, (a, b) in enumerate(zip(own, reference, strict=False)):
        if a.shape != b.shape or a.numel() == 0:
            continue
        apart = (a.detach().double() - b.detach().double()).abs().nan_to_num(nan=torch.inf).flatten()
        for at in apart.topk(min(most, apart.numel())).indices.tolist():
            if float(apart[at]) > 0:
                place = str([int(j) for j in torch.unravel_index(torch.tensor(at), a.shape)])
                name = names[i] if i < len(names) and not op.endswith("_bwd") else f"result {i}"
                pair = Difference(name, place, float(a.flatten()[at]), float(b.flatten()[at]))
                found.append((float(apart[at]) / max(1e-30, float(b.detach().double().abs().max())), pair))
    return [pair for _, pair in sorted(found, key=lambda item: -item[0])[:most]]


__all__ = ["Difference", "as_codes", "check", "differences", "few"]
