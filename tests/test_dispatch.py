# SPDX-License-Identifier: Apache-2.0
"""Which backend runs: the order, the reasons, requests that cannot be met, `explain` and ``python -m fusae``."""

import contextlib
import os
import re
import subprocess
import sys
import threading

import pytest
import torch

import fusae
from fusae import _dispatch
from fusae.testing import assert_equal, left_out, targets


def _names():
    return list(dict.fromkeys(t.backend for t in targets("topk_fwd")))


@pytest.fixture
def fakes(monkeypatch):
    """Backends "cuda" and "cpu" that record their calls; cuda refuses more than 10 columns, and has no topk_bwd."""
    calls = []

    def entry(name, op, why_not):
        original = _dispatch._load("reference").entries[op].run

        def run(*args, **kwargs):
            calls.append((name, op))
            return original(*args, **kwargs)

        return _dispatch._Entry(run, why_not)

    def too_wide(pre, k):
        return None if pre.shape[1] <= 10 else f"more than 10 columns ({pre.shape[1]})"

    def anything(*args, **kwargs):
        return None

    table = {
        "cuda": _dispatch._Backend(None, {"topk_fwd": entry("cuda", "topk_fwd", too_wide)}),
        "triton": _dispatch._Backend("no such device", {}),
        "cpu": _dispatch._Backend(None, {op: entry("cpu", op, anything) for op in ("topk_fwd", "topk_bwd")}),
        "reference": _dispatch._load("reference"),
    }
    monkeypatch.setattr(_dispatch, "_backends", table)
    monkeypatch.delenv("FUSAE_BACKEND", raising=False)
    return calls


def test_the_first_backend_without_a_reason_runs(fakes):
    fusae.topk(torch.zeros(2, 8), 1)
    fusae.topk(torch.zeros(2, 12), 1)
    assert fakes == [("cuda", "topk_fwd"), ("cpu", "topk_fwd")]


def test_forward_and_backward_may_run_on_different_backends(fakes):
    pre = torch.zeros(2, 8, requires_grad=True)
    fusae.topk(pre, 1).values.sum().backward()
    assert fakes == [("cuda", "topk_fwd"), ("cpu", "topk_bwd")]


@pytest.mark.parametrize("how", ["argument", "context", "environment"])
def test_a_request_runs_or_raises(fakes, monkeypatch, how):
    def run(name, width):
        pre = torch.zeros(2, width)
        if how == "argument":
            return fusae.topk(pre, 1, backend=name)
        if how == "context":
            with fusae.backend(name):
                return fusae.topk(pre, 1)
        monkeypatch.setenv("FUSAE_BACKEND", name)
        return fusae.topk(pre, 1)

    run("cpu", 8)
    assert fakes == [("cpu", "topk_fwd")]
    with pytest.raises(
        fusae.BackendError, match=r"backend 'cuda' was asked for but cannot run topk_fwd: more than 10 columns \(12\)"
    ):
        run("cuda", 12)
    with pytest.raises(fusae.BackendError, match="backend 'triton' .* cannot run topk_fwd: no such device"):
        run("triton", 8)
    with pytest.raises(ValueError, match="must be one of cuda, triton, cpu, reference, got 'tpu'"):
        run("tpu", 8)
    assert fakes == [("cpu", "topk_fwd")]


def test_a_request_holds_for_the_backward_pass(fakes):
    pre = torch.zeros(2, 8, requires_grad=True)
    with fusae.backend("cuda"):
        values = fusae.topk(pre, 1).values
    with pytest.raises(
        fusae.BackendError, match="backend 'cuda' was asked for but cannot run topk_bwd: no topk_bwd kernel"
    ):
        values.sum().backward()


def test_argument_before_context_before_environment(fakes, monkeypatch):
    monkeypatch.setenv("FUSAE_BACKEND", "triton")
    with fusae.backend("cuda"):
        with fusae.backend("reference"):
            assert _dispatch.requested() == "reference"
            assert _dispatch.requested("cpu") == "cpu"
        assert _dispatch.requested() == "cuda"
    assert _dispatch.requested() == "triton"
    monkeypatch.setenv("FUSAE_BACKEND", "")
    assert _dispatch.requested() is None


def test_a_context_ends_with_an_error_inside(fakes):
    with pytest.raises(KeyError), fusae.backend("reference"):
        raise KeyError
    assert _dispatch.requested() is None


def test_a_context_holds_for_its_own_thread(fakes):
    """Two contexts that overlap in time, left in the order they were entered: neither sees the other."""
    entered, leave = threading.Event(), threading.Event()
    seen = []

    def other():
        with fusae.backend("cpu"):
            entered.set()
            leave.wait(10)
            seen.append(_dispatch.requested())

    thread = threading.Thread(target=other)
    with fusae.backend("reference"):
        thread.start()
        entered.wait(10)
        assert _dispatch.requested() == "reference"
    leave.set()
    thread.join(10)
    assert seen == ["cpu"] and _dispatch.requested() is None


