# SPDX-License-Identifier: Apache-2.0
"""Time an op of fusae beside its rivals, in turns, in one run. See benchmarks/README.md."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import rivals
import typer
from rich.console import Console
from rich.table import Table

from fusae import BackendError
from fusae.testing import workloads
from fusae.testing.bench import Measurement, Row, RowError, append_rows, measure, read_rows
from fusae.testing.bench_gate import conform

console = Console(width=None if sys.stdout.isatty() else 140)


@dataclasses.dataclass(frozen=True)
class Bar:
    """What a run must reach: ``own`` over ``other`` (or the other way round, for a speed-up) within the limit."""

    own: str
    other: str
    limit: float
    speedup: bool = False

    def verdict(self, measured: Measurement) -> str:
        value = measured.ratio(*(self.other, self.own) if self.speedup else (self.own, self.other))
        reached = value >= self.limit if self.speedup else value <= self.limit
        wanted = f"{'≥' if self.speedup else '≤'} {self.limit:g}"
        what = f"{self.own} vs {self.other}" + (" (times faster)" if self.speedup else "")
        mark = "[green]reached[/]" if reached else "[red]MISSED[/] "
        return f"{mark} {what}: {value:.2f}, bar {wanted}"


PRESETS: dict[str, list[tuple[str, dict[str, int], list[Bar]]]] = {
    "bars": [
        ("encode_topk", {"n": 2048, "d": 576, "m": 32768, "k": 32}, [Bar("fusae", "gemm", 1.10)]),
        ("encode_topk", {"n": 1024, "d": 768, "m": 131072, "k": 64}, [Bar("fusae", "gemm", 1.10)]),
        ("encode_threshold", {"n": 4096, "d": 576, "m": 32768, "k": 64}, [Bar("fusae", "gemm", 1.15)]),
        ("encode_batch_topk", {"n": 4096, "d": 576, "m": 32768, "k": 64}, [Bar("fusae", "gemm", 1.15)]),
        (
            "train_step",
            {"n": 4096, "d": 576, "m": 32768, "k": 32},
            [Bar("fusae", "gemm", 1.35), Bar("fusae", "plain torch", 4.5, speedup=True)],
        ),
        ("matryoshka_step", {"n": 4096, "d": 576, "m": 32768, "k": 32}, [Bar("fusae", "top-k step", 1.25)]),
        (
            "jumprelu_step",
            {"n": 4096, "d": 576, "m": 32768, "k": 64},
            [Bar("fusae", "plain torch", 4, speedup=True)],
        ),
    ],
    # The same ops in seconds, to see that everything runs. The numbers mean nothing.
    "tiny": [(op, {"n": 64, "d": 32, "m": 512, "k": 8}, []) for op in workloads.CONTENDERS],
}


def _bytes(count: int | None) -> str:
    return "—" if count is None else f"{count / 2**20:,.1f} MiB"


def _table(measured: Measurement) -> Table:
    first: Row = measured.rows[0]
    shape = ", ".join(f"{key} {size}" for key, size in first.shape.items())
    table = Table(title=f"{first.op}: {shape}, {first.dtype}, {first.threads} threads, {first.rounds} rounds")
    table.add_column("contender")
    for title in ("p50 ms", "p20 – p80", f"× {first.baseline or 'baseline'}", "Gflop/s", "GB/s", "of roofline"):
        table.add_column(title, justify="right")
    table.add_column(f"peak memory\n(parameters {_bytes(first.parameter_bytes)})", justify="right")
    for row in measured.rows:
        table.add_row(
            row.name + (f" ({row.backend})" if row.backend else ""),
            f"{row.p50_ms:.2f}", f"{row.p20_ms:.2f} – {row.p80_ms:.2f}",
            "—" if row.ratio is None else f"{row.ratio:.2f}",
            f"{row.tflops * 1e3:.1f}", f"{row.gbps:.1f}", f"{row.roofline:.0%}", _bytes(row.peak_bytes),
            style="bold" if row.name.startswith("fusae") else None,
        )  # fmt: skip
    return table


def _names(op: str, wanted: list[str]) -> list[str]:
    """The baseline and fusae's own contenders always, and of the others those that were asked for."""
    known = [*workloads.contenders(op), *rivals.CONTENDERS.get(op, {})]
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


