# SPDX-License-Identifier: Apache-2.0
"""Train another library's dictionary and fusae's with the same data order, weights, recipe and steps, and compare.

    pip install --no-deps dictionary-learning==0.1.0     # its dependencies pin an old nnsight: only what it imports
    pip install einops nnsight==0.8.1
    pip install sae-lens==6.54.12
    pip install '.[match]'

    python benchmarks/parity.py dictionary_learning-topk --data known --out benchmarks/results/my-cpu/parity.json
    python benchmarks/parity.py saelens-topk --data activations --train runs/demo/train --held-out runs/demo/held-out
    python benchmarks/parity.py --report --out benchmarks/results/my-cpu/parity.json      # writes docs/quality.md, with
                                                                      # ground_truth.json where that lies beside it
    python benchmarks/parity.py --check                                                   # is docs/quality.md current?

A results file is ``{"schema": 1, "runs": [run, ...]}``. A run is one recipe on one data set with one seed:

=============== ======================================================================================================
``recipe``      a name in `RECIPES`; ``peer`` and ``peer_version`` are the package it is of
``data``        "known", "known-offset" or "activations"; ``about`` in words; ``data_sha256`` of the training rows
``settings``    the fields of `parity_base.Settings` that the recipe uses
``seed``        of the initial weights and of the order of the rows
``contenders``  {"peer" | "fusae" | "fusae Trainer" | "library, nudged": measures}; the last, with ``--twin``, is the
                peer from initial weights that are a rounding away
``differences`` where the two sides are not the same, in words
``command``     what was run; ``device``, ``isa``, ``versions``, ``git``, ``dirty``, ``time`` as in `fusae.testing.Row`
=============== ======================================================================================================

Measures, the same for all contenders: ``loss`` {"1", "10", "100": before the update of that step}, ``fvu`` and ``l0``
on the held-out rows by `fusae.eval`, ``dead_fraction``: share of the latents that are active (value not 0) on none of
the first `DEAD_ROWS` training rows, by the final weights; ``dead_in_training``: latents that were dead by the recipe's
own rule, mean over the steps (0: the AuxK term took no part); ``mcc_to_peer``: `fusae.eval.recovery.mcc` between the
two dictionaries; ``mcc`` and ``mmcs`` against the truth, where it is known.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import math
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import parity_dictionary_learning
import parity_saelens
import torch
import typer
from parity_base import Contender, Recipe, Settings
from parity_report import ROOT, TWIN, quality_page, read_runs
from results_file import ReportError, write_results
from rich.console import Console
from torch import Tensor

from fusae.eval import ReconstructionMetrics, recovery
from fusae.nn.init import random_unit_rows_
from fusae.testing.bench_row import environment
from fusae.testing.known import known_dictionary
from fusae.train import open_data

console = Console(width=None if sys.stdout.isatty() else 140)

RECIPES: dict[str, Recipe] = {**parity_dictionary_learning.RECIPES, **parity_saelens.RECIPES}
LOSSES_AT = (1, 10, 100)
_KNOWN = Settings(32, 64, 3, 4000, 512, 3e-3, warmup_steps=100, decay_start=3200, dead_steps=98, aux=0.0)
PRESETS = {
    "known": _KNOWN,
    "known-offset": dataclasses.replace(_KNOWN, steps=1500, decay_start=1200),
    "activations": Settings(0, 2048, 32, 200, 512, 1e-3, warmup_steps=20, decay_start=160, dead_steps=30, aux=0.0),
}
ABOUT = {
    "known": "sums of exactly 3 of 64 known directions in 32 dimensions (`fusae.testing.known`)",
    "known-offset": "sums of exactly 3 of 64 known directions in 32 dimensions (`fusae.testing.known`), plus a "
    "constant vector 10 times as long as the spread of the rows",
}
#: training rows that the dead fraction is counted on
DEAD_ROWS = 32_768


@dataclasses.dataclass(frozen=True)
class Data:
    train: Tensor  #: [n, d]
    held_out: Tensor  #: [h, d]
    truth: Tensor | None = None  #: [m, d]


def load(name: str, train: Path | None, held_out: Path | None) -> Data:
    """The data set of that name; `train` and `held_out` are what `fusae.train.open_data` takes, for "activations"."""
    if name == "activations":
        if train is None or held_out is None:
            raise ValueError("--data activations needs --train and --held-out: a .npy file or a folder of activations")
        rows = [open_data(path).take(slice(None)).float() for path in (train, held_out)]
        return Data(*rows)
    rows, truth = known_dictionary(140_000, offset=10.0 if name == "known-offset" else 0.0)
    return Data(rows[:131_072], rows[131_072:], truth)


def batches(rows: Tensor, settings: Settings, seed: int) -> Iterator[Tensor]:
    """The batches of all contenders: whole batches of a new permutation in every pass."""
    generator = torch.Generator().manual_seed(seed)
    done = 0
    while True:
        for chosen in torch.randperm(len(rows), generator=generator).split(settings.batch_size):
            if len(chosen) == settings.batch_size:
                yield rows[chosen]
                done += 1
                if done == settings.steps:
                    return


@torch.no_grad()
def measure(contender: Contender, data: Data, settings: Settings, losses: list[float]) -> dict[str, Any]:
    def over(rows: Tensor) -> dict[str, Any]:
        metrics = ReconstructionMetrics(settings.m)
        for x in rows.split(2048):
            codes = contender.encode(x)
            metrics.update(x, contender.decode(codes), codes)
        return metrics.result()

    held_out = over(data.held_out)
    measured = {
        "loss": {str(step): losses[step - 1] for step in LOSSES_AT if step <= len(losses)},
        "fvu": held_out["fvu"],
        "l0": held_out["l0"],
        "dead_fraction": over(data.train[:DEAD_ROWS])["dead_fraction"],
    }
    if data.truth is not None:
        measured["mcc"] = recovery.mcc(contender.directions, data.truth)
        measured["mmcs"] = recovery.mmcs(contender.directions, data.truth)
    return measured


def nudged(start: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Weights of which half are moved to the next number of their dtype: as far away as rounding takes one."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.where(
            torch.rand(value.shape, generator=generator) < 0.5, value.nextafter(value.new_tensor(torch.inf)), value
        )
        for name, value in start.items()
    }


def compare(recipe: Recipe, data: Data, settings: Settings, seed: int, twin: bool = False) -> dict[str, dict[str, Any]]:
    """Train all contenders of a recipe in turns, batch by batch, and measure them."""
    first = next(batches(data.train, settings, seed))
    rows = random_unit_rows_(torch.empty(settings.m, settings.d, dtype=first.dtype), seed)
    start = recipe.start(settings, rows, first)
    contenders = {"peer": recipe.peer, **recipe.own}
    contenders = {name: build(settings, start) for name, build in contenders.items()}
    if twin:
        contenders[TWIN] = recipe.peer(settings, nudged(start, seed))
    losses: dict[str, list[float]] = {name: [] for name in contenders}
    dead = dict.fromkeys(contenders, 0)
    for i, x in enumerate(batches(data.train, settings, seed)):
        rates = {name: contender.lr for name, contender in contenders.items()}
        if not all(math.isclose(rate, rates["peer"], rel_tol=1e-6, abs_tol=1e-12) for rate in rates.values()):
            raise RuntimeError(f"step {i}: the learning rates differ: {rates}; another version of the library?")
        for name, contender in contenders.items():
            losses[name].append(contender.step(x))
            dead[name] += contender.dead
    measured = {name: measure(c, data, settings, losses[name]) for name, c in contenders.items()}
    for name, contender in contenders.items():
        measured[name]["dead_in_training"] = dead[name] / settings.steps
        measured[name]["mcc_to_peer"] = recovery.mcc(contender.directions, contenders["peer"].directions)
    return measured


def _told(measured: dict[str, dict[str, Any]]) -> str:
    peer = measured["peer"]
    lines = []
    for name, m in measured.items():
        losses = ", ".join(f"{value:.6g} ({value / peer['loss'][at] - 1:+.1e})" for at, value in m["loss"].items())
        truth = f", MCC {m['mcc']:.4f}, MMCS {m['mmcs']:.4f}" if "mcc" in m else ""
        dead = f"dead {m['dead_fraction']:.2%} ({m['dead_in_training']:.1f} in training)"
        lines.append(
            f"  {name:14} loss {losses}; FVU {m['fvu']:.5f} (x {m['fvu'] / peer['fvu']:.4f}), L0 {m['l0']:.2f}, "
            f"{dead}, MCC to peer {m['mcc_to_peer']:.4f}{truth}"
        )
    return "\n".join(lines)


def _append(path: Path, run: dict[str, Any]) -> None:
    """A run replaces the one of the same recipe, data, settings and seed."""
    runs = read_runs(path) if path.exists() else []
    key = ("recipe", "data", "settings", "seed")
    runs = [old for old in runs if any(old[field] != run[field] for field in key)] + [run]
    write_results(path, runs)


def main(
    recipe: Annotated[str | None, typer.Argument(help=f"one of {', '.join(RECIPES)}")] = None,
    data: Annotated[str, typer.Option(help=f"one of {', '.join(PRESETS)}")] = "known",
    train: Annotated[Path | None, typer.Option(help="training rows for --data activations: .npy or a folder")] = None,
    held_out: Annotated[Path | None, typer.Option(help="held-out rows for --data activations")] = None,
    about: Annotated[str | None, typer.Option(help="what these activations are, for docs/quality.md")] = None,
    seeds: Annotated[int, typer.Option(help="seeds 0, 1, ... to run", min=1)] = 3,
    first_seed: Annotated[int, typer.Option(help="start with this seed", min=0)] = 0,
    m: Annotated[int | None, typer.Option(help="latents; default: of the data set")] = None,
    k: Annotated[int | None, typer.Option(help="active latents; default: of the data set")] = None,
    steps: Annotated[int | None, typer.Option(help="steps; warm-up and decay keep their share")] = None,
    lr: Annotated[float | None, typer.Option(help="learning rate; default: of the data set")] = None,
    sparsity: Annotated[float | None, typer.Option(help="weight of a sparsity term; default: of the recipe")] = None,
    twin: Annotated[bool, typer.Option("--twin", help="the library also from weights moved by a rounding")] = False,
    dtype: Annotated[str, typer.Option(help="float32 or float64 (slow; shows what is rounding)")] = "float32",
    threads: Annotated[int, typer.Option(help="of torch", min=1)] = 1,
    out: Annotated[Path | None, typer.Option(help="results file to add to; with --report: to read")] = None,
    report: Annotated[bool, typer.Option("--report", help="write docs/quality.md from --out, and run nothing")] = False,
    check: Annotated[bool, typer.Option("--check", help="fail if docs/quality.md is not what --report writes")] = False,
    page: Annotated[Path, typer.Option(help="the page that --report writes")] = ROOT / "docs" / "quality.md",
) -> None:
    """Compare a RECIPE's own library with fusae."""
    try:
        if report or check:
            quality_page(out, page, check)
            return
        if recipe not in RECIPES:
            raise ValueError(f"RECIPE must be one of {', '.join(RECIPES)}, got {recipe!r}")
        if data not in PRESETS:
            raise ValueError(f"--data must be one of {', '.join(PRESETS)}, got {data!r}")
        if dtype not in ("float32", "float64"):
            raise ValueError(f"--dtype must be float32 or float64, got {dtype!r}")
        loaded = load(data, train, held_out)
        chosen = RECIPES[recipe]
        try:
            version = chosen.version
        except importlib.metadata.PackageNotFoundError:
            raise ValueError(f"{chosen.package} is not installed; benchmarks/parity.py says how to do it") from None
        if out is not None and out.exists():
            read_runs(out)  # an unusable file is told before the work
    except (ReportError, ValueError, TypeError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(2) from None
    torch.set_num_threads(threads)
    factor = 1.0 if loaded.truth is not None else chosen.scale(loaded.train)
    wide = getattr(torch, dtype)
    loaded = Data(loaded.train.to(wide) * factor, loaded.held_out.to(wide) * factor, loaded.truth)
    settings = _settings(PRESETS[data], chosen, loaded, m=m, k=k, steps=steps, lr=lr, sparsity=sparsity, dtype=dtype)
    where = environment(command=f"python benchmarks/{shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}")
    for seed in range(first_seed, first_seed + seeds):
        measured = compare(chosen, loaded, settings, seed, twin)
        console.print(f"{recipe}, {data}, seed {seed}\n{_told(measured)}", markup=False, soft_wrap=True)
        if out is None:
            continue
        _append(out, {
            "recipe": recipe, "peer": chosen.package, "peer_version": version,
            "data": data, "about": about or ABOUT.get(data, f"rows of {train}"),
            "data_sha256": hashlib.sha256(loaded.train.numpy().tobytes()).hexdigest(),
            "settings": settings.told(), "seed": seed, "contenders": measured,
            "differences": list(chosen.differences), **where,
        })  # fmt: skip


def _settings(preset: Settings, recipe: Recipe, data: Data, **given: Any) -> Settings:
    given = {name: value for name, value in given.items() if value is not None}
    share = given.get("steps", preset.steps) / preset.steps
    return dataclasses.replace(
        preset,
        d=data.train.shape[1],
        aux=recipe.aux,
        warmup_steps=max(1, round(preset.warmup_steps * share)),
        decay_start=round(preset.decay_start * share),
        **{**recipe.fields, **given},
    )


if __name__ == "__main__":
    typer.run(main)