def test_a_context_inside_and_around_compiled_code(fakes):
    torch._dynamo.reset()

    def inside(pre):
        with fusae.backend("reference"):
            return fusae.topk(pre, 1).values

    pre = torch.randn(2, 8)
    compiled = torch.compile(inside, fullgraph=True, backend="eager")
    assert_equal(compiled(pre), pre.max(1, keepdim=True).values)
    assert fakes == [] and _dispatch.requested() is None
    around = torch.compile(lambda pre: fusae.topk(pre, 1).values, fullgraph=True, backend="eager")
    with fusae.backend("cpu"):
        around(pre)
    assert fakes == [("cpu", "topk_fwd")]


def test_no_backend_at_all_says_why_for_each(fakes, monkeypatch):
    def never(*args, **kwargs):
        return "closed"

    broken = {name: _dispatch._Backend(f"{name} is broken", {}) for name in ("cuda", "triton", "reference")}
    broken["cpu"] = _dispatch._Backend(None, {"topk_fwd": _dispatch._Entry(print, never)})
    monkeypatch.setattr(_dispatch, "_backends", broken)
    message = (
        "no backend can run topk_fwd: cuda: cuda is broken; triton: triton is broken; cpu: closed; "
        "reference: reference is broken"
    )
    with pytest.raises(fusae.BackendError, match=message):
        fusae.topk(torch.zeros(2, 8), 1)


def test_explain_says_what_runs_and_why_not(fakes):
    lines = fusae.explain(fusae.topk).splitlines()
    assert lines[0].split(maxsplit=2) == ["topk_fwd", "cuda", "runs"]
    assert lines[1].split(maxsplit=2) == ["topk_fwd", "triton", "no such device"]
    assert lines[2].split(maxsplit=2) == ["topk_fwd", "cpu", "can run"]
    assert lines[4].split(maxsplit=2) == ["topk_bwd", "cuda", "no topk_bwd kernel"]
    assert lines[6].split(maxsplit=2) == ["topk_bwd", "cpu", "runs"]
    particular = fusae.explain("topk_fwd", torch.zeros(2, 12), 1).splitlines()
    assert particular[0].endswith("more than 10 columns (12)") and particular[2].endswith("runs")


def test_explain_names_every_raw_op_behind_a_public_one():
    def raw(op):
        return list(dict.fromkeys(line.split()[0] for line in fusae.explain(op).splitlines()))

    assert raw(fusae.encode_topk) == raw("encode_topk") == ["encode_topk_fwd", "encode_bwd"]
    assert raw(fusae.decode) == ["decode_fwd", "decode_bwd"]
    assert raw(fusae.topk) == ["topk_fwd", "topk_bwd"]
    assert raw(fusae.adam_rows_) == ["adam_rows_"]
    assert raw("encode_bwd") == ["encode_bwd"]


@pytest.mark.parametrize("how", ["context", "environment"])
def test_explain_follows_a_request(fakes, monkeypatch, how):
    def verdicts(name):
        with contextlib.ExitStack() as stack:
            if how == "context":
                stack.enter_context(fusae.backend(name))
            else:
                monkeypatch.setenv("FUSAE_BACKEND", name)
            return [line.split(maxsplit=2)[1:] for line in fusae.explain(fusae.topk).splitlines()]

    other = "not asked for"
    assert verdicts("cpu") == 2 * [
        ["cuda", other], ["triton", other], ["cpu", "runs (asked for)"], ["reference", other]
    ]  # fmt: skip
    assert verdicts("triton")[1] == ["triton", "cannot: no such device"]
    assert verdicts("cuda")[0] == ["cuda", "runs (asked for)"]
    assert fusae.explain("topk_fwd", backend="cpu").splitlines()[2].endswith("runs (asked for)")
    assert verdicts("cuda")[4] == ["cuda", "cannot: no topk_bwd kernel"]


def test_explain_refuses_unknown_ops():
    with pytest.raises(ValueError, match="op must be one of fusae's ops, got 'sort'; raw ops: "):
        fusae.explain("sort")
    with pytest.raises(ValueError, match="got 'gelu'"):
        fusae.explain(torch.nn.functional.gelu)
    with pytest.raises(ValueError, match="got 'topk'"):
        fusae.explain(torch.topk)


def test_every_public_op_can_be_explained():
    for op in (fusae.topk, fusae.encode_topk, fusae.decode, fusae.adam_rows_):
        assert "runs" in fusae.explain(op)


