# SPDX-License-Identifier: Apache-2.0
"""benchmarks/run.py, report.py and rivals.py: what they refuse, what they write. Nothing here looks at speed."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from fusae.testing import bench, workloads

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("small_probes")
TINY = {"n": 24, "d": 16, "m": 96, "k": 4}


@functools.cache
def _script(name: str):
    """A script of benchmarks/, which is no package, as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return module


def _invoke(module, *arguments: object):
    app = typer.Typer()
    app.command()(module.main)
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def report():
    return _script("report")


def test_report_writes_the_table_and_checks_it(report, rows, tmp_path):
    readme, results = tmp_path / "README.md", tmp_path / "results" / "rows.json"
    bench.append_rows(results, rows)
    readme.write_text(f"before\n{report.START}\n{report.END}\nafter\n")
    unnamed = _invoke(report, "--check", "--readme", readme)
    assert unnamed.exit_code == 2 and "names no results file yet" in unnamed.output
    assert _invoke(report, results, "--readme", readme).exit_code == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{report.START}\n| op |") and text.endswith(f"{report.END}\nafter\n")
    assert "`results/rows.json`" in text and (rows[0].git is None or rows[0].git[:12] in text)
    assert text.count("\n| train_step | 24, 16, 96, 4 |") == len(rows)
    assert _invoke(report, "--check", "--readme", readme).exit_code == 0  # the file is found through the table
    readme.write_text(text.replace("1.00 × gemm", "0.50 × gemm"))
    stale = _invoke(report, "--check", "--readme", readme)
    assert stale.exit_code == 1 and "differs from results/rows.json" in stale.output


def _results(folder, rows):
    """Rows of every file: of two m, with memory; the parts of a step."""
    op = {"encode_topk": "torch mm + topk", "train_step": "plain torch"}
    made = []
    for m, speed in ((64, 0.5), (128, 2.0)):
        for name, plain in op.items():
            for contender, ms in (("fusae", 1.0), (plain, speed), ("gemm", 0.4)):
                made.append(dataclasses.replace(
                    rows[0], op=name, name=contender, shape={**TINY, "m": m}, p20_ms=ms, p50_ms=ms, p80_ms=ms,
                    baseline="gemm", ratio=ms / 0.4, peak_bytes=2**20, absent={"sparsify": "not installed"},
                ))  # fmt: skip
    bench.append_rows(folder / "scaling.json", made)
    bench.append_rows(folder / "ops.json", made)
    parts = [dataclasses.replace(rows[0], op="train_step_parts", name=name, baseline="step", ratio=share)
             for name, share in (("step", 1.0), ("encode_topk_fwd", 0.7), ("everything else", 0.3))]  # fmt: skip
    bench.append_rows(folder / "shares.json", parts)


