# SPDX-License-Identifier: Apache-2.0
"""The latents of a run in the formats that SAEDashboard and Neuronpedia read.

Field names are those of sae-dashboard 0.8.0 (`NeuronpediaDashboardBatch`) and of the folders that Neuronpedia exports
and imports (docs.neuronpedia.org, "Exports"; SAEDashboard's ``neuronpedia_export.py``).
"""

from __future__ import annotations

import datetime
import gzip
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .. import _fields
from .report_data import RunData, find, read_run

FORMATS = ("sae-dashboard", "neuronpedia")
BATCH = 256  # latents in a file
CREATOR = "clkht01d40000jv08hvalcvly"  # whom SAEDashboard's exporter names where nobody else is


def export_run(run_dir: str | Path, format: str, folder: str | Path) -> Path:
    """Write the latents that a run's features.json holds, with their passages, for another tool.

    Args:
        run_dir: the directory that training and evaluation wrote.
        format: 'sae-dashboard': ``batch-0.json``, ... as its Neuronpedia runner writes them; 'neuronpedia':
            ``MODEL/LAYER-RUN/`` with release, model, sourceset and source as ``.jsonl``, and ``features/`` and
            ``activations/`` as ``batch-0.jsonl.gz``, ..., which the admin page of a Neuronpedia imports.
        folder: where to; made if absent.

    A field for which a run has no number is left empty (neuron alignment, correlated neurons and features, histograms
    of logits; tokens promoted and suppressed where features.json has no values for them).

    Returns:
        The folder in which the files lie.

    Raises:
        FileNotFoundError, RunDirError: as `fusae.eval.report.write_report`, and where there is no features.json.
        ValueError: `format`.
    """
    _fields.choice("format", format, FORMATS)
    run = read_run(run_dir)
    if not run.features:
        raise FileNotFoundError(f"{run.path} holds no latents (features.json): `fusae eval {run.path}` writes them")
    folder = Path(folder)
    return _dashboard(run, folder) if format == "sae-dashboard" else _neuronpedia(run, folder)


def _dashboard(run: RunData, folder: Path) -> Path:
    model, layer, name = _names(run)
    folder.mkdir(parents=True, exist_ok=True)
    for i, features in enumerate(_batches(run)):
        batch = {"model_id": model, "layer": layer, "sae_set": name, "features": features}
        (folder / f"batch-{i}.json").write_text(_json(batch), encoding="utf-8")
    return folder


def _neuronpedia(run: RunData, folder: Path) -> Path:
    model, layer, name = _names(run)
    source = f"{layer}-{name}"
    made = {"creatorId": CREATOR, "createdAt": datetime.datetime.now().isoformat()}
    folder = folder / model / source
    folder.mkdir(parents=True, exist_ok=True)
    single = {
        "release": {"name": name, "description": name, "descriptionShort": name, "creatorName": "fusae",
                    "creatorNameShort": "fusae", "visibility": "PRIVATE", "urls": []},
        "model": {"id": model, "instruct": False, "displayNameShort": model, "displayName": model,
                  "updatedAt": made["createdAt"], "visibility": "PUBLIC", "owner": "", "layers": 0,
                  "neuronsPerLayer": 0, "inferenceEnabled": False},
        "sourceset": {"modelId": model, "name": name, "creatorName": "fusae", "releaseName": name, "description": name,
                      "visibility": "PRIVATE", "hasDashboards": True, "type": "", "urls": []},
        "source": {"id": source, "modelId": model, "setName": name, "visibility": "PRIVATE", "hasDashboards": True,
                   "inferenceEnabled": False, "dataset": _text(run), "num_prompts": _prompts(run)[0],
                   "num_tokens_in_prompt": _prompts(run)[1]},
    }  # fmt: skip
    for file, row in single.items():
        (folder / f"{file}.jsonl").write_text(_json(row | made) + "\n", encoding="utf-8")
    nearest = {feature["latent"]: feature.get("nearest") or [] for feature in run.features}
    common = {"modelId": model, "layer": source, **made}
    for i, features in enumerate(_batches(run)):
        rows, passages = [], []
        for feature in features:
            latent, activations = feature.pop("feature_index"), feature.pop("activations")
            for field in ("n_prompts_total", "n_tokens_in_prompt", "dataset"):
                del feature[field]
            near = nearest[latent]
            rows.append({
                **common, "index": str(latent), "sourceSetName": name,
                "maxActApprox": max((max(a["values"]) for a in activations), default=0.0), "hasVector": False,
                "topkCosSimIndices": [other["latent"] for other in near],
                "topkCosSimValues": [other["cosine"] for other in near], **feature,
            })  # fmt: skip
            for number, passage in enumerate(activations):
                values = passage["values"]
                top = max(range(len(values)), key=values.__getitem__)
                passages.append({
                    "id": f"{source}-{latent}-{number}", **common, "index": str(latent), "tokens": passage["tokens"],
                    "values": values, "maxValue": values[top], "maxValueTokenIndex": top, "minValue": min(values),
                    "binMin": passage["bin_min"], "binMax": passage["bin_max"], "binContains": passage["bin_contains"],
                    "qualifyingTokenIndex": passage["qualifying_token_index"], "dfaValues": [], "lossValues": [],
                })  # fmt: skip
        _write_rows(folder / "features" / f"batch-{i}.jsonl.gz", rows)
        _write_rows(folder / "activations" / f"batch-{i}.jsonl.gz", passages)
    return folder


