# SPDX-License-Identifier: Apache-2.0
"""`fusae bench` on the command line."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

DTYPES = ("float32", "bfloat16", "float16")


def bench(
    what: Annotated[
        str, typer.Argument(metavar="OP", help="an op (encode_topk, decode, train_step, ...) or module:function")
    ],
    op: Annotated[
        str | None, typer.Option(help="the op that your function computes; default: the one in its name")
    ] = None,
    d: Annotated[int, typer.Option(min=1, help="width")] = 768,
    m: Annotated[list[int] | None, typer.Option(min=1, help="latents; several: one after the other")] = None,
    k: Annotated[int, typer.Option(min=1, help="active latents a row")] = 32,
    n: Annotated[int, typer.Option(min=1, help="rows")] = 1024,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    backend: Annotated[str | None, typer.Option(help="run fusae on this backend or fail")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="default: torch's")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="calls of each at most")] = 15,
    seconds: Annotated[float, typer.Option(min=0, help="for the rounds of one shape")] = 30.0,
    data: Annotated[
        str | None, typer.Option(help="activations [rows, d]: .npy, a folder of `fusae.data`, or demo")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compiled", help="also torch.compile of the plain version")] = False,
    memory: Annotated[bool, typer.Option(help="peak memory, in one more process each (not of your function)")] = True,
    png: Annotated[Path | None, typer.Option(help="figure to write (.png, .svg or .pdf)")] = None,
    json: Annotated[Path | None, typer.Option(help="append the rows to this results file")] = None,
) -> None:
    """Time an op of fusae, or a function of yours, beside plain torch. First the gate: what is wrong gets no number.

    Contenders take turns on the same inputs; ratios are medians of ratios within rounds. Your function takes the
    arguments of fusae's op of that name without `backend` and returns tensors or `fusae.SparseCodes`:

        fusae bench encode_topk --d 768 --m 131072 --k 32 --png speed.png

        fusae bench my_module:my_encode_topk --d 768 --m 131072 --k 32
    """
    from rich.console import Console

    from ..testing import workloads
    from ..testing.bench import append_rows, read_rows
    from .own import OwnError, load, op_of

    console = Console(width=None if sys.stdout.isatty() else 140)
    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if png is not None:
        figures()  # missing matplotlib is better known now than after the run
    if json is not None and json.exists():
        read_rows(json)
    own = None
    if ":" in what:
        name, own = op_of(what, op), load(what)
    elif what not in workloads.CONTENDERS:
        raise OwnError(f"OP must be one of {', '.join(workloads.CONTENDERS)} or module:function, got {what!r}")
    elif op is not None:
        raise OwnError(f"--op is for a function of yours (module:function), got it with the op {what!r}")
    else:
        name = what
    options: dict[str, Any] = {
        "dtype": dtype, "device": device, "backend": backend, "threads": threads, "rounds": rounds,
        "budget": seconds, "data": data,
    }  # fmt: skip
    gate(console, name, options)
    rows = []
    for width in m or [32768]:
        shape = {"n": n, "d": d, "m": width, "k": k}
        rows += run(console, name, shape, options, own, what, compiled, memory)
    if json is not None:
        append_rows(json, rows)
        console.print(f"{len(rows)} rows appended to {json}", highlight=False)
    if png is not None:
        draw = figures().times_against_m if len(set(m or [1])) > 1 else figures().bars
        draw(rows, source_of(rows)).savefig(png, dpi=160)
        console.print(f"figure: {png}", highlight=False)


def gate(console: Any, op: str, options: dict[str, Any]) -> None:
    """fusae's own op on the small cases; exit status 1 where it is wrong."""
    from ..testing import workloads
    from ..testing.bench_gate import conform

    backend = workloads.choose_backend(op, options["device"], options["backend"])
    try:
        with console.status(f"gate: {op} on {backend}"):
            # On a GPU every case of the suite compiles kernels of its own, for minutes.
            conform(op, backend, options["dtype"], options["device"], cases=options["device"] == "cpu")
    except AssertionError as error:
        console.print(f"[red]gate[/] {op} on {backend}, {options['dtype']}: no numbers, the op is wrong")
        console.print(str(error), markup=False, highlight=False)
        raise typer.Exit(1) from None
    console.print(f"[green]gate[/] {op} on {backend}, {options['dtype']}: agrees with the reference")


def gate_own(console: Any, op: str, function: Any, name: str, inputs: Any, k: int) -> None:
    """The user's function at the sizes of the benchmark; exit status 1, and what differs, where it is wrong."""
    from rich.table import Table

    from ..testing import bench_own

    try:
        bench_own.check(op, function, inputs, k)
    except AssertionError as error:
        console.print(f"[red]gate[/] {name} is no {op}: no numbers. On {bench_own.ROWS} rows of the inputs:")
        console.print(str(error), markup=False, highlight=False)
        found = bench_own.differences(op, function, inputs, k)
        if found:
            table = Table(title="where it differs most from the reference")
            for column in ("tensor", "place", "yours", "reference"):
                table.add_column(column, justify="left" if column in ("tensor", "place") else "right")
            for each in found:
                table.add_row(each.tensor, each.place, f"{each.own:.9g}", f"{each.reference:.9g}")
            console.print(table)
        raise typer.Exit(1) from None
    console.print(f"[green]gate[/] {name}: computes {op}")


def run(
    console: Any, op: str, shape: dict[str, int], options: dict[str, Any], own: Any, name: str, compiled: bool,
    memory: bool,
) -> list[Any]:  # fmt: skip
    """One shape: the user's gate, the rounds, the table."""
    from ..testing import bench_compiled, workloads
    from ..testing.bench import measure
    from ..testing.bench_calls import CALLS
    from .table import table_of

    others = {}
    if own is not None:
        made = {key: options[key] for key in ("dtype", "device", "data")}
        inputs = workloads.make_inputs(**shape, **made)
        gate_own(console, op, own, name, inputs, shape["k"])
        others[name] = CALLS[op](own)(inputs, shape["k"], "")
    known = list(workloads.CONTENDERS[op])
    if compiled and op in bench_compiled.CONTENDERS and bench_compiled.missing() is None:
        known += list(bench_compiled.CONTENDERS[op])
    with console.status(f"{op} {shape}"):
        measured = measure(
            op, **shape, **options, names=known, memory=memory, others=others,
            rivals="fusae.testing.bench_compiled" if compiled else None,
            baseline="fusae" if own is not None and "fusae" in known else None,
            command=shlex.join(["fusae", "bench", *sys.argv[2:]]),
        )  # fmt: skip
    console.print(table_of(measured.rows))
    if compiled and bench_compiled.missing() is not None:
        console.print(f"[dim]absent: torch.compile, {bench_compiled.missing()}[/]")
    return measured.rows


def figures() -> Any:
    """The module that draws."""
    try:
        from . import figure
    except ModuleNotFoundError as error:
        raise ValueError(f"a figure needs {error.name}: pip install 'fusae[report]'") from error
    return figure


def source_of(rows: list[Any]) -> str:
    """What a figure says of where its rows come from."""
    first = rows[0]
    commit = "unknown commit" if first.git is None else f"commit {first.git[:12]}" + " (changed)" * bool(first.dirty)
    versions = f"fusae {first.versions.get('fusae', '?')}, torch {first.versions.get('torch', '?')}"
    return f"{first.device}, {first.threads} threads, {versions}, {commit}, inputs {first.data}, {first.time[:10]}"
