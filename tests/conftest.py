# SPDX-License-Identifier: Apache-2.0
"""Seeds, a fixed thread count, poisoned uninitialised memory, and a word on what is not tested on this machine."""

import functools
import importlib.util
import os
import sys

# Before torch starts its threads: idle ones sleep. Spinning ones make a busy machine several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

# Without a GPU the Triton kernels are interpreted. Triton reads the variable where a kernel is defined.
if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fusae import _dispatch
from fusae.testing import CASES, Target, bench, left_out, targets
from fusae.testing.conformance import check_backward, check_forward

if _dispatch.by_name_only("triton") is not None:
    from fusae.kernels import interpreter

    interpreter.install()

POISON = {torch.uint8: 0xAB, torch.int8: -77, torch.int16: -31111, torch.int32: 2_100_000_011, torch.int64: 2**61 + 11}


@pytest.fixture(scope="module")
def small_probes():
    """The probes of the machine's rates take a second; where a test measures, their size does not matter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "probes", functools.partial(bench.probes, size=64, length=2**16))
        yield


@pytest.fixture(scope="module")
def rows(small_probes):
    """Benchmark rows of a tiny training step."""
    shape = {"n": 24, "d": 16, "m": 96, "k": 4}
    return bench.measure("train_step", **shape, rounds=2, warmup=0, memory=False, command="made by a test").rows


@pytest.fixture
def on_the_targets_device(request, monkeypatch):
    """What a test makes lies where its `target` runs: its tensors, and the generators of its numbers."""
    target = request.node.callspec.params.get("target") if hasattr(request.node, "callspec") else None
    if target is None or target.device.type == "cpu":
        yield
        return
    original = torch.Generator

    class Generator:  # a class, since torch writes `torch.Generator | None`
        def __new__(cls):
            return original(target.device)

    monkeypatch.setattr(torch, "Generator", Generator)
    with target.device:
        yield


@pytest.fixture(autouse=True)
def _fixed_start():
    torch.manual_seed(0)
    torch.set_num_threads(2)


def _poisoned(allocate):
    """`allocate` with its result filled with NaN (a large number for integers) when code of the package calls it."""

    def wrapper(*args, **kwargs):
        result = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("fusae.") and type(result) is torch.Tensor and result.device.type != "meta":
            with torch.no_grad():
                if result.is_floating_point():
                    result.fill_(torch.nan)
                elif result.dtype in POISON:
                    result.fill_(POISON[result.dtype])
        return result

    return wrapper


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory(monkeypatch):
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


# --- backends with a bug -------------------------------------------------------------------------------------------


@pytest.fixture
def planted(monkeypatch):
    """Backend "cuda" becomes the reference with one op replaced."""

    def plant(op, function):
        table = dict(_dispatch._load("reference").entries)
        table[op] = _dispatch._Entry(function, lambda *args, **kwargs: None)
        monkeypatch.setitem(_dispatch._backends, "cuda", _dispatch._Backend(None, table))
        return Target("cuda")

    return plant


@pytest.fixture
def caught_by():
    """The first case that rejects a target with a bug in an op, forward before backward; small cases first."""
    return _caught_by


def _caught_by(target, op):
    cases = sorted((c for c in CASES if op in c.raw_ops), key=lambda c: c.moved)
    checks = (check_forward,) if op.endswith(("_fwd", "rows_")) else (check_backward,)
    if op in ("decode_loss_fwd", "encode_threshold_fwd"):  # part of what it returns is for the backward pass
        checks = (check_forward, check_backward)
    for check in checks:
        for case in cases:
            for dtype in case.dtypes:
                try:
                    check(case, target, dtype)
                except (AssertionError, IndexError) as error:
                    return f"{case} {dtype}: {error}"
    return None


def pytest_report_header():
    tested = ", ".join(map(str, targets()))
    missing = [f"not tested here: {what} ({why})" for what, why in left_out().items()]
    if (triton := Target("triton")).interpreted:
        cases = [case for case in CASES if triton.too_large(case)]
        missing.append(f"triton: in the conformance suite without {len(cases)} cases of {len(CASES)} (it is "
                       f"{triton.too_large(cases[0])}), and in tests/test_triton_*.py")  # fmt: skip
    return [f"fusae targets: {tested}", *missing]
