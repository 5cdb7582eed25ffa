# SPDX-License-Identifier: Apache-2.0
"""benchmarks/parity.py: what is judged, written and refused."""

import dataclasses
import functools
import importlib
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@functools.cache
def script(name):
    """A script of benchmarks/, which is no package, as a module."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


def settings():
    return script("parity_base").Settings(
        d=12, m=48, k=3, steps=50, batch_size=64, lr=0.02, warmup_steps=5, decay_start=30, dead_steps=4, aux=0.5
    )


def run(seed=0, fvu=0.2, dead=0.0, loss=1.0, **changes):
    def contender(fvu, dead, loss):
        losses = {"1": loss, "10": 0.5, "100": 0.25}
        return {"loss": losses, "fvu": fvu, "l0": 3.0, "dead_fraction": dead, "dead_in_training": 0, "mcc_to_peer": 1.0}

    return {
        "recipe": "saelens-topk", "peer": "sae-lens", "peer_version": "6", "data": "activations", "about": "rows",
        "data_sha256": "0",
        "settings": settings().told(), "seed": seed,
        "contenders": {"peer": contender(0.2, 0.0, 1.0), "fusae": contender(fvu, dead, loss)},
        "differences": ["a difference"], "command": "python benchmarks/parity.py", "device": "a CPU", "isa": "avx2",
        "git": "0123456789abcdef", "dirty": False, "time": "2026-01-02T00:00:00", "versions": {"torch": "2"}, **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "all"),
        ({"fvu": 0.2019}, "all"),
        ({"fvu": 0.2021}, "**misses** FVU"),
        ({"fvu": 0.1979}, "**misses** FVU"),
        ({"dead": 0.004}, "all"),
        ({"dead": 0.006}, "**misses** dead"),
        ({"loss": 1.00002}, "**misses** loss at step 1"),
        ({"fvu": float("nan")}, "**misses** FVU"),
    ],
)
def test_verdicts(changes, told):
    report = script("parity_report")
    assert report.verdict(report.summary([run(**changes)], "fusae")) == told


def test_a_contender_of_some_seeds_says_so():
    report, runs = script("parity_report"), [run(seed=0), run(seed=1, fvu=0.19)]
    runs[1]["contenders"]["library, nudged"] = {**runs[1]["contenders"]["peer"], "fvu": 0.21}
    assert report.summary(runs, "library, nudged")["ratios"] == [pytest.approx(1.05)]
    (line,) = [line for line in report.markdown(runs, "x.json").splitlines() if line.startswith("| library, nudged")]
    assert line.startswith("| library, nudged (1 seeds) | 0.2100") and "misses** FVU" in line
    wanted = "Seed 1, FVU × the library's and difference of the loss: *fusae* 0.9500, 0e+00 / 0e+00 / 0e+00; *libr"
    assert wanted in report.markdown(runs, "x.json") and "Seed 0, FVU" not in report.markdown(runs, "x.json")


def test_a_known_dictionary_is_judged_by_how_well_it_was_found():
    report = script("parity_report")
    runs = [run(seed, data="known", fvu=0.15) for seed in range(2)]
    for r, own, peer in zip(runs, (0.97, 0.99), (0.98, 0.99), strict=True):
        r["contenders"]["fusae"] |= {"mcc": own, "mmcs": 1.0}
        r["contenders"]["peer"] |= {"mcc": peer, "mmcs": 1.0}
    assert report.verdict(report.summary(runs, "fusae")) == "all"  # -0.005 is within two standard errors
    runs[1]["contenders"]["fusae"]["mcc"] = 0.979
    assert report.verdict(report.summary(runs, "fusae")) == "**misses** MCC"


def test_the_page_is_written_and_checked(tmp_path):
    parity = script("parity")
    app = typer.Typer()
    app.command()(parity.main)
    results, page = tmp_path / "results" / "parity.json", tmp_path / "docs" / "quality.md"
    for seed in (0, 1, 1):  # the second of seed 1 replaces the first
        parity._append(results, run(seed))
    assert len(parity.read_runs(results)) == 2
    command = [str(a) for a in ("--page", page, "--out", results)]
    assert CliRunner().invoke(app, ["--report", *command]).exit_code == 0
    text = page.read_text()
    assert "`results/parity.json`" in text and "2 seeds" in text and "- a difference" in text
    assert "| fusae | 0.2000 (0.2000 – 0.2000) | 1.0000 (1.0000 – 1.0000) |" in text
    assert CliRunner().invoke(app, ["--check", "--page", str(page)]).exit_code == 0  # finds the results by the page
    page.write_text(text.replace("1.0000", "0.9000"))
    stale = CliRunner().invoke(app, ["--check", "--page", str(page)])
    assert stale.exit_code == 2 and "differs from results/parity.json" in " ".join(stale.output.split())


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[]", "must be"), ("{", "is no JSON"), ('{"schema": 2, "runs": []}', "schema must be 1, got 2"),
        ('{"schema": 1, "runs": [{"recipe": "x"}]}', "run 0 lacks peer"),
    ],
)  # fmt: skip
def test_foreign_results_are_refused(content, told, tmp_path):
    path = tmp_path / "parity.json"
    path.write_text(content)
    with pytest.raises(script("parity_report").ReportError, match=told):
        script("parity_report").read_runs(path)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "RECIPE must be one of dictionary_learning-topk"),
        (["sparsify"], "got 'sparsify'"),
        (["saelens-topk", "--data", "x"], "--data must be one of known"),
        (["saelens-topk", "--data", "activations"], "needs --train and --held-out"),
        (["saelens-topk", "--data", "activations", "--train", "/none", "--held-out", "/none"], "/none is not there"),
        (["saelens-topk", "--dtype", "bfloat16"], "--dtype must be float32 or float64"),
        (["--report", "--page", "/none/quality.md"], "names no results file"),
    ],
)
def test_bad_requests(arguments, told):
    app = typer.Typer()
    app.command()(script("parity").main)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2 and told in " ".join(done.output.split())


def test_an_absent_library_is_named(monkeypatch):
    parity = script("parity")
    absent = dataclasses.replace(parity.RECIPES["saelens-topk"], package="no-such-library")
    monkeypatch.setitem(parity.RECIPES, "saelens-topk", absent)
    app = typer.Typer()
    app.command()(parity.main)
    done = CliRunner().invoke(app, ["saelens-topk"])
    assert done.exit_code == 2 and "no-such-library is not installed" in " ".join(done.output.split())


def test_the_page_in_the_docs_is_of_the_results():
    page = BENCHMARKS.parent / "docs" / "quality.md"
    script("parity_report").quality_page(None, page, check=True)