def test_report_writes_pages_and_figures_and_checks_them(report, rows, tmp_path):
    pytest.importorskip("matplotlib", reason="the extra 'report' is not installed")
    readme, results = tmp_path / "README.md", tmp_path / "results"
    markers = [f"<!-- {name}:start -->\n<!-- {name}:end -->" for name in ("figure", "crossover", "benchmarks")]
    readme.write_text("\n".join(["before", *markers, "after\n"]))
    bench.append_rows(results / "bars.json", rows)
    _results(results, rows)
    done = _invoke(report, "--all", results, "--readme", readme)
    assert done.exit_code == 0, done.output
    text, page = readme.read_text(), (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "faster from m = 128 on; 0.50 × the speed of torch mm + topk at m = 64, 2.00 ×" in text
    assert "docs/figures/speedup-dark.svg" in text and "| encode_topk | 24, 16, 64, 4 |" in page
    assert "| torch mm + topk | 0.50 | 2.00 × |" in page and "Absent: sparsify (not installed)" in page
    figures = sorted(path.name for path in (tmp_path / "docs" / "figures").iterdir())
    assert figures == [f"{n}-{t}.svg" for n in ("memory", "roofline", "shares", "speedup") for t in ("dark", "light")]
    assert _invoke(report, "--check", "--readme", readme).exit_code == 0
    assert _invoke(report, "--all", results, "--check", "--readme", readme).exit_code == 0
    # Another number in the JSON: README, page and figures are behind, and --check says so of each.
    old = (results / "scaling.json").read_text()
    for quantile in ("p20", "p50", "p80"):
        old = old.replace(f'"{quantile}_ms": 0.5', f'"{quantile}_ms": 0.25')
    (results / "scaling.json").write_text(old)
    stale = _invoke(report, "--check", "--readme", readme)
    assert stale.exit_code == 1
    for name in ("README.md", "docs/benchmarks.md", "docs/figures/speedup-light.svg", "docs/figures/memory-dark.svg"):
        assert f"{name} differs from its results" in stale.output
    assert "roofline" not in stale.output


def test_compare_tells_runs_that_disagree(rows, tmp_path):
    module, first, second = _script("compare"), tmp_path / "a.json", tmp_path / "b.json"
    bench.append_rows(first, rows)
    bench.append_rows(second, rows)
    assert _invoke(module, first, second).exit_code == 0
    apart = [dataclasses.replace(r, ratio=r.ratio * 1.2) for r in rows]
    second.unlink()
    bench.append_rows(second, apart)
    done = _invoke(module, first, second)
    assert done.exit_code == 1 and "2 of fusae's ratios differ by more than 10%" in done.output
    assert _invoke(module, first, second, "--within", "0.3").exit_code == 0
    assert _invoke(module, first, tmp_path / "none.json").exit_code == 2


def test_instructions_are_read_and_flagged(tmp_path):
    module = _script("instructions")
    dump = "version: 1\ndesc: Trigger: Client Request: decode\nevents: Ir\nsummary: 1200\ntotals: 1200\n"
    (tmp_path / "callgrind.out.1").write_text(dump)
    (tmp_path / "callgrind.out").write_text("desc: Trigger: Program termination\nsummary: 0\n")
    assert module.parse(tmp_path) == {"decode": 1200}
    assert module.flagged(1050, 1000, 0.02) and module.flagged(950, 1000, 0.02) and not module.flagged(1010, 1000, 0.02)


def test_a_commit_that_is_none_is_named():
    base = _script("base")
    with pytest.raises(base.BaseError, match="finding the commit 'nowhere-at-all' failed"):
        base.commit_of("nowhere-at-all")


def test_report_keeps_the_latest_row_and_wants_its_markers(report, rows, tmp_path):
    newer = dataclasses.replace(rows[0], p20_ms=1234.0, p50_ms=1234.0, p80_ms=1234.0)
    text = report.markdown([*rows, newer], "x.json")
    assert text.count("| gemm |") == 1 and "1,234" in text
    with pytest.raises(bench.RowError, match="must hold one line"):
        report.split("no markers", tmp_path)
    with pytest.raises(bench.RowError, match="has no rows"):
        report.markdown([], "x.json")


def _rivals_file(path, speedup=8.0):
    shape = {"n": 8, "d": 4, "m": 32, "k": 2}
    row = {"work": "train_step", "shape": shape, "p50_ms": 80.0, "speedup": 1.0, "over_gemm": 9.0, "peak_bytes": 2**30}
    rows = [
        {**row, "name": "tool"},
        {**row, "name": "tool + fusae (trainer)", "p50_ms": 10.0, "speedup": speedup, "peak_bytes": None},
        {**row, "name": "gemm"},
    ]
    about = {"tool": "tool", "versions": {"tool": "1.2"}, "device": "a CPU", "isa": "avx2", "git": "0123456789abcdef"}
    path.write_text(json.dumps({"rows": rows, **about}))


def test_rivals_report_writes_the_table_and_checks_it(tmp_path):
    module = _script("rivals_report")
    readme, results = tmp_path / "README.md", tmp_path / "rivals_tool.json"
    readme.write_text(f"before\n{module.START}\n{module.END}\nafter\n")
    unnamed = _invoke(module, "--check", "--readme", readme)
    assert unnamed.exit_code == 2 and "names no results files yet" in unnamed.output
    _rivals_file(results)
    assert _invoke(module, results, "--readme", readme).exit_code == 0
    text = readme.read_text()
    row = "| tool 1.2 | training step, TopK, `accelerate(trainer)` | 8, 4, 32, 2 | 80 ms | 10 ms | **8.0 ×** "
    assert row + "| 9.00, 9.00 | 1,024, — |" in text and "commit 0123456789ab." in text
    assert text.count("\n| tool 1") == 1
    assert _invoke(module, "--check", "--readme", readme).exit_code == 0  # the file is found through the table
    _rivals_file(results, speedup=9.0)
    stale = _invoke(module, "--check", "--readme", readme)
    assert stale.exit_code == 1 and "differs from its results" in stale.output
    results.write_text("[]")
    assert "is no file of rivals_*.py" in _invoke(module, "--check", "--readme", readme).output


@pytest.mark.parametrize("name", ["report", "rivals_report"])
def test_the_readme_is_that_of_its_results(name):
    checked = _invoke(_script(name), "--check")
    assert checked.exit_code == 0, checked.output


def test_run_appends_rows_after_its_gate(tmp_path):
    out = tmp_path / "rows.json"
    shape = [f"--{key}={size}" for key, size in TINY.items()]
    options = [*shape, "--rounds=2", "--threads=1", "--no-memory", "--gate", f"--out={out}"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "run.py"), "train_step", *options],
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = bench.read_rows(out)
    assert {"gemm", "fusae", "fusae ops", "plain torch", "torch embedding_bag"} <= {row.name for row in rows}
    assert rows[0].command.startswith("python benchmarks/run.py train_step --n=24") and rows[0].threads == 1
    assert "agrees with the reference" in done.stdout
    for name, (library, _) in _script("rivals").LIBRARIES.items():
        present = importlib.util.find_spec(library) is not None
        assert (f"absent: {name}, not installed" in done.stdout) != present
        assert (name in rows[0].absent) != present
    assert rows[0].absent["torch.compile"] == "not asked for (--compiled)"


