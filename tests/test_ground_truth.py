# SPDX-License-Identifier: Apache-2.0
"""benchmarks/ground_truth.py: that both contenders of every form train alike, what is written, resumed and judged."""

import functools
import importlib
import json
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
TINY = {"rows": 2048, "d": 12, "m": 24, "k": 3}
# Few, large steps and a short window: latents die within them, and the AuxK term takes part.
FAST = {"m": 48, "batch_size": 64, "tokens": 40 * 64, "lr": 0.02, "warmup_steps": 5, "dead_window": 300, "k_aux": 6}
FORMS = ("topk", "multi-topk", "batch-topk", "relu", "jumprelu", "gated", "matryoshka", "hierarchical", "abs",
         "group-max")  # fmt: skip


@functools.cache
def script(name):
    """A script of benchmarks/, which is no package, as a module."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(autouse=True)
def few_held_out(monkeypatch):
    monkeypatch.setattr(script("ground_truth"), "HELD_OUT", 512)


@pytest.mark.parametrize("form", FORMS)
def test_both_contenders_train_alike(form):
    """In float64, where rounding does not decide which latent is found."""
    ground_truth = script("ground_truth")
    fields = {**FAST, **ground_truth.FORMS[form], "dtype": "float64"}
    if form in ("relu", "jumprelu", "gated"):
        fields.pop("k_aux")
    if form == "matryoshka":
        fields["prefixes"] = "12,24,48"
    told = ground_truth.compare(fields, TINY, seed=3)
    own, plain = told["fusae"], told["plain torch"]
    for step in ("1", "10"):
        assert own["loss"][step] == pytest.approx(plain["loss"][step], rel=1e-9)
    for measure in ("mcc", "mmcs", "fvu", "l0", "dead_fraction"):
        assert own[measure] == pytest.approx(plain[measure], rel=1e-5), measure
    assert 0.3 < own["mcc"] < 1 and own["fvu"] < 0.9


def test_all_forms_are_there_and_another_recipe_shows():
    ground_truth = script("ground_truth")
    assert tuple(ground_truth.FORMS) == FORMS
    fields = {**FAST, **ground_truth.FORMS["topk"], "dtype": "float64"}
    one = ground_truth.compare(fields, TINY, seed=3)["fusae"]
    other = ground_truth.compare({**fields, "aux_coefficient": 0.5}, TINY, seed=3)["plain torch"]
    assert abs(one["mcc"] - other["mcc"]) > 1e-4  # latents did die, and the AuxK term did take part


def run(form="topk", seed=0, own=0.95, plain=0.95, **changes):
    def contender(mcc):
        return {
            "loss": {"1": 1.0}, "seconds": 1.0, "mcc": mcc, "mmcs": 0.9, "fvu": 0.1, "l0": 3.0, "dead_fraction": 0.0
        }  # fmt: skip

    fields = {"tokens": 100, "batch_size": 10, "lr": 0.1}
    return {
        "form": form, "seed": seed, "fields": fields, "data": TINY,
        "contenders": {"fusae": contender(own), "plain torch": contender(plain)}, "command": "python x",
        "device": "a CPU", "git": "0123456789abcdef", "dirty": False, "time": "2026-01-02T00:00:00",
        "versions": {"torch": "2"}, **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("own", "told"),
    [
        ((0.95, 0.95, 0.95), "+0.0000 (at least -0.0010): reached"),
        ((0.9492, 0.9492, 0.9492), "-0.0008 (at least -0.0010): reached"),
        ((0.948, 0.948, 0.948), "-0.0020 (at least -0.0010): **missed**"),
        ((0.94, 0.95, 0.96), "+0.0000 (at least -0.0115): reached"),
        ((0.93, 0.935, 0.94), "-0.0150 (at least -0.0058): **missed**"),
        ((0.99, 0.99, 0.99), "+0.0400 (at least -0.0010): reached"),
    ],
)
def test_verdicts(own, told):
    report = script("ground_truth_report")
    assert report.verdict([run(seed=seed, own=mcc) for seed, mcc in enumerate(own)]) == told


def test_of_several_settings_the_last_count():
    report = script("ground_truth_report")
    changed = {"tokens": 200, "batch_size": 10, "lr": 0.1}
    runs = [run(), run("abs"), run(seed=1), run(own=0.9, fields=changed), run(seed=1, own=0.9, fields=changed)]
    groups = report.groups(runs)
    assert list(groups) == ["topk", "abs"]
    assert [r["fields"]["tokens"] for r in groups["topk"]] == [200, 200]
    text = "\n".join(report.section(runs, "results.json"))
    assert "| topk | 2 | 0.9500 (0.9500 – 0.9500) | 0.9000 (0.9000 – 0.9000) | -0.0500" in text and "**missed**" in text


def test_what_is_there_is_not_done_again(tmp_path, monkeypatch):
    ground_truth, results = script("ground_truth"), tmp_path / "results" / "known.json"
    asked = []

    def compare(fields, data, seed):
        asked.append((fields["form"], seed))
        return run()["contenders"]

    monkeypatch.setattr(ground_truth, "compare", compare)
    app = typer.Typer()
    app.command()(ground_truth.main)

    def invoke(*arguments):
        return CliRunner().invoke(app, [*arguments, "--out", str(results)])

    assert invoke("topk", "--seeds", "1").exit_code == 0
    done = invoke("topk", "abs", "--seeds", "2")
    assert done.exit_code == 0 and "topk: +0.0000 (at least -0.0010): reached" in done.output
    assert asked == [("topk", 0), ("topk", 1), ("abs", 0), ("abs", 1)]
    assert len(json.loads(results.read_text())["runs"]) == 4
    refused = invoke("sparse")
    assert refused.exit_code == 2 and "FORMS must be of topk" in refused.output and "got 'sparse'" in refused.output
    results.write_text("{}")
    refused = invoke("topk")
    assert refused.exit_code == 2 and "must be" in refused.output and len(asked) == 4
