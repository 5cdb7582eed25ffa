# SPDX-License-Identifier: Apache-2.0
"""Train dictionaries of several kinds on a real model, and put what came out side by side.

    python benchmarks/forms.py --out runs/forms --results benchmarks/results/DEVICE/forms.json --page docs/forms.md
    python benchmarks/forms.py --only transcoder --only TopK --results ... --page ...   # the others: as in the file
    python benchmarks/forms.py --report --results ... --page ...                        # the page, from the file alone

Model and text are the demo's (downloaded once, 103 MB). Every dictionary is a run of `fusae.pipeline.Pipeline` with the
same tokens, held-out articles, width and number of steps; a run that is there already is not done again, one that was
stopped is gone on with. Each has its report in its own folder. The page is made from the JSON, where every run says
under ``made`` of which commit and on what machine it is.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fusae.data import default_cache_dir
from fusae.demo.config import DemoConfig
from fusae.demo.inputs import load_inputs
from fusae.formats.native import read_json, write_json
from fusae.pipeline import Pipeline
from fusae.pipeline.stages import read_settings
from fusae.testing.bench_row import environment
from fusae.train import TrainConfig

RESIDUAL = ("model.layers.11",)
MLP = ("model.layers.11.mlp:in", "model.layers.11.mlp")
LAYERS = ("model.layers.9", "model.layers.11", "model.layers.13")
MLPS = tuple(f"model.layers.{layer}.mlp{end}" for end in (":in", "") for layer in (10, 11, 12))

#: name -> (sites, fields of the training beside those that all runs share)
RUNS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "TopK": (RESIDUAL, {}),
    "BatchTopK": (RESIDUAL, {"preset": "batch-topk"}),
    # Thresholds from where about k latents fire, and a wide window: some hundred steps do not move them far.
    "JumpReLU": (
        RESIDUAL,
        {"form": "jumprelu", "penalty": "l0_mean_squared", "threshold_init": 0.1, "bandwidth": 0.05},
    ),
    "Matryoshka": (RESIDUAL, {"preset": "matryoshka"}),
    # The default weight of the L1 term: how many latents are active is up to it.
    "ReLU": (RESIDUAL, {"form": "relu", "sparsity": 0.04}),
    "Gated": (RESIDUAL, {"form": "gated", "sparsity": 0.04}),
    "AbsTopK": (RESIDUAL, {"preset": "absolute-topk"}),
    "GroupMax": (RESIDUAL, {"preset": "group-max"}),
    "hierarchical TopK": (RESIDUAL, {"preset": "hierarchical-topk"}),
    "transcoder": (MLP, {"preset": "transcoder"}),
    "skip transcoder": (MLP, {"preset": "skip-transcoder"}),
    "crosscoder": (LAYERS, {"preset": "crosscoder"}),
    # m latents in each of three layers, 3 k of them active in all. As a transcoder's, decoder rows are free and from 0.
    "cross-layer transcoder": (
        MLPS,
        {"form": "batch_topk", "architecture": "cross_layer", "unit_decoder": False, "decoder_scale": 0.0},
    ),
}
MADE = ("command", "device", "threads", "git", "dirty", "time")


def settings(name: str, demo: DemoConfig, cache: Path) -> tuple[TrainConfig, Any]:
    """What a run trains, and on what."""
    sites, fields = RUNS[name]
    shared = {
        "m": demo.m, "k": demo.k, "epochs": demo.epochs, "batch_size": demo.batch_size, "lr": demo.lr,
        "seed": demo.seed, "device": "cpu", "log_every": 10, "checkpoint_every": 100,
    }  # fmt: skip
    data = dataclasses.replace(demo.data(cache), module=sites if len(sites) > 1 else sites[0])
    return TrainConfig.from_dict({**fields, **shared}), data


def run(name: str, demo: DemoConfig, out: Path, cache: Path) -> dict[str, Any]:
    """Train and evaluate; what the page says of it."""
    train, data = settings(name, demo, cache)
    folder = out / name.replace(" ", "-").lower()
    there = (folder / "pipeline.json").exists()
    if there and (train, data.absolute()) != read_settings(folder):
        raise SystemExit(f"{folder} holds a run of other settings: take another --out, or remove it")
    given = (None, None) if there else (train, data)
    Pipeline(*given, folder, inputs=lambda: load_inputs(data, cache), resume=there).run()
    about = read_json(folder / "config.json", "a run")
    evaluation = read_json(folder / "eval.json", "an evaluation")
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return {
        "name": name, "sites": list(RUNS[name][0]), "fields": RUNS[name][1], "train": about["train"],
        **{key: evaluation[key] for key in ("fvu", "l0", "dead_latents", "latents", "tokens", "loss", "kl")},
        "steps": last["step"], "training_seconds": last["seconds"],
    }  # fmt: skip


def merged(before: dict[str, Any] | None, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`rows` and those of a results file that are of other kinds, in the order of `RUNS`."""
    kept = {}
    for row in before["runs"] if before else ():
        made = row.get("made") or {name: before[name] for name in MADE}
        kept[row["name"]] = {**row, "made": made}
    kept |= {row["name"]: row for row in rows}
    return [kept[name] for name in RUNS if name in kept]