def _gate(op: str, options: dict[str, Any]) -> None:
    backend = workloads.choose_backend(op, options["device"], options["backend"])
    try:
        conform(op, backend, options["dtype"], options["device"])
    except AssertionError as error:
        console.print(f"[red]gate[/] {op} on {backend}, {options['dtype']}: no numbers, the op is wrong\n{error}")
        raise typer.Exit(1) from None
    console.print(f"[green]gate[/] {op} on {backend}, {options['dtype']}: agrees with the reference")


def main(
    op: Annotated[str | None, typer.Argument(help=f"one of {', '.join(workloads.CONTENDERS)}")] = None,
    n: Annotated[int, typer.Option(min=1, help="rows")] = 2048,
    d: Annotated[int, typer.Option(min=1, help="width")] = 576,
    m: Annotated[int, typer.Option(min=1, help="latents")] = 32768,
    k: Annotated[int, typer.Option(min=1, help="active latents a row")] = 32,
    preset: Annotated[str | None, typer.Option(help=f"fixed ops and shapes: {', '.join(PRESETS)}")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    warmup: Annotated[int, typer.Option(min=0)] = 2,
    threads: Annotated[int | None, typer.Option(min=1, help="default: torch's")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    device: str = "cpu",
    backend: Annotated[str | None, typer.Option(help="run fusae on this backend or fail")] = None,
    rival: Annotated[list[str] | None, typer.Option(help="all, none, or names of contenders (repeatable)")] = None,
    data: Annotated[Path | None, typer.Option(exists=True, help="activations [rows, d], .npy")] = None,
    memory: Annotated[bool, typer.Option(help="measure peak memory, in one more process per contender")] = True,
    gate: Annotated[bool, typer.Option("--gate", help="check against the reference first: wrong, no number")] = False,
    out: Annotated[Path | None, typer.Option(help="append the rows to this JSON file")] = None,
) -> None:
    """Time one op, or the ops of a preset, beside their rivals."""
    if (op is None) == (preset is None):
        raise typer.BadParameter("give either an op or --preset", param_hint="OP")
    if preset is not None and preset not in PRESETS:
        raise typer.BadParameter(f"must be one of {', '.join(PRESETS)}, got {preset!r}", param_hint="--preset")
    if op is not None and op not in workloads.CONTENDERS:
        raise typer.BadParameter(f"must be one of {', '.join(workloads.CONTENDERS)}, got {op!r}", param_hint="OP")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"must be float32, bfloat16 or float16, got {dtype!r}", param_hint="--dtype")
    plan = PRESETS[preset] if preset else [(op, {"n": n, "d": d, "m": m, "k": k}, [])]
    plan = [(each, shape, bars, _names(each, rival or ["all"])) for each, shape, bars in plan]
    options = {"dtype": dtype, "device": device, "backend": backend}
    try:
        if out is not None and out.exists():
            read_rows(out)  # a file that cannot be appended to is better known now than after the run
        if gate:
            for each in dict.fromkeys(each for each, *_ in plan):
                _gate(each, options)
        for each, shape, bars, names in plan:
            with console.status(f"{each} {shape}: {', '.join(names)}"):
                measured = measure(
                    each, **shape, **options, names=names, rivals="rivals", threads=threads, rounds=rounds,
                    warmup=warmup, data=None if data is None else str(data), memory=memory,
                    command=shlex.join(["python", "benchmarks/run.py", *sys.argv[1:]]),
                )  # fmt: skip
            console.print(_table(measured))
            for bar in bars:
                shown = bar.own in measured.times and bar.other in measured.times
                console.print(bar.verdict(measured) if shown else f"not judged: {bar.other} did not run")
            absent = rivals.missing() if each == "train_step" else {}
            for name, reason in absent.items():
                console.print(f"[dim]absent: {name}, {reason}[/]")
            if out is not None:
                append_rows(out, measured.rows)
                console.print(f"{len(measured.rows)} rows appended to {out}")
    except (BackendError, RowError, ValueError) as error:
        console.print(f"[red]error[/] {error}")
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
