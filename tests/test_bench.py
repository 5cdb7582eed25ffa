# SPDX-License-Identifier: Apache-2.0
"""Timing, memory, rows and the benchmark scripts. Nothing here looks at how fast anything is."""

from __future__ import annotations

import gc
import json
import subprocess
from pathlib import Path

import numpy
import pytest
import torch

from fusae import BackendError, _dispatch, reference
from fusae.testing import bench, bench_gate, bench_row, bench_steps, workloads

pytestmark = pytest.mark.usefixtures("small_probes")
TINY = {"n": 24, "d": 16, "m": 96, "k": 4}


# --- timing ---------------------------------------------------------------------------------------------------------


def test_interleaved_runs_every_contender_once_a_round_and_rotates_the_order():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = bench.interleaved(calls, rounds=3, warmup=1)
    assert [len(seconds) for seconds in times.values()] == [3, 3, 3]
    turns = ["".join(order[i : i + 3]) for i in range(0, 12, 3)]
    assert turns[1:] == ["abc", "bca", "cab"]
    assert sorted(turns[0]) == ["a", "b", "c"]


def test_interleaved_leaves_the_garbage_collector_as_it_was():
    seen = []
    bench.interleaved({"a": lambda: seen.append(gc.isenabled())}, 1, 0)
    assert seen == [False] and gc.isenabled()

    def failing():
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        bench.interleaved({"a": failing}, 1, 0)
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("contenders", "rounds", "warmup", "named"),
    [
        ({}, 1, 0, "contenders"),
        ({"a": print}, 0, 0, "rounds"),
        ({"a": print}, 1.5, 0, "rounds"),
        ({"a": print}, 1, -1, "warmup"),
    ],
)
def test_interleaved_names_a_bad_argument(contenders, rounds, warmup, named):
    with pytest.raises(ValueError, match=named):
        bench.interleaved(contenders, rounds, warmup)


def test_percentiles_interpolate():
    assert bench.percentiles([4.0, 1.0, 2.0, 3.0, 5.0]) == pytest.approx((1.8, 3.0, 4.2))
    assert bench.percentiles([7.0]) == (7.0, 7.0, 7.0)


def test_ratio_is_the_median_of_the_ratios_within_rounds():
    # The machine is three times slower in the last two rounds: medians of the times would say 4 / 3.
    times = {"own": [2.0, 6.0, 4.0], "base": [1.0, 3.0, 3.0]}
    assert bench.ratio(times, "own", "base") == 2.0
    assert bench.ratio(times, "base", "base") == 1.0


# --- memory ---------------------------------------------------------------------------------------------------------


def allocate(mib: int, held: int = 0):
    """A factory for `peak_memory`: holds `held` MiB, and a call needs `mib` MiB more."""
    kept = torch.ones(held << 18)
    return lambda: torch.ones(mib << 18).sum() + kept.sum()


def test_peak_memory_counts_a_call_and_not_what_was_held_before(monkeypatch):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the high-water mark of memory can be set back on Linux only")
    monkeypatch.syspath_prepend(Path(__file__).parent)
    arguments = {"mib": 48, "held": 64}
    peak = bench.peak_memory("test_bench:allocate", arguments, warm={"mib": 1, "held": 0}, threads=1)
    assert 46 < peak / 2**20 < 60  # the kernel's count of pages is a little behind


def test_peak_memory_tells_why_it_failed(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "Traceback ...\nMemoryError: no")
    monkeypatch.setattr(bench.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match=r"(?s)measuring the memory of a:b \{'n': 1\} failed:\n.*MemoryError: no$"):
        bench.peak_memory("a:b", {"n": 1})


# --- workloads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "name"),
    [
        (op, name)
        for op, names in workloads.CONTENDERS.items()
        for name in names
        if name not in workloads.OTHER_WORK and "fusae" in names
    ],
)
def test_the_contenders_of_an_op_compute_the_same(op, name):
    inputs = bench_gate.decided(workloads.make_inputs(**TINY, dtype="float64", batches=2), TINY["k"])

    def results(contender: str) -> list[torch.Tensor]:
        call = workloads.CONTENDERS[op][contender](inputs, TINY["k"], "reference")
        for _ in range(3):
            result = call()
        result = result if isinstance(result, tuple) else (result,)
        return [(t.to_dense() if t.layout == torch.sparse_coo else t).double() for t in result]

    for own, fusae in zip(results(name), results("fusae"), strict=True):
        torch.testing.assert_close(own, fusae, rtol=1e-9, atol=1e-12)


