# SPDX-License-Identifier: Apache-2.0
"""Wall-clock time to a quality: the same dictionary trained by each tool, by each tool on fusae, and by fusae.

    python benchmarks/race.py run --train TRAIN --held-out HELD_OUT --out benchmarks/results/my-cpu/race.json
    python benchmarks/race.py page benchmarks/results/my-cpu/race.json      # docs/race.md and its figure

TRAIN and HELD_OUT are .npy files or folders of activations. Needs dictionary-learning, sae-lens and eai-sparsify (see
parity.py); one that is absent is named and left out.

All start from the same weights and get the same batches, in turns, batch by batch, so that what else the machine does
falls on all of them; a contender's clock runs only during its own steps. TopK, Adam, the same learning rates. Quality
is the FVU of held-out rows, measured beside the clock by the same code for all.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import parity
import torch
import typer
from parity_base import Settings, tied
from results_file import ReportError, origin, read_results, write_results
from rich.progress import Progress
from torch import Tensor

import fusae
from fusae import SparseCodes
from fusae.eval import ReconstructionMetrics
from fusae.nn.init import random_unit_rows_
from fusae.testing.bench_row import environment

ROOT = Path(__file__).resolve().parent.parent
FIELDS = ("settings", "curves", "absent", "about", "command", "git", "dirty", "time", "versions", "device")
DIFFERENCES = (
    "fusae runs the recipe of dictionary_learning in its own trainer; dictionary_learning and fusae keep decoder rows "
    "at unit norm, project their gradient and clip the gradient's norm; sparsify does not clip; SAELens clips, and "
    "leaves the norms free",
    "of sparsify's trainer: Adam (its default, SignSGD, is another optimiser), and no distributed or logging parts",
    "no latent counts as dead in a run this short, so AuxK takes no part",
)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Sparsify:
    """What of sparsify's `Trainer` takes part in a step, with Adam and the learning rates of `Settings`."""

    def __init__(self, settings: Settings, start: dict[str, Tensor]) -> None:
        from sparsify import SparseCoder, SparseCoderConfig

        s = self.settings = settings
        self.coder = SparseCoder(s.d, SparseCoderConfig(num_latents=s.m, k=s.k))
        names = {"W_enc": self.coder.encoder.weight, "W_dec": self.coder.W_dec, "b_dec": self.coder.b_dec}
        with torch.no_grad():
            for name, parameter in names.items():
                parameter.copy_(start[name])
            self.coder.encoder.bias.zero_()
        # By the names of the tool's trainer, which `fusae.accelerate` looks for.
        self.saes, self.optimizers = {"layer": self.coder}, [torch.optim.Adam(self.coder.parameters(), lr=s.lr)]
        self.fired, self.done = torch.zeros(s.m, dtype=torch.bool), 0

    def step(self, x: Tensor) -> float:
        s, optimizer = self.settings, self.optimizers[0]
        for group in optimizer.param_groups:
            group["lr"] = s.lr * min((self.done + 1) / s.warmup_steps, s.after_warmup(self.done))
        self.coder.set_decoder_norm_to_unit_norm()
        out = self.coder(x=x, y=x, total_variance=(x - x.mean(0)).pow(2).sum())
        self.fired[out.latent_indices.flatten()] = True
        out.fvu.backward()
        self.coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        self.done += 1
        return float(out.fvu.detach())

    def encode(self, x: Tensor) -> SparseCodes:
        found = self.coder.encode(x)
        return SparseCodes(found.top_acts, found.top_indices.int(), self.settings.m)

    def decode(self, codes: SparseCodes) -> Tensor:
        return self.coder.decode(codes.values, codes.indices.long())


def _of(recipe: str, name: str = "peer") -> Callable[[Settings, dict[str, Tensor]], Any]:
    chosen = parity.RECIPES[recipe]
    return chosen.peer if name == "peer" else chosen.own[name]


