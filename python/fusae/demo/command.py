# SPDX-License-Identifier: Apache-2.0
"""`fusae demo` on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def demo(
    out: Annotated[Path, typer.Option(help="directory of the run and its report")] = Path("runs/demo"),
    tokens: Annotated[int | None, typer.Option(help="activations to train on", show_default=False)] = None,
    m: Annotated[int | None, typer.Option(help="latents (dictionary size)", show_default=False)] = None,
    k: Annotated[int | None, typer.Option(help="latents active per token", show_default=False)] = None,
    epochs: Annotated[int | None, typer.Option(help="passes over the activations", show_default=False)] = None,
    quick: Annotated[bool, typer.Option("--quick", help="everything small: to see that it runs")] = False,
    cache_dir: Annotated[
        Path | None, typer.Option(help="for downloads and activations; default: ~/.cache/fusae", show_default=False)
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; default: torch's choice", show_default=False)
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="begin anew where --out holds a run; downloads and activations are kept")
    ] = False,
) -> None:
    """Train a dictionary on a real language model and write a report: minutes on two cores, 103 MB of downloads.

    A run that was interrupted goes on where it stopped.
    """
    import torch
    from rich.console import Console

    from . import DemoConfig, PipelineError, run

    given = {"tokens": tokens, "m": m, "k": k, "epochs": epochs}
    given = {name: value for name, value in given.items() if value is not None}
    config = DemoConfig.quick(**given) if quick else DemoConfig(**given)
    if threads is not None:
        torch.set_num_threads(threads)
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        report = run(config, out, cache_dir=cache_dir, overwrite=overwrite)
    except PipelineError as error:
        errors.print(f"error: {error}\nWhat was done is kept; run the same command again to go on.", markup=False)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        errors.print("\nstopped; what was done is kept. Run the same command again to go on.")
        raise typer.Exit(130) from None
    console = Console(highlight=False, soft_wrap=True)
    console.print(summary(out, config))
    console.print(f"report: {report}", markup=False)


def summary(out: Path, config: Any) -> Any:
    """The numbers of a finished run as a table, with the demo's bars."""
    from rich.table import Table

    from .config import BARS

    evaluation, bench = (json.loads((out / name).read_text(encoding="utf-8")) for name in ("eval.json", "bench.json"))
    loss = evaluation["loss"]
    step = {row["name"]: row["p50_ms"] for row in bench["rows"]}
    reached = {
        "fvu": evaluation["fvu"] <= BARS["fvu"],
        "loss_recovered": loss["loss_recovered"] >= BARS["loss_recovered"],
    }
    table = Table("on held-out text", "measured", "the demo's bar", title=f"{config.m:,} latents, {config.k} active")
    verdict = {name: "reached" if ok else "NOT reached" for name, ok in reached.items()}
    table.add_row("FVU", f"{evaluation['fvu']:.3f}", f"<= {BARS['fvu']:.2f}  {verdict['fvu']}")
    table.add_row(
        "loss recovered",
        f"{loss['loss_recovered']:.3f}",
        f">= {BARS['loss_recovered']:.2f}  {verdict['loss_recovered']}",
    )
    names = ("original", "patched", "mean_ablated")
    table.add_row("loss: original, patched, mean-ablated", ", ".join(f"{loss[name]:.3f}" for name in names), "")
    table.add_row("L0", f"{evaluation['l0']:.1f}", "")
    table.add_row("dead latents", f"{evaluation['dead_latents']:,} of {evaluation['latents']:,}", "")
    table.add_row(
        "training step: fusae, plain torch",
        f"{step['fusae']:.0f} ms, {step['plain torch']:.0f} ms: {step['plain torch'] / step['fusae']:.1f}x",
        "",
    )
    return table