def test_jumprelu_steps_train_the_same_thresholds(monkeypatch):
    """With a window wide enough for a few rows to have entries in it, and steps large enough to change the codes."""
    monkeypatch.setattr(bench_steps, "LR", 0.03)
    inputs = workloads.make_inputs(**TINY, dtype="float64", batches=2)

    def losses(name: str, width: float) -> torch.Tensor:
        monkeypatch.setattr(bench_steps, "BANDWIDTH", width)
        call = workloads.CONTENDERS["jumprelu_step"][name](inputs, TINY["k"], "reference")
        return torch.stack([call() for _ in range(6)])

    wide = losses("fusae", 0.2)
    torch.testing.assert_close(losses("plain torch", 0.2), wide, rtol=1e-9, atol=0)
    assert (losses("fusae", 1e-9)[-1] != wide[-1]).all()


def test_a_training_step_learns():
    inputs = workloads.make_inputs(**TINY, batches=1)
    for name in ("fusae", "fusae ops", "plain torch", "torch embedding_bag"):
        step = workloads.CONTENDERS["train_step"][name](inputs, TINY["k"], "reference")
        losses = [float(step()) for _ in range(6)]
        assert losses == sorted(losses, reverse=True), name


def test_planted_inputs_are_sparse_in_their_dictionary():
    inputs = workloads.make_inputs(64, 48, 256, 4)
    torch.testing.assert_close(inputs.W_dec.norm(dim=1), torch.ones(256))
    step = workloads.CONTENDERS["train_step"]["plain torch"](inputs, 4, "reference")
    spread = (inputs.xs[0] - inputs.b_dec).square().sum(-1).mean()
    assert float(step()) < 0.5 * float(spread)  # a random dictionary would explain next to nothing
    again = workloads.make_inputs(64, 48, 256, 4)
    assert torch.equal(inputs.xs[2], again.xs[2]) and not torch.equal(inputs.xs[0], inputs.xs[1])


def test_activations_from_a_file(tmp_path):
    x = numpy.random.default_rng(0).normal(size=(50, 16)).astype(numpy.float16)
    numpy.save(tmp_path / "x.npy", x)
    inputs = workloads.activations(tmp_path / "x.npy", 24, 16, 96)
    assert [tuple(batch.shape) for batch in inputs.xs] == [(24, 16)] * 2
    assert torch.equal(torch.cat(inputs.xs), torch.from_numpy(x[:48]).float())
    with pytest.raises(ValueError, match=r"at least n = 51 rows, got 50"):
        workloads.activations(tmp_path / "x.npy", 51, 16, 96)
    with pytest.raises(ValueError, match=r"\[rows, 8\], got \[50, 16\]"):
        workloads.activations(tmp_path / "x.npy", 24, 8, 96)


def test_bad_requests_are_named():
    with pytest.raises(ValueError, match="op must be one of topk"):
        bench.measure("encode", **TINY)
    with pytest.raises(ValueError, match="names must be among"):
        bench.measure("decode", **TINY, names=["plain torch"])
    with pytest.raises(ValueError, match="k must be between 1 and m = 96, got 97"):
        bench.measure("decode", **{**TINY, "k": 97})
    with pytest.raises(ValueError, match="backend must be one of"):
        bench.measure("decode", **TINY, backend="cuda12")
    with pytest.raises(BackendError, match="no backend can run the benchmark decode"):
        bench.measure("decode", **TINY, backend="cuda")


# --- the gate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", list(workloads.CONTENDERS))
def test_the_gate_passes_what_is_right(op, dtype):
    bench_gate.conform(op, "reference", dtype, cases=False)


@pytest.mark.parametrize(
    ("op", "raw", "spoil"),
    [
        ("encode_topk", "encode_topk_fwd", lambda out: (out[0].flip(1), *out[1:])),
        ("encode_topk", "encode_topk_fwd", lambda out: (*out[:1], out[1].roll(1, 0), *out[2:])),
        ("encode_threshold", "encode_threshold_fwd", lambda out: (out[0].flip(0), *out[1:])),
        ("encode_batch_topk", "encode_batch_topk_fwd", lambda out: (*out[:3], out[3] * 1.001, *out[4:])),
        ("decode", "decode_fwd", lambda out: out * (1 + 1e-4)),
        ("decode_loss", "decode_loss_fwd", lambda out: (out[0] * 1.001, *out[1:])),
        ("decode_loss", "decode_loss_bwd", lambda out: (out[0], out[1], out[2] * 1.001)),
        ("codes_from_dense", "codes_from_dense_fwd", lambda out: (-out[0], *out[1:])),
        ("matryoshka_step", "decode_loss_bwd", lambda out: (out[0], out[1], -out[2])),
        ("jumprelu_step", "encode_bwd", lambda out: (*out[:2], -out[2], out[3])),
        ("backward", "decode_bwd", lambda out: (out[0], out[1], out[2] * 1.001)),
        ("backward", "encode_bwd", lambda out: (*out[:3], out[3] + 1e-3)),
        ("train_step", "decode_bwd", lambda out: (torch.zeros_like(out[0]), *out[1:])),
    ],
)
def test_the_gate_stops_what_is_wrong(monkeypatch, op, raw, spoil):
    right = getattr(reference, raw)
    loaded = _dispatch._load("reference")
    planted = _dispatch._Backend(None, {
        **loaded.entries,
        raw: _dispatch._Entry(lambda *a, **kw: spoil(right(*a, **kw)), lambda *a, **kw: None),
    })  # fmt: skip
    monkeypatch.setitem(_dispatch._backends, "cpu", planted)
    with pytest.raises(AssertionError):
        bench_gate.conform(op, "cpu", cases=False)


