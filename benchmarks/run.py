# SPDX-License-Identifier: Apache-2.0
"""Time ops of fusae beside their rivals, in turns, in one run. See benchmarks/README.md."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

if any(argument.startswith("--base") for argument in sys.argv):
    # Two processes share the cores: idle threads sleep, in both. Before torch starts its own.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import base
import rivals
import torch
import typer
from presets import PRESETS, Bar, Item, Preset
from rich.console import Console

from fusae import BackendError
from fusae.bench.table import table_of
from fusae.testing import workloads
from fusae.testing.bench import RowError, append_rows, measure, read_rows
from fusae.testing.bench_gate import conform
from fusae.testing.bench_shares import measure_shares

__all__ = ["PRESETS", "Bar", "main"]
console = Console(width=None if sys.stdout.isatty() else 140)


def _names(op: str, wanted: list[str], compiled: bool) -> list[str]:
    """The baseline and fusae's own contenders always, and of the others those that were asked for."""
    known = [*workloads.contenders(op), *rivals.CONTENDERS.get(op, {})]
    if not compiled and rivals.COMPILED not in wanted:
        known = [name for name in known if name != rivals.COMPILED]
    others = [name for name in known if not name.startswith("fusae") and name != workloads.BASELINE[op]]
    if "all" in wanted:
        chosen = others
    else:
        chosen = [name for name in wanted if name != "none"]
        for name in chosen:
            if name in rivals.missing():
                raise typer.BadParameter(f"{name} is {rivals.missing()[name]}", param_hint="--rival")
            if name not in others:
                told = f"must be all, none or among {others} for {op}, got {name!r}"
                raise typer.BadParameter(told, param_hint="--rival")
    return [name for name in known if name not in others or name in chosen]


def _absent(op: str, compiled: bool, names: list[str]) -> dict[str, str]:
    """Contenders of `op` that do not take part though nobody left them out, and why."""
    found = {name: why for name, why in rivals.missing(op).items() if name not in names}
    if not compiled and rivals.COMPILED in rivals.CONTENDERS.get(op, {}) and rivals.COMPILED not in names:
        found[rivals.COMPILED] = "not asked for (--compiled)"
    return found


def _gate(op: str, options: dict[str, Any]) -> None:
    backend = workloads.choose_backend(op, options["device"], options["backend"])
    try:
        # On a GPU every case compiles kernels of its own: there the suite is run apart (benchmarks/gpu.sh conform).
        conform(op, backend, options["dtype"], options["device"], cases=torch.device(options["device"]).type == "cpu")
    except AssertionError as error:
        console.print(f"[red]gate[/] {op} on {backend}, {options['dtype']}: no numbers, the op is wrong\n{error}")
        raise typer.Exit(1) from None
    console.print(f"[green]gate[/] {op} on {backend}, {options['dtype']}: agrees with the reference")


def _run(item: Item, names: list[str], options: dict[str, Any], site: tuple[str, Path] | None, compiled: bool) -> Any:
    """Measure one item; `site`: another commit whose fusae takes part."""
    made = {key: options[key] for key in ("dtype", "device", "data", "backend", "threads", "rounds", "warmup")}
    if item.shares:
        return measure_shares(**item.shape, **made, command=options["command"])
    others: dict[str, base.Remote] = {}
    if site is not None:
        spec = {**item.shape, "op": item.op, "name": "fusae", "dtype": options["dtype"], "device": options["device"]}
        spec |= {"data": options["data"], "threads": options["threads"] or torch.get_num_threads()}
        spec["backend"] = workloads.choose_backend(item.op, options["device"], options["backend"])
        others[f"fusae @{site[0][:10]}"] = base.Remote(site[1], spec)
    try:
        return measure(
            item.op, **item.shape, **options, names=names, rivals="rivals", others=others,
            absent=_absent(item.op, compiled, names),
        )  # fmt: skip
    finally:
        for remote in others.values():
            remote.close()