def test_every_backend_says_what_it_has():
    """A table names raw ops only, and a backend that cannot run gives a reason."""
    for name in _dispatch.ORDER:
        loaded = _dispatch._load(name)
        assert set(loaded.entries) <= set(_dispatch.ops())
        assert loaded.unavailable is None or loaded.unavailable.strip()
    assert set(_dispatch._load("reference").entries) == set(_dispatch.ops())


def test_targets_and_what_is_left_out_cover_every_backend():
    covered = set(_names()) | {what.split()[0] for what in left_out()}
    assert covered == set(_dispatch.ORDER)
    assert "reference" in _names()


def test_an_automatic_choice_equals_the_same_one_by_name():
    pre = torch.randn(5, 40)
    codes = fusae.topk(pre, 3)
    assert_equal(codes.indices, fusae.topk(pre, 3, backend=_names()[0]).indices)


@pytest.mark.skipif("cpu" not in _names(), reason=left_out().get("cpu", "the cpu backend is not complete here"))
def test_the_cpu_backend_refuses_what_it_cannot_do():
    with pytest.raises(fusae.BackendError, match="float64"):
        fusae.topk(torch.zeros(2, 8, dtype=torch.float64), 1, backend="cpu")
    assert fusae.topk(torch.zeros(2, 8, dtype=torch.float64), 1).dtype == torch.float64


@pytest.mark.skipif("cpu" not in _names(), reason=left_out().get("cpu", "the cpu backend is not complete here"))
def test_cpu_instruction_sets_can_be_listed_and_forced():
    from fusae.backends import cpu

    assert "generic" in cpu.isas()
    best = cpu.isas()[0]
    for name in cpu.isas():
        with cpu.force_isa(name):
            assert name in cpu.describe()
    with pytest.raises(ValueError, match="CPU instruction set must be one of .* got 'sse9'"), cpu.force_isa("sse9"):
        pass
    assert cpu.describe().startswith(best)


def _python(*arguments, **environment):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, timeout=120)


def test_python_m_fusae_prints_the_table():
    result = _python("-m", "fusae")
    assert result.returncode == 0, result.stderr
    for word in ("fusae", "torch", "CPU", "GPU", *_dispatch.ORDER, *_dispatch.ops()):
        assert word in result.stdout
    for reason in left_out().values():
        assert reason in result.stdout


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        (
            "FUSAE_BACKEND",
            "the environment variable FUSAE_BACKEND must be one of cuda, triton, cpu, reference, got 'nonsense'",
        ),
        (
            "FUSAE_CPU_ISA",
            "the environment variable FUSAE_CPU_ISA must be one of .*generic on this machine, got 'nonsense'",
        ),
    ],
)
def test_nonsense_in_an_environment_variable_raises(variable, message):
    if variable == "FUSAE_CPU_ISA" and "cpu" not in _names():
        pytest.skip(left_out().get("cpu", "the cpu backend is not complete here"))
    code = "import torch, fusae; fusae.topk(torch.zeros(2, 8), 1)"
    result = _python("-c", code, **{variable: "nonsense"})
    assert result.returncode != 0 and re.search(message, result.stderr), result.stderr


@pytest.mark.parametrize("variable", ["FUSAE_BACKEND", "FUSAE_CPU_ISA"])
def test_python_m_fusae_shows_a_nonsense_variable(variable):
    if variable == "FUSAE_CPU_ISA" and "cpu" not in _names():
        pytest.skip(left_out().get("cpu", "the cpu backend is not complete here"))
    result = _python("-m", "fusae", **{variable: "nonsense"})
    assert result.returncode == 0, result.stderr
    assert re.search(f"the environment variable {variable} must be one of .* got 'nonsense'", result.stdout)
    assert "encode_topk_fwd" in result.stdout


def test_python_m_fusae_shows_what_is_asked_for():
    assert re.search(r"asked for +reference", _python("-m", "fusae", FUSAE_BACKEND="reference").stdout)
    assert not re.search("(?m)^asked for", _python("-m", "fusae", FUSAE_BACKEND="").stdout)


def test_an_instruction_set_cannot_be_met_without_the_native_module():
    code = (
        "import sys; sys.modules['fusae._C'] = None\n"
        "from fusae.backends import cpu; print(cpu.unavailable())\n"
    )
    reason = "the native module is missing .*; FUSAE_CPU_ISA asks for 'generic'"
    assert re.search(reason, _python("-c", code, FUSAE_CPU_ISA="generic").stdout)
    assert "FUSAE_CPU_ISA" not in _python("-c", code, FUSAE_CPU_ISA="").stdout


def test_the_environment_variable_of_the_instruction_set():
    if "cpu" not in _names():
        pytest.skip(left_out().get("cpu", "the cpu backend is not complete here"))
    code = "from fusae.backends import cpu; print(cpu.describe())"
    result = _python("-c", code, FUSAE_CPU_ISA="generic")
    assert result.stdout.startswith("generic in use"), result.stdout + result.stderr