#: name -> (package, how it is made, what of it is accelerated)
TOOLS: dict[str, tuple[str, Callable[[Settings, dict[str, Tensor]], Any], Callable[[Any], Any]]] = {
    "dictionary_learning": ("dictionary-learning", _of("dictionary_learning-topk"), lambda c: c.trainer),
    "SAELens": ("sae-lens", _of("saelens-topk"), lambda c: c.trainer),
    "sparsify": ("eai-sparsify", Sparsify, lambda c: c),
}


def contenders(settings: Settings, start: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Of every tool that is installed, itself and itself on fusae; their versions; the tools that are absent."""
    found: dict[str, Any] = {"fusae": _of("dictionary_learning-topk", "fusae Trainer")(settings, start)}
    versions, absent = {}, []
    for name, (package, build, part) in TOOLS.items():
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            absent.append(package)
            continue
        found[name] = build(settings, start)
        found[f"{name} + fusae"] = build(settings, start)
        fusae.accelerate(part(found[f"{name} + fusae"]))
    return found, versions, absent


@torch.no_grad()
def fvu(contender: Any, rows: Tensor, m: int) -> float:
    metrics = ReconstructionMetrics(m)
    for x in rows.split(2048):
        codes = contender.encode(x)
        metrics.update(x, contender.decode(codes), codes)
    return metrics.result()["fvu"]


@app.command()
def run(
    train: Annotated[Path, typer.Option(help="training rows")],
    held_out: Annotated[Path, typer.Option(help="held-out rows")],
    out: Annotated[Path, typer.Option(help="results file to write")],
    about: Annotated[str, typer.Option(help="what these activations are")] = "",
    m: Annotated[int, typer.Option(help="latents")] = 16_384,
    k: Annotated[int, typer.Option(help="active latents")] = 32,
    n: Annotated[int, typer.Option(help="rows of a batch")] = 1024,
    steps: Annotated[int, typer.Option(min=2)] = 120,
    every: Annotated[int, typer.Option(help="steps between two looks at the held-out rows", min=1)] = 10,
    lr: Annotated[float, typer.Option()] = 1e-3,
    seed: int = 0,
    threads: Annotated[int, typer.Option(help="of torch; 0: as torch chooses")] = 0,
) -> None:
    """Train with all tools in turns, and write the curves of FVU over time."""
    if threads:
        torch.set_num_threads(threads)
    data = parity.load("activations", train, held_out)
    scale = float((data.train.shape[1] / data.train.double().square().sum(1).mean()) ** 0.5)
    rows, kept = data.train * scale, data.held_out[:8192] * scale
    settings = Settings(
        rows.shape[1], m, k, steps, n, lr, warmup_steps=max(1, steps // 10), decay_start=round(0.8 * steps),
        dead_steps=10**6, aux=1 / 32,
    )  # fmt: skip
    start = tied(settings, random_unit_rows_(torch.empty(m, settings.d), seed), rows[:n].mean(0))
    found, versions, absent = contenders(settings, start)
    for package in absent:
        print(f"{package} is not installed: left out")
    where = environment(command=shlex.join(["python", "benchmarks/race.py", *sys.argv[1:]]))
    clock = dict.fromkeys(found, 0.0)
    curves: dict[str, list[dict[str, float]]] = {name: [] for name in found}
    with Progress() as progress:
        bar = progress.add_task("steps", total=steps)
        for i, x in enumerate(parity.batches(rows, settings, seed), 1):
            for name, contender in found.items():
                begun = time.perf_counter()
                contender.step(x)
                clock[name] += time.perf_counter() - begun
                if i % every == 0 or i == steps:
                    curves[name].append({"step": i, "seconds": clock[name], "fvu": fvu(contender, kept, m)})
            progress.advance(bar)
    told = {name: value for name, value in dataclasses.asdict(settings).items() if value is not None}
    write_results(out, [{
        "settings": told, "seed": seed, "threads": torch.get_num_threads(), "curves": curves, "absent": absent,
        "about": about or str(train.name), **where, "versions": {**where["versions"], **versions},
    }])  # fmt: skip
    print("\n".join(table(read_results(out, FIELDS)[0])))


def target(curves: dict[str, list[dict[str, float]]]) -> float:
    """The lowest FVU that every contender came to."""
    return max(min(point["fvu"] for point in curve) for curve in curves.values())


def seconds_to(curve: list[dict[str, float]], wanted: float) -> float:
    """When a curve first came down to that FVU; between two points, on the line of log FVU over time."""
    before = None
    for point in curve:
        if point["fvu"] <= wanted:
            if before is None or before["fvu"] == point["fvu"]:
                return point["seconds"]
            share = math.log(before["fvu"] / wanted) / math.log(before["fvu"] / point["fvu"])
            return before["seconds"] + share * (point["seconds"] - before["seconds"])
        before = point
    raise ValueError(f"the curve ends at FVU {curve[-1]['fvu']:.4f}, above {wanted:.4f}")


def table(one: dict[str, Any]) -> list[str]:
    curves, wanted = one["curves"], target(one["curves"])
    steps = one["settings"]["steps"]
    lines = [
        f"| | seconds to FVU {wanted:.3f} | times fusae's | seconds a step | FVU after {steps} steps |",
        "|---|---:|---:|---:|---:|",
    ]
    ours = seconds_to(curves["fusae"], wanted)
    for name, curve in curves.items():
        taken = seconds_to(curve, wanted)
        lines.append(
            f"| {name} | {taken:.1f} | {taken / ours:.1f} × | {curve[-1]['seconds'] / curve[-1]['step']:.2f} "
            f"| {curve[-1]['fvu']:.4f} |"
        )
    return lines


def draw(one: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), constrained_layout=True)
    colours = dict(zip(("fusae", *TOOLS), ("black", "tab:blue", "tab:orange", "tab:green"), strict=True))
    for name, curve in one["curves"].items():
        tool, _, on_fusae = name.partition(" + ")
        axes.plot(
            [p["seconds"] for p in curve], [p["fvu"] for p in curve], label=name, color=colours[tool],
            linestyle="-" if on_fusae or tool == "fusae" else "--", linewidth=2.5 if tool == "fusae" else 1.5,
        )  # fmt: skip
    axes.axhline(target(one["curves"]), color="0.6", linewidth=0.8)
    s = one["settings"]
    axes.set(xscale="log", xlabel="seconds of training", ylabel="FVU of held-out activations")
    axes.set_title(f"TopK, d {s['d']}, m {s['m']}, k {s['k']}, {s['batch_size']} rows a step, {one['device']}", size=10)
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def markdown(one: dict[str, Any], figure: str) -> str:
    packages = ", ".join(f"{name} {v}" for name, v in one["versions"].items() if name in {t[0] for t in TOOLS.values()})
    absent = f" Not installed, and so left out: {', '.join(one['absent'])}." if one["absent"] else ""
    return "\n".join([
        "# Time to a quality", "",
        f"One dictionary of {one['about']}, trained by each tool, by each tool with `fusae.accelerate`, and by "
        f"`fusae.train`: the same initial weights, batches and learning rates ({packages}).{absent} "
        f"The FVU to reach is the lowest that all of them came to in {one['settings']['steps']} steps.", "",
        f"![FVU over seconds of training]({figure})", "",
        *table(one), "",
        "What differs beside the tools:", "", *[f"* {line}" for line in DIFFERENCES], "",
        f"Contenders took turns batch by batch, on {one['threads']} threads. Generated by `python benchmarks/race.py "
        f"page` from: {origin([one])}", "",
    ])  # fmt: skip


@app.command()
def page(
    results: Annotated[Path, typer.Argument(help="file of `run`")],
    page: Annotated[Path, typer.Option(help="the page; its figure goes beside it")] = ROOT / "docs" / "race.md",
) -> None:
    """Write the page and the figure of a results file."""
    try:
        one = read_results(results, FIELDS)[0]
    except (ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    draw(one, page.parent / "figures" / "race.svg")
    page.write_text(markdown(one, "figures/race.svg"), encoding="utf-8")


if __name__ == "__main__":
    app()
