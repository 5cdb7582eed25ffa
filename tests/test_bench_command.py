# SPDX-License-Identifier: Apache-2.0
"""`fusae bench`: ops, functions of one's own behind their gate, what it refuses. Nothing here looks at speed."""

import sys

import pytest
import torch
from typer.testing import CliRunner

from fusae.cli import app
from fusae.testing import bench, bench_compiled, bench_own, bench_torch, workloads

pytestmark = pytest.mark.usefixtures("small_probes")
SHAPE = ["--n", "48", "--d", "16", "--m", "96", "--k", "4"]
QUICK = [*SHAPE, "--rounds", "2", "--no-memory"]

OWN = """
import torch
from torch.nn.functional import embedding_bag, linear

def my_encode_topk(x, W_enc, b_enc, k):
    values, indices = torch.topk(linear(x, W_enc, b_enc), k)
    return values.relu(), indices

def forgets_encode_topk(x, W_enc, b_enc, k):
    values, indices = torch.topk(x @ W_enc.T, k)
    return values.relu(), indices

def broken_encode_topk(x, W_enc, b_enc, k):
    raise RuntimeError("misaligned address")

class Kernels:
    @staticmethod
    def gather(codes, W_dec, b_dec):
        return embedding_bag(codes.indices, W_dec, per_sample_weights=codes.values, mode="sum") + b_dec

number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own_kernels.py").write_text(OWN)
    yield "own_kernels"
    sys.modules.pop("own_kernels", None)


@pytest.fixture(autouse=True)
def _no_cases(monkeypatch):
    """The cases of the conformance suite have tests of their own."""
    monkeypatch.setattr("fusae.testing.bench_gate.suite", lambda *_: 0)


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def words(result):
    return " ".join(f"{result.output} {result.exception or ''}".split())


def test_an_op_gives_a_table_rows_and_a_figure(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra 'report' is not installed")
    png, json = tmp_path / "a.png", tmp_path / "a.json"
    done = run("encode_topk", *QUICK, "--m", 64, "--png", png, "--json", json)
    assert done.exit_code == 0, done.output
    assert "agrees with the reference" in done.output and "torch mm + topk" in done.output
    rows = bench.read_rows(json)
    assert {(row.name, row.shape["m"]) for row in rows} >= {("fusae", 96), ("fusae", 64), ("gemm", 96)}
    assert rows[0].command.startswith("fusae bench") and png.read_bytes().startswith(b"\x89PNG")
    assert run("encode_topk", *QUICK, "--png", tmp_path / "b.svg").exit_code == 0
    assert "<svg" in (tmp_path / "b.svg").read_text()


def test_a_function_of_ones_own_is_timed_beside_fusae(own, tmp_path):
    done = run(f"{own}:my_encode_topk", *QUICK, "--json", tmp_path / "a.json")
    assert done.exit_code == 0, done.output
    assert "computes encode_topk" in words(done)
    rows = {row.name: row for row in bench.read_rows(tmp_path / "a.json")}
    assert rows[f"{own}:my_encode_topk"].baseline == "fusae" and rows[f"{own}:my_encode_topk"].backend is None
    nested = run(f"{own}:Kernels.gather", "--op", "decode", *QUICK)
    assert nested.exit_code == 0 and "computes decode" in words(nested)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("forgets_encode_topk", "values are not the activations of the latents they name"),
        ("broken_encode_topk", "the function raised RuntimeError: misaligned address"),
    ],
)
def test_a_red_gate_says_what_differs_and_gives_no_number(own, tmp_path, function, told):
    done = run(f"{own}:{function}", *QUICK, "--json", tmp_path / "a.json")
    assert done.exit_code == 1 and "no numbers" in done.output and told in words(done)
    assert ("where it differs most" in done.output) == (function != "broken_encode_topk")
    assert "p50 ms" not in done.output and not (tmp_path / "a.json").exists()


def test_fusae_itself_passes_the_gate_first(monkeypatch):
    def wrong(*_, **__):
        raise AssertionError("decode: planted error")

    monkeypatch.setattr("fusae.testing.bench_gate.conform", wrong)
    done = run("decode", *QUICK)
    assert done.exit_code == 1 and "planted error" in done.output and "p50 ms" not in done.output


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["encode"], "OP must be one of topk, encode_topk"),
        (["decode", "--op", "decode"], "--op is for a function of yours"),
        (["nowhere_at_all:encode_topk"], "no module 'nowhere_at_all'"),
        (["own_kernels:encode_topk"], "own_kernels has no 'encode_topk'; it has Kernels, broken_encode_topk"),
        (["own_kernels:number", "--op", "decode"], "must be a function, got int"),
        (["own_kernels:Kernels.gather"], "says no op; give --op"),
        (["own_kernels:my_encode_topk", "--op", "train_step"], "--op must be one of topk"),
        (["decode", "--dtype", "float8"], "--dtype must be one of float32"),
        (["decode", "--k", "400000"], "k must be between 1 and m"),
        (["decode", "--backend", "cuda"], "no backend can run"),
    ],
)
def test_bad_requests_are_named(own, arguments, told):
    done = run(*arguments, "--rounds", "1", "--no-memory")
    assert done.exit_code != 0 and told in words(done)


# --- the gate for functions of others -------------------------------------------------------------------------------

PLAIN = [(op, name) for op, functions in bench_torch.PLAIN.items() for name in functions]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("op", "name"), PLAIN)
def test_plain_torch_passes(op, name, dtype):
    inputs = workloads.make_inputs(64, 32, 512, 8, batches=2).to(dtype)
    bench_own.check(op, bench_torch.PLAIN[op][name], inputs, 8)


@pytest.mark.parametrize(("op", "name"), PLAIN)
def test_what_is_wrong_does_not(op, name):
    """The second of two batches alone is spoilt for most; a loss and a gradient by a factor."""
    inputs, calls = workloads.make_inputs(64, 32, 512, 8, batches=2), []

    def spoilt(*given):
        result = bench_torch.PLAIN[op][name](*given)
        calls.append(1)
        if len(calls) == 1 and op in ("topk", "encode_topk", "encode_threshold", "encode_batch_topk", "decode"):
            return result
        if isinstance(result, tuple):
            return (result[0] * (1 + 1e-3), *result[1:])
        return result * (1 + 1e-3)

    with pytest.raises(AssertionError):
        bench_own.check(op, spoilt, inputs, 8)


def test_codes_of_any_spelling_are_read():
    values, indices = torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.int64)
    codes = bench_own.as_codes("encode_topk", (values, indices), 5)
    assert codes.indices.dtype == torch.int32 and bench_own.as_codes("encode_topk", codes, 5) is codes
    for given, told in ((values, "must be"), ((values, values), "indices of integers"), ((values, None), "must be")):
        with pytest.raises(AssertionError, match=told):
            bench_own.as_codes("encode_topk", given, 5)
    with pytest.raises(AssertionError, match="offsets"):
        bench_own.as_codes("encode_threshold", (values, indices), 5)


def test_what_is_compiled_computes_the_same():
    if reason := bench_compiled.missing():
        pytest.skip(reason)
    inputs = workloads.make_inputs(24, 16, 96, 4, batches=1)
    own = bench_compiled.CONTENDERS["encode_topk"]["torch.compile"](inputs, 4, "")()
    plain = workloads.CONTENDERS["encode_topk"]["torch mm + topk"](inputs, 4, "")()
    assert all(torch.equal(a, b) for a, b in zip(own, plain, strict=True))