def _made(rows: list[dict[str, Any]]) -> list[str]:
    """Commands, machines and commits of the runs, a line each."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        found.setdefault(tuple(row["made"][name] for name in MADE[:-1]), []).append(row["name"])
    lines = []
    for (command, device, threads, git, dirty), names in found.items():
        commit = f"commit {str(git)[:10]}{' with local changes' if dirty else ''}"
        lines.append(f"- {', '.join(names)}: `{command}`, on {device}, {threads} threads, {commit}")
    return lines


def page(results: dict[str, Any]) -> str:
    """The Markdown page."""
    rows = results["runs"]
    first = rows[0]
    lines = [
        "# Dictionaries of several kinds on a real model",
        "",
        "<!-- made by benchmarks/forms.py; do not edit -->",
        "",
        f"SmolLM2-135M-Instruct (4-bit GGUF) on English news: {first['train']['m']:,} latents, "
        f"k = {first['train']['k']}, {first['steps']:,} steps of {first['train']['batch_size']:,} tokens, one seed, "
        f"measured on {first['tokens']:,} tokens of held-out articles. Made with",
        "",
        *_made(rows),
        "",
        *([results["about"], ""] if results.get("about") else []),
        "A cross-layer transcoder has as many latents in each of its three layers, and three times k of them active.",
        "Settings that are not a preset's own are in `RUNS` of `benchmarks/forms.py`; thresholds and window of the",
        "JumpReLU were chosen on these data so that about k latents are active.",
        "",
        "| dictionary | at | FVU | L0 | dead | loss: model / patched / mean-ablated | loss recovered | KL recovered |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        loss, sites = row["loss"], [site.removeprefix("model.") for site in row["sites"]]
        half = len(sites) // 2
        ends = (sites[:half], sites[half:]) if "transcoder" in row["name"] else (sites,)
        where = " → ".join(", ".join(end) for end in ends)
        losses = " / ".join(f"{loss[name]:.3f}" for name in ("original", "patched", "mean_ablated"))
        lines.append(
            f"| {row['name']} | {where} | {row['fvu']:.3f} | {row['l0']:.1f} | {row['dead_latents']:,} | {losses} | "
            f"{loss['loss_recovered']:.3f} | {row['kl']['kl_recovered']:.3f} |"
        )
    lines += [
        "",
        "FVU is of the target: what the module puts out (for a transcoder, rebuilt from what goes into it; for a",
        "crosscoder, of all its layers together). The loss is in nats per token, with the target replaced by what the",
        "dictionary makes of it, at all sites of a crosscoder at once. Dead: latents active on no held-out token.",
        "These are short runs, to see the kinds work; published ones train on a thousand times as many tokens.",
        "",
    ]
    return "\n".join(lines)


def main(
    out: Annotated[Path, typer.Option(help="folder of the runs")] = Path("runs/forms"),
    results: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
    page_path: Annotated[Path | None, typer.Option("--page", help="Markdown page to write")] = None,
    only: Annotated[list[str] | None, typer.Option(help="of the kinds; default: all")] = None,
    report: Annotated[bool, typer.Option("--report", help="write the page from --results, and train nothing")] = False,
    epochs: Annotated[int, typer.Option(help="passes over the tokens")] = 4,
    quick: Annotated[bool, typer.Option("--quick", help="everything small, to see that it runs")] = False,
    cache_dir: Annotated[Path | None, typer.Option(help="for downloads and activations")] = None,
) -> None:
    demo = DemoConfig.quick() if quick else DemoConfig(epochs=epochs, latents=20)
    cache = cache_dir or default_cache_dir()
    wanted = only or list(RUNS)
    if unknown := [name for name in wanted if name not in RUNS]:
        raise SystemExit(f"only must be among {', '.join(RUNS)}, got {', '.join(unknown)}")
    before = read_json(results, "results of forms.py") if results is not None and results.exists() else None
    if report:
        if before is None:
            raise SystemExit("--report needs --results, a file that is there")
        found = before
    else:
        command = shlex.join(["python", "benchmarks/forms.py", *sys.argv[1:]])
        where = {**environment(command=command), "threads": torch.get_num_threads()}
        made = {name: where[name] for name in MADE}
        found = where
        for name in wanted:
            row = {**run(name, demo, out, cache), "made": made}
            about = {"about": before["about"]} if before and before.get("about") else {}
            found = before = {**where, **about, "runs": merged(before, [row])}
            if results is not None:
                write_json(results, found)
    text = page({**found, "runs": merged(found, [])})
    if page_path is not None:
        page_path.parent.mkdir(parents=True, exist_ok=True)
        page_path.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    typer.run(main)
