# SPDX-License-Identifier: Apache-2.0
"""The CPU backend under pytest-benchmark: every contender of every op, each result held against float64.

``python -m pytest benchmarks/test_cpu.py --benchmark-group-by=param:op``; with ``--benchmark-autosave
--benchmark-compare`` against the run before.
"""

from __future__ import annotations

import pytest
import torch

from fusae import SparseCodes, _dispatch
from fusae.testing import assert_topk, assert_within_budget, selection_band, workloads
from fusae.testing.bench_gate import decided
from fusae.testing.ragged import assert_batch_topk, assert_threshold

SHAPE = {"n": 256, "d": 128, "m": 4096, "k": 16}
K = SHAPE["k"]


@pytest.fixture(scope="module")
def inputs() -> workloads.Inputs:
    return decided(workloads.make_inputs(**SHAPE, batches=1), K)


def _tensors(result: object) -> list[torch.Tensor]:
    parts = result if isinstance(result, tuple) else (result,)
    return [t.to_dense() if t.layout == torch.sparse_coo else t for t in parts]


def _again(op: str, name: str, inputs: workloads.Inputs, calls: int) -> list[torch.Tensor]:
    """What `calls` calls of a contender give, anew, on the reference backend."""
    call = workloads.CONTENDERS[op][name](inputs, K, "reference")
    for _ in range(calls):
        result = call()
    return _tensors(result)


def _check(op: str, name: str, result: list[torch.Tensor], inputs: workloads.Inputs, calls: int) -> None:
    exact = inputs.to(torch.float64)
    x, x64 = inputs.xs[0], exact.xs[0]
    pre = x @ inputs.W_enc.T
    if name in ("top-k step", "fusae 8-bit"):  # other work, to compare with
        return
    if name == "gemm":
        assert_within_budget(result[0], pre, x64 @ exact.W_enc.T, "gemm")
    elif op == "encode_topk":
        bias = inputs.bias
        pre64 = x64 @ exact.W_enc.T + bias.double()
        band = selection_band(pre + bias, pre64, x.dtype)
        assert_topk(pre64, result[0], result[1].int(), K, activation="relu", band=band)
    elif op == "encode_threshold":
        codes = SparseCodes(result[0], result[1].int(), len(inputs.W_enc), result[2])
        threshold = workloads.threshold_of(inputs, K)
        pre64 = x64 @ exact.W_enc.T + inputs.bias.double()
        assert_threshold(pre64, codes, threshold, band=selection_band(pre + inputs.bias, pre64, x.dtype))
    elif op == "encode_batch_topk":
        codes = SparseCodes(result[0], result[1].int(), len(inputs.W_enc), result[2])
        pre64 = x64 @ exact.W_enc.T + inputs.bias.double()
        assert_batch_topk(pre64, codes, result[3], K * len(x), band=selection_band(pre + inputs.bias, pre64, x.dtype))
    elif op == "topk":
        assert_topk(pre.double() + inputs.bias.double(), result[0], result[1].int(), K, band=1e-4)
    elif op.endswith("_step"):
        # In later steps rounding may decide a selection: only the loss.
        oracle = _again(op, "plain torch", exact, calls)[0]
        torch.testing.assert_close(result[0].double(), oracle, rtol=1e-3, atol=0)
    else:
        ours = "torch Adam(fused)" if op == "adam_rows_8bit" else "fusae"
        reference, oracle = (_again(op, ours, data, calls) for data in (inputs, exact))
        for number, (tensor, ref, wide) in enumerate(zip(result, reference, oracle, strict=True)):
            if not tensor.is_floating_point():  # latents and offsets
                assert torch.equal(tensor.long(), wide.long())
            elif name.startswith("fusae"):
                assert_within_budget(tensor, ref, wide, f"{op}, {name}, result {number}")
            else:  # the budget is for fusae; a rival has to compute the same thing
                wide = wide.detach()
                torch.testing.assert_close(tensor.double(), wide, rtol=1e-4, atol=1e-5 * float(wide.abs().max()))


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op, builders in workloads.CONTENDERS.items() for name in builders]
)
def test_cpu(benchmark, inputs, op, name):
    if name.startswith("fusae") and (reason := _dispatch.why_not("encode_topk_fwd", "cpu", static=True)):
        pytest.skip(reason)
    call, calls = workloads.CONTENDERS[op][name](inputs, K, "cpu"), 0

    def counted():
        nonlocal calls
        calls += 1
        return call()

    result = benchmark.pedantic(counted, rounds=5, warmup_rounds=1)
    _check(op, name, _tensors(result), inputs, calls)
