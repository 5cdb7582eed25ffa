# SPDX-License-Identifier: Apache-2.0
"""The latents of a run in the formats of SAEDashboard and Neuronpedia."""

from __future__ import annotations

import gzip
import json

import pytest
from typer.testing import CliRunner

from fusae.eval import report_export
from fusae.eval.report_data import RunDirError
from fusae.eval.report_export import export_run
from fusae.testing.sample_run import contents, write_run

# What `NeuronpediaDashboardFeature` and `NeuronpediaDashboardActivation` of sae-dashboard 0.8.0 take.
FEATURE = {
    "feature_index", "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1",
    "correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson", "correlated_features_indices",
    "correlated_features_l1", "correlated_features_pearson", "neg_str", "neg_values", "pos_str", "pos_values",
    "frac_nonzero", "freq_hist_data_bar_values", "freq_hist_data_bar_heights", "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values", "n_prompts_total", "n_tokens_in_prompt", "dataset", "activations",
    "decoder_weights_dist", "vector",
}  # fmt: skip
ACTIVATION = {"bin_min", "bin_max", "bin_contains", "tokens", "values", "qualifying_token_index"}


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "My run", contents())


def rows(path):
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


def test_sae_dashboard(run, tmp_path):
    assert export_run(run, "sae-dashboard", tmp_path / "a" / "out") == tmp_path / "a" / "out"
    batch = json.loads((tmp_path / "a" / "out" / "batch-0.json").read_text(encoding="utf-8"))
    assert {name: batch[name] for name in ("model_id", "layer", "sae_set")} == {
        "model_id": "tiny-lm", "layer": 1, "sae_set": "my-run",
    }  # fmt: skip
    first, second = batch["features"]
    assert set(first) == set(second) == FEATURE
    assert first["feature_index"] == 3 and first["frac_nonzero"] == 0.012 and first["dataset"] == "a book"
    assert first["pos_str"] == [" water", "bank"] and first["pos_values"] == [4.5, 3.25]
    assert first["neg_str"] == [" the"] and first["neg_values"] == [-2.0]
    assert first["freq_hist_data_bar_heights"][20:] == [9, 4, 1]
    assert first["freq_hist_data_bar_values"][20] == 20.5 * 0.125  # the middle of the bar
    assert second["pos_str"] == second["pos_values"] == second["freq_hist_data_bar_values"] == []
    assert all(set(passage) == ACTIVATION for passage in first["activations"])
    top = first["activations"][0]
    assert top["tokens"][top["qualifying_token_index"]] == " river" and max(top["values"]) == 7.25
    assert (top["bin_min"], top["bin_max"], top["bin_contains"]) == (-1.0, 7.25, -1.0)


def test_neuronpedia(run, tmp_path, monkeypatch):
    monkeypatch.setattr(report_export, "BATCH", 1)
    folder = export_run(run, "neuronpedia", tmp_path / "out")
    assert folder == tmp_path / "out" / "tiny-lm" / "1-my-run"
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == [
        "activations/batch-0.jsonl.gz", "activations/batch-1.jsonl.gz", "features/batch-0.jsonl.gz",
        "features/batch-1.jsonl.gz", "model.jsonl", "release.jsonl", "source.jsonl", "sourceset.jsonl",
    ]  # fmt: skip
    single = {name: json.loads((folder / f"{name}.jsonl").read_text()) for name in
              ("model", "release", "source", "sourceset")}  # fmt: skip
    assert single["source"]["id"] == "1-my-run" and single["source"]["setName"] == single["sourceset"]["name"]
    assert single["sourceset"]["releaseName"] == single["release"]["name"]
    assert {single[name]["modelId"] for name in ("source", "sourceset")} == {single["model"]["id"]}
    (feature,), passages = (rows(folder / part / "batch-0.jsonl.gz") for part in ("features", "activations"))
    assert feature["index"] == "3" and feature["layer"] == "1-my-run" and feature["modelId"] == "tiny-lm"
    assert feature["topkCosSimIndices"] == [41, 9] and feature["topkCosSimValues"] == [0.512, 0.25]
    assert feature["maxActApprox"] == 7.25 and feature["pos_str"] == [" water", "bank"]
    assert not {"activations", "feature_index", "dataset"} & set(feature)
    assert len(passages) == 2 and len({passage["id"] for passage in passages}) == 2
    top = passages[0]
    assert top["maxValueTokenIndex"] == 1 and top["maxValue"] == 7.25 and top["minValue"] == 0
    assert top["index"] == "3" and len(top["tokens"]) == len(top["values"])
    (hostile,) = rows(folder / "activations" / "batch-1.jsonl.gz")
    assert "\ufffd" in hostile["tokens"] and "{{ 7 * 7 }}" in hostile["tokens"]  # half a surrogate pair was there


def test_the_same_again(run, tmp_path):
    """Same latents, same bytes, but for the time."""
    a, b = (export_run(run, "sae-dashboard", tmp_path / name) / "batch-0.json" for name in "ab")
    assert a.read_bytes() == b.read_bytes()


def test_sae_dashboard_reads_it(run, tmp_path):
    dashboard = pytest.importorskip(
        "sae_dashboard.neuronpedia.neuronpedia_dashboard", reason="sae-dashboard is not installed"
    )
    export_run(run, "sae-dashboard", tmp_path / "out")
    batch = json.loads((tmp_path / "out" / "batch-0.json").read_text(encoding="utf-8"))
    read = dashboard.NeuronpediaDashboardBatch(**batch)
    assert read.to_dict() == batch


def test_command(run, tmp_path):
    from fusae.cli import app

    done = CliRunner().invoke(app, ["report", str(run), "--export", "neuronpedia", str(tmp_path / "out")])
    assert done.exit_code == 0 and done.output.strip().endswith("1-my-run")
    assert not (run / "report.html").exists()


def test_errors(run, tmp_path):
    with pytest.raises(ValueError, match="format must be one of 'sae-dashboard', 'neuronpedia', got 'other'"):
        export_run(run, "other", tmp_path)
    (run / "features.json").write_text("[{}]")
    with pytest.raises(RunDirError, match=r"'\[0\].latent' is missing"):
        export_run(run, "neuronpedia", tmp_path)
    (run / "features.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no latents \(features.json\)"):
        export_run(run, "neuronpedia", tmp_path)