def test_the_gate_stops_an_optimiser_that_does_nothing(monkeypatch):
    entries = dict(_dispatch._load("reference").entries)
    entries["adam_rows_"] = _dispatch._Entry(lambda *a, **kw: None, lambda *a, **kw: None)
    monkeypatch.setitem(_dispatch._backends, "cpu", _dispatch._Backend(None, entries))
    for op in ("adam_rows", "train_step"):
        with pytest.raises(AssertionError, match="adam_rows"):
            bench_gate.conform(op, "cpu", cases=False)


# --- rows -----------------------------------------------------------------------------------------------------------


def test_rows_say_what_was_measured(rows):
    by_name = {row.name: row for row in rows}
    assert {"gemm", "fusae", "plain torch"} <= set(by_name)
    assert by_name["gemm"].ratio == 1.0 and by_name["gemm"].backend is None and by_name["fusae"].backend
    assert by_name["fusae"].shape == TINY and by_name["fusae"].rounds == 2 and by_name["fusae"].data == "planted"
    assert by_name["fusae"].parameter_bytes == 4 * (2 * 96 * 16 + 96 + 16)
    assert by_name["gemm"].flops == 2 * 24 * 96 * 16
    for row in rows:  # nothing passes the rates of the machine: a tiny op is far below them
        assert 0 < row.roofline < 1 and row.peak_tflops > 0 and row.memory_gbps > 0
    for row in rows:
        assert row.tflops == pytest.approx(row.flops / row.p50_ms / 1e9)


def test_rows_survive_a_file_and_are_appended(rows, tmp_path):
    path = tmp_path / "results" / "rows.json"
    bench.append_rows(path, rows[:2])
    bench.append_rows(path, rows[2:])
    assert bench.read_rows(path) == rows
    assert [p.name for p in path.parent.iterdir()] == ["rows.json"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"p50_ms": None}, "p50_ms must not be null"),
        ({"p50_ms": "1"}, "p50_ms must be a finite number >= 0, got str '1'"),
        ({"p50_ms": float("nan")}, "p50_ms must be a finite number"),
        ({"p20_ms": 1e9}, "p20_ms <= p50_ms <= p80_ms must hold"),
        ({"threads": True}, "threads must be an integer >= 0, got bool True"),
        ({"mode": "train"}, "mode must be one of fwd, bwd, step, got 'train'"),
        ({"shape": {"n": 1, "d": 1, "m": 1}}, "shape must have exactly the keys n, d, m, k"),
        ({"shape": {"n": 0, "d": 1, "m": 1, "k": 1}}, "shape.n must be an integer >= 1"),
        ({"ratio": None}, "ratio and baseline must be given together"),
        ({"versions": {"torch": 2}}, "versions.torch must be a string"),
        ({"dirty": "no"}, "dirty must be true or false"),
        ({"speed": 1}, "speed is not a field"),
        ({"schema": 99}, "schema must be 1, got int 99"),
    ],
)
def test_a_bad_row_is_named(rows, tmp_path, change, told):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"rows": [rows[0].to_json(), {**rows[1].to_json(), **change}]}))
    with pytest.raises(bench.RowError) as caught:
        bench.read_rows(path)
    assert str(caught.value).startswith(f"{path}: rows[1]: ") and told in str(caught.value)


def test_a_missing_field_and_a_foreign_file_are_named(rows, tmp_path):
    short = rows[0].to_json()
    del short["op"]
    assert bench_row.problems(short) == ["op is missing"]
    assert bench_row.problems(3) == ["must be an object, got int 3"]
    path = tmp_path / "rows.json"
    for text, told in (("[]", r"must be \{"), ("{", "is not JSON"), ('{"rows": 1}', r"must be \{")):
        path.write_text(text)
        with pytest.raises(bench.RowError, match=told):
            bench.append_rows(path, rows)
        assert path.read_text() == text
    with pytest.raises(bench.RowError, match="no such file"):
        bench.read_rows(tmp_path / "none.json")


def test_train_step_rows_are_fusae_and_plain_torch():
    x = torch.randn(60, 16)
    made = bench.train_step_rows(**TINY, rounds=2, data=x, memory=False, warmup=0)
    assert [(row.name, row.baseline) for row in made] == [("fusae", "plain torch"), ("plain torch", "plain torch")]
    assert all(row.data == "activations.npy" and row.op == "train_step" for row in made)
