# SPDX-License-Identifier: Apache-2.0
"""The check before a number: no speed is reported for an op that is wrong."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..codes import SparseCodes
from ..ops import decode, encode_batch_topk, encode_threshold, encode_topk, topk
from . import workloads
from .cases import CASES
from .compare import assert_equal, assert_grads, assert_topk, assert_within_budget, selection_band
from .conformance import check_backward, check_forward
from .ragged import assert_batch_topk, assert_threshold
from .targets import Target

# Small and odd: no size is a multiple of a vector or of a tile. k divides m, for groups.
_SHAPE = {"n": 37, "d": 21, "m": 205, "k": 5}
_CASE_ELEMENTS = 100_000  # of the conformance suite, the cases that move no more than this
_GRADIENTS = {
    "backward": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "encode_topk_bwd": ("x", "W_enc", "b_enc"),
    "decode_bwd": ("values", "W_dec", "b_dec"),
}
_ORDERED = ("encode_topk", "encode_threshold", "encode_batch_topk")


def decided(inputs: workloads.Inputs, k: int, gap: float = 1e-4) -> workloads.Inputs:
    """The inputs without the rows whose k-th and next pre-activation are closer than `gap`.

    Where rounding decides which latent is the k-th, two right implementations may differ; elsewhere they must agree.
    """
    exact, kept = inputs.to(torch.float64), []
    for x, wide in zip(inputs.xs, exact.xs, strict=True):
        top = torch.topk(wide @ exact.W_enc.T + exact.bias, min(k + 1, len(exact.b_enc))).values
        kept.append(x[top[:, k - 1] - top[:, -1] > gap] if top.shape[1] > k else x)
    return dataclasses.replace(inputs, xs=kept)


def _encode(op: str, inputs: workloads.Inputs, exact: workloads.Inputs, backend: str) -> None:
    bias, k = inputs.bias, _SHAPE["k"]
    pre = exact.xs[0] @ exact.W_enc.T + bias.double()
    wide = inputs.to(torch.promote_types(bias.dtype, torch.float32))
    band = selection_band(wide.xs[0] @ wide.W_enc.T + bias.to(wide.W_enc.dtype), pre, bias.dtype)
    arguments = inputs.xs[0], inputs.W_enc, bias
    if op == "encode_topk":
        codes = encode_topk(*arguments, k, backend=backend)
        assert_topk(pre, codes.values, codes.indices, k, activation="relu", band=band, what=op)
    elif op == "encode_threshold":
        threshold = workloads.threshold_of(inputs, k)
        assert_threshold(pre, encode_threshold(*arguments, threshold, backend=backend), threshold, band=band)
    else:
        codes, smallest = encode_batch_topk(*arguments, k, backend=backend)
        assert_batch_topk(pre, codes, smallest, k * len(pre), band=band)


def _decode(inputs: workloads.Inputs, exact: workloads.Inputs, backend: str) -> None:
    codes = encode_topk(inputs.xs[0], inputs.W_enc, inputs.b_enc, _SHAPE["k"], backend="reference")
    wide = SparseCodes(codes.values.double(), codes.indices, codes.m)
    results = (
        decode(codes, inputs.W_dec, inputs.b_dec, backend=backend),
        decode(codes, inputs.W_dec, inputs.b_dec, backend="reference"),
        decode(wide, exact.W_dec, exact.b_dec, backend="reference"),
    )
    assert_within_budget(*results, "decode")


def _topk(inputs: workloads.Inputs, backend: str) -> None:
    for pre in workloads.pre_activations(inputs):
        codes = topk(pre, _SHAPE["k"], backend=backend)
        assert_topk(pre.double(), codes.values, codes.indices, _SHAPE["k"], what="topk")


def results(build: workloads.Build, inputs: workloads.Inputs, k: int, backend: str, calls: int = 1) -> list[Tensor]:
    """What the last of `calls` calls gives, as dense tensors."""
    call = build(inputs, k, backend)
    for _ in range(calls):
        result = call()
    tensors = result if isinstance(result, tuple) else (result,)
    return [t.to_dense() if t.layout == torch.sparse_coo else t for t in tensors]


def _results(op: str, name: str, inputs: workloads.Inputs, backend: str, calls: int = 1) -> list[Tensor]:
    return results(workloads.CONTENDERS[op][name], inputs, _SHAPE["k"], backend, calls)


def compare_results(op: str, name: str, own: list[Tensor], reference: list[Tensor], exact: list[Tensor]) -> None:
    """Against the results of the reference in the same dtype, which sets the budget, and in float64."""
    if len(own) != len(reference):
        raise AssertionError(f"{op}, {name}: {len(reference)} tensors wanted, got {len(own)}")
    named = _GRADIENTS.get(op, ())
    for number, triple in enumerate(zip(own, reference, exact, strict=True)):
        if not triple[0].is_floating_point():  # latents and offsets
            assert_equal(triple[0], triple[1], f"{op}, {name}")
        elif named:
            assert_grads(*triple, f"{name}: gradient of {named[number]}")
        else:
            assert_within_budget(*triple, f"{op}, {name}, result {number}")


def _compare(op: str, inputs: workloads.Inputs, exact: workloads.Inputs, backend: str) -> None:
    """Every fusae contender of `op` against float64; the same contender on the reference backend sets the budget."""
    calls = 3 if workloads.MODE[op] == "step" and not op.startswith("decode_loss") else 1
    for name in workloads.CONTENDERS[op]:
        if not name.startswith("fusae") or name in workloads.OTHER_WORK:
            continue
        runs = ((inputs, backend), (inputs, "reference"), (exact, "reference"))
        compare_results(op, name, *(_results(op, name, data, on, calls) for data, on in runs))
    if op == "train_step":  # the step of the reference backend is itself the plain step
        plain = _results(op, "plain torch", exact, "reference", 3)[0]
        for name in (name for name in workloads.CONTENDERS[op] if name.startswith("fusae")):
            torch.testing.assert_close(_results(op, name, exact, "reference", 3)[0], plain, rtol=1e-9, atol=0)


def suite(op: str, backend: str, dtype: torch.dtype, device: str) -> int:
    """The small cases of the conformance suite for the raw ops that `op` is made of; how many there were."""
    target, done, wanted = Target(backend), 0, set(workloads.RAW[op])
    if target.device.type != torch.device(device).type:
        return 0
    for case in CASES:
        forward, *backward = case.raw_ops
        if forward not in wanted or dtype not in case.dtypes or case.moved > _CASE_ELEMENTS or target.too_large(case):
            continue
        check_forward(case, target, dtype)
        if backward and set(backward) <= wanted:
            check_backward(case, target, dtype)
        done += 1
    return done


def conform(op: str, backend: str, dtype: str = "float32", device: str = "cpu", *, cases: bool = True) -> None:
    """Raise AssertionError unless `op` on `backend` is right: as the benchmark calls it, within twice the reference's
    own error, and (with `cases`) on the small cases of the conformance suite.

    For "train_step", all ops of the step are checked, then the loss after three steps.
    """
    workloads.contenders(op)
    inputs = decided(workloads.make_inputs(**_SHAPE, dtype=dtype, device=device, batches=2), _SHAPE["k"])
    exact = inputs.to(torch.float64)
    for each in ("encode_topk", "decode", "backward", "adam_rows", "train_step") if op == "train_step" else (op,):
        if each in _ORDERED:
            _encode(each, inputs, exact, backend)
        elif each == "topk":
            _topk(inputs, backend)
        elif each == "decode":
            _decode(inputs, exact, backend)
        else:
            _compare(each, inputs, exact, backend)
    if cases:
        suite(op, backend, getattr(torch, dtype), device)