def _batches(run: RunData) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(run.features), BATCH):
        yield [_feature(run, feature) for feature in run.features[start : start + BATCH]]


def _feature(run: RunData, feature: dict[str, Any]) -> dict[str, Any]:
    """One latent with the fields of `NeuronpediaDashboardFeature`."""
    promoted, suppressed = feature.get("promoted_values") or [], feature.get("suppressed_values") or []
    histogram = feature.get("histogram") or {"width": 0.0, "counts": []}
    prompts, width = _prompts(run)
    empty = ("neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1", "correlated_neurons_indices",
             "correlated_neurons_l1", "correlated_neurons_pearson", "correlated_features_indices",
             "correlated_features_l1", "correlated_features_pearson", "logits_hist_data_bar_heights",
             "logits_hist_data_bar_values", "decoder_weights_dist", "vector")  # fmt: skip
    return {
        "feature_index": feature["latent"],
        **{field: [] for field in empty},
        "neg_str": (feature.get("suppressed") or [])[: len(suppressed)],
        "neg_values": suppressed,
        "pos_str": (feature.get("promoted") or [])[: len(promoted)],
        "pos_values": promoted,
        "frac_nonzero": feature["density"],
        "freq_hist_data_bar_values": [(i + 0.5) * histogram["width"] for i in range(len(histogram["counts"]))],
        "freq_hist_data_bar_heights": histogram["counts"],
        "n_prompts_total": prompts,
        "n_tokens_in_prompt": width,
        "dataset": _text(run),
        "activations": [
            {  # as SAEDashboard marks its group of top activations
                "bin_min": -1.0, "bin_max": feature["max_value"], "bin_contains": -1.0, "tokens": passage["tokens"],
                "values": passage["values"], "qualifying_token_index": passage["peak"],
            }
            for passage in feature["passages"]
        ],
    }  # fmt: skip


def _names(run: RunData) -> tuple[str, int, str]:
    """Model, layer (the first number in the module's name; 0 where it has none) and the run's name."""
    source = (run.evaluation or {}).get("source") or {}
    model = source.get("model") or find(run.config, "model") or "model"
    module = source.get("module") or find(run.config, "module") or ""
    numbers = re.findall(r"(?:^|\.)(\d+)(?:\.|$)", str(module).partition(":")[0])
    plain = [
        re.sub(r"[^A-Za-z0-9._-]+", "-", Path(str(text)).name).strip(".-").lower()
        for text in (model, run.path.resolve())
    ]
    return plain[0] or "model", int(numbers[0]) if numbers else 0, plain[1] or "run"


def _text(run: RunData) -> str:
    source = (run.evaluation or {}).get("source") or {}
    return Path(str(source.get("text") or find(run.config, "text") or "")).name


def _prompts(run: RunData) -> tuple[int, int]:
    """(chunks, tokens in each) that were looked at, the first rounded up; 0 where the run does not say."""
    ctx, tokens = find(run.config, "ctx"), (run.evaluation or {}).get("tokens")
    return (-(-tokens // ctx), ctx) if isinstance(ctx, int) and ctx > 0 and tokens else (0, ctx or 0)


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    text = "".join(_json(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode("utf-8"), 6, mtime=0))


def _json(value: Any) -> str:
    # A token may hold half of a surrogate pair, which UTF-8 cannot carry.
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return re.sub("[\ud800-\udfff]", "\ufffd", text)
