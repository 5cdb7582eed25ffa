# SPDX-License-Identifier: Apache-2.0
"""Every case on every backend that can run here, on every CPU instruction set, in every dtype that the case is for."""

import pytest
import torch

from fusae.testing import CASES, Case, Target, targets
from fusae.testing.conformance import accepts, check_backward, check_forward

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


def _runs(*, backward: bool):
    for case in CASES:
        if backward and case.op == "adam_rows_":
            continue
        for dtype in case.dtypes:
            ops = [op for op in case.raw_ops if backward or not op.endswith("_bwd")]
            for target in targets(*ops, gemms=case.op.startswith("encode") and not backward, interpreted=True):
                # The interpreter's float16 and bfloat16 are one code path; backward it takes up to 20 s a case.
                twice = backward and target.interpreted and dtype is torch.float16
                if target.too_large(case) is None and not twice:
                    yield pytest.param(case, target, dtype, id=f"{case}-{target}-{NAMES[dtype]}")


@pytest.mark.parametrize(("case", "target", "dtype"), list(_runs(backward=False)))
def test_forward(case: Case, target: Target, dtype: torch.dtype):
    if accepts(case, target, dtype):
        check_forward(case, target, dtype)


@pytest.mark.parametrize(("case", "target", "dtype"), list(_runs(backward=True)))
def test_backward(case: Case, target: Target, dtype: torch.dtype):
    if accepts(case, target, dtype):
        check_backward(case, target, dtype)


def test_case_names_are_unique():
    names = [str(case) for case in CASES]
    assert len(set(names)) == len(names)


def test_every_op_has_cases():
    from fusae import _dispatch

    assert {op for case in CASES for op in case.raw_ops} == set(_dispatch.ops())


def test_uninitialised_memory_of_the_package_is_poisoned():
    """The fixture of conftest.py works: what a kernel forgets to write shows as NaN or as an impossible index."""
    inside = {"torch": torch, "__name__": "fusae.backends.pretended"}
    for code in ("torch.empty(3)", "torch.empty_like(torch.zeros(3))", "torch.zeros(3).new_empty(3)"):
        assert eval(code, inside).isnan().all()
    assert (eval("torch.zeros(3).new_empty(3, dtype=torch.int32)", inside) > 10**9).all()