def test_run_gives_no_number_for_a_wrong_op(monkeypatch, tmp_path):
    run = _script("run")

    def wrong(*_, **__):
        raise AssertionError("decode: planted error")

    monkeypatch.setattr(run, "conform", wrong)
    monkeypatch.setattr(run, "measure", lambda *_, **__: pytest.fail("measured a wrong op"))
    done = _invoke(run, "decode", "--gate", f"--out={tmp_path / 'rows.json'}")
    assert done.exit_code == 1 and "planted error" in done.output and not (tmp_path / "rows.json").exists()


def test_run_judges_bars(rows):
    run = _script("run")
    measured = bench.Measurement(rows, {"fusae": [1.0, 2.0], "gemm": [1.0, 2.0], "plain torch": [5.0, 10.0]})
    assert "reached" in run.Bar("fusae", "gemm", 1.0).verdict(measured)
    assert "MISSED" in run.Bar("fusae", "gemm", 0.9).verdict(measured)
    assert "reached" in run.Bar("fusae", "plain torch", 4.5, speedup=True).verdict(measured)
    assert "MISSED" in run.Bar("fusae", "plain torch", 5.5, speedup=True).verdict(measured)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["encode"], "must be one of topk, encode_topk"),
        ([], "give either an op or --preset"),
        (["decode", "--preset=bars"], "give either an op or --preset"),
        (["--preset=fast"], "must be one of bars, ops, scaling"),
        (["decode", "--dtype=float8"], "must be float32, bfloat16 or float16"),
        (["decode", "--rival=fast"], "must be all, none or among"),
        (["decode", "--backend=cuda"], "no backend can run"),
        (["decode", "--k=40000"], "k must be between 1 and m"),
    ],
)
def test_run_names_a_bad_request(arguments, told):
    done = _invoke(_script("run"), *arguments)
    assert done.exit_code == 2 and told in " ".join(done.output.replace("│", " ").split())


def test_run_does_not_touch_a_foreign_file(tmp_path):
    foreign = tmp_path / "rows.json"
    foreign.write_text("{}")
    done = _invoke(_script("run"), "decode", f"--out={foreign}")
    assert done.exit_code == 2 and "must be" in done.output and foreign.read_text() == "{}"


def test_a_library_takes_the_weights_and_trains_with_them():
    rivals = _script("rivals")
    inputs = workloads.make_inputs(**TINY, batches=1)
    d, m = TINY["d"], TINY["m"]
    module = torch.nn.Sequential(torch.nn.Linear(d, m), torch.nn.ReLU(), torch.nn.Linear(m, d))
    weights = {"0.weight": inputs.W_enc, "0.bias": inputs.b_enc, "2.weight": inputs.W_dec.T, "2.bias": inputs.b_dec}
    step = rivals._step(inputs, module, weights, lambda x: (module(x) - x).square().mean())
    assert torch.equal(module[2].weight, inputs.W_dec.T)
    losses = [float(step()) for _ in range(4)]
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]
    with pytest.raises(RuntimeError, match=r"has parameters \['0.bias', .*another version of the library"):
        rivals._step(inputs, module, {"W_enc": inputs.W_enc}, lambda x: x.sum())


def test_the_page_of_kinds_is_made_from_its_results():
    results = json.loads((ROOT / "benchmarks" / "results" / "amd-epyc-2-cores" / "forms.json").read_text())
    assert (ROOT / "docs" / "forms.md").read_text() == _script("forms").page(results)