def main(
    op: Annotated[str | None, typer.Argument(help=f"one of {', '.join(workloads.CONTENDERS)}")] = None,
    n: Annotated[int, typer.Option(min=1, help="rows")] = 2048,
    d: Annotated[int, typer.Option(min=1, help="width")] = 576,
    m: Annotated[int, typer.Option(min=1, help="latents")] = 32768,
    k: Annotated[int, typer.Option(min=1, help="active latents a row")] = 32,
    preset: Annotated[str | None, typer.Option(help=f"fixed ops and shapes: {', '.join(PRESETS)}")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="--preset quick: ratios to a few per cent, 2 minutes")] = False,
    rounds: Annotated[int | None, typer.Option(min=1, help="default: the preset's, else 7")] = None,
    warmup: Annotated[int, typer.Option(min=0)] = 2,
    threads: Annotated[int | None, typer.Option(min=1, help="default: torch's")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    device: str = "cpu",
    backend: Annotated[str | None, typer.Option(help="run fusae on this backend or fail")] = None,
    rival: Annotated[list[str] | None, typer.Option(help="all, none, or names of contenders (repeatable)")] = None,
    compiled: Annotated[bool, typer.Option("--compiled", help="torch.compile takes part")] = False,
    data: Annotated[str | None, typer.Option(help="activations [rows, d]: .npy, a folder, or demo")] = None,
    memory: Annotated[bool, typer.Option(help="measure peak memory, in one more process per contender")] = True,
    gate: Annotated[bool, typer.Option("--gate", help="check against the reference first: wrong, no number")] = False,
    other: Annotated[str | None, typer.Option("--base", help="another commit, built and run in turns")] = None,
    budget: Annotated[float | None, typer.Option(min=0, help="seconds of rounds for each op and shape")] = None,
    within: Annotated[float | None, typer.Option(min=0, help="stop where ratios are known to this share")] = None,
    out: Annotated[Path | None, typer.Option(help="append the rows to this JSON file")] = None,
) -> None:
    """Time one op, or the ops of a preset, beside their rivals."""
    preset = "quick" if quick and op is None and preset is None else preset
    if (op is None) == (preset is None):
        raise typer.BadParameter("give either an op or --preset", param_hint="OP")
    if preset is not None and preset not in PRESETS:
        raise typer.BadParameter(f"must be one of {', '.join(PRESETS)}, got {preset!r}", param_hint="--preset")
    if op is not None and op not in workloads.CONTENDERS:
        raise typer.BadParameter(f"must be one of {', '.join(workloads.CONTENDERS)}, got {op!r}", param_hint="OP")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"must be float32, bfloat16 or float16, got {dtype!r}", param_hint="--dtype")
    if data not in (None, "demo") and not Path(data).exists():
        raise typer.BadParameter(f"must be a file, a folder or demo, got {data!r}", param_hint="--data")
    chosen = PRESETS[preset] if preset else Preset([Item(op, {"n": n, "d": d, "m": m, "k": k})])
    if quick and op is not None:
        chosen = Preset(chosen.items, rounds=60, budget=25, within=0.04)
    plan = []
    for item in chosen.items:
        wanted = rival or (["all"] if item.names is None else list(item.names) or ["none"])
        plan.append((item, _names(item.op, wanted, compiled)))
    options = {
        "dtype": dtype, "device": device, "backend": backend, "threads": threads, "warmup": warmup, "data": data,
        "rounds": rounds or chosen.rounds, "budget": budget or chosen.budget, "within": within or chosen.within,
        "command": shlex.join(["python", "benchmarks/run.py", *sys.argv[1:]]),
    }  # fmt: skip
    try:
        if out is not None and out.exists():
            read_rows(out)  # a file that cannot be appended to is better known now than after the run
        if gate:
            for each in dict.fromkeys(item.op for item, _ in plan):
                _gate(each, options)
        with contextlib.ExitStack() as stack:
            site = None
            if other is not None:
                with console.status(f"building {other}"):
                    site = stack.enter_context(base.built(other))
            for item, names in plan:
                with console.status(f"{item.op} {item.shape}: {', '.join(names)}"):
                    measured = _run(item, names, {**options, "memory": memory and item.memory}, site, compiled)
                console.print(table_of(measured.rows))
                for bar in item.bars:
                    shown = bar.own in measured.times and bar.other in measured.times
                    console.print(bar.verdict(measured) if shown else f"not judged: {bar.other} did not run")
                for name, reason in measured.rows[0].absent.items():
                    console.print(f"[dim]absent: {name}, {reason}[/]")
                if out is not None:
                    append_rows(out, measured.rows)
                    console.print(f"{len(measured.rows)} rows appended to {out}")
    except (BackendError, RowError, ValueError) as error:
        console.print(f"[red]error[/] {error}")
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
