# SPDX-License-Identifier: Apache-2.0
"""The check before a number: no speed is reported for an op that is wrong."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..codes import SparseCodes
from ..ops import decode, encode_batch_topk, encode_threshold, encode_topk
from . import workloads
from .compare import assert_equal, assert_grads, assert_topk, assert_within_budget, selection_band
from .ragged import assert_batch_topk, assert_threshold

# Small and odd: no size is a multiple of a vector or of a tile.
_SHAPE = {"n": 37, "d": 21, "m": 203, "k": 5}
_PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")


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


def _results(op: str, name: str, inputs: workloads.Inputs, backend: str, calls: int = 1) -> list[Tensor]:
    call = workloads.CONTENDERS[op][name](inputs, _SHAPE["k"], backend)
    for _ in range(calls):
        result = call()
    tensors = result if isinstance(result, tuple) else (result,)
    return [t.to_dense() if t.layout == torch.sparse_coo else t for t in tensors]


def _compare(op: str, inputs: workloads.Inputs, exact: workloads.Inputs, backend: str) -> None:
    """Every fusae contender of `op` against float64; the same contender on the reference backend sets the budget."""
    for name in workloads.CONTENDERS[op]:
        if not name.startswith("fusae"):
            continue
        calls = 3 if op in ("adam_rows", "train_step", "matryoshka_step", "jumprelu_step") else 1
        runs = [(inputs, backend), (inputs, "reference"), (exact, "reference")]
        triples = zip(*(_results(op, name, data, on, calls) for data, on in runs), strict=True)
        for what, triple in zip(_PARAMETERS, triples, strict=False):
            if not triple[0].is_floating_point():  # latents and offsets
                assert_equal(triple[0], triple[1], f"{op}, {name}")
            elif op == "backward":
                assert_grads(*triple, f"{name}: gradient of {what}")
            else:
                assert_within_budget(*triple, f"{op}, {name}, after {calls} calls")
    if op == "train_step":  # the step of the reference backend is itself the plain step
        plain = _results(op, "plain torch", exact, "reference", 3)[0]
        for name in (name for name in workloads.CONTENDERS[op] if name.startswith("fusae")):
            torch.testing.assert_close(_results(op, name, exact, "reference", 3)[0], plain, rtol=1e-9, atol=0)


def conform(op: str, backend: str, dtype: str = "float32", device: str = "cpu") -> None:
    """Raise AssertionError unless `op` on `backend` is right on a small case: within twice the reference's own error.

    For "train_step", all ops of the step are checked, then the loss after three steps.
    """
    workloads.contenders(op)
    inputs = decided(workloads.make_inputs(**_SHAPE, dtype=dtype, device=device, batches=2), _SHAPE["k"])
    exact = inputs.to(torch.float64)
    for each in ("encode_topk", "decode", "backward", "adam_rows", "train_step") if op == "train_step" else (op,):
        if each.startswith("encode"):
            _encode(each, inputs, exact, backend)
        elif each == "decode":
            _decode(inputs, exact, backend)
        else:
            _compare(each, inputs, exact, backend)
