# SPDX-License-Identifier: Apache-2.0
"""The command `fusae`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from . import BackendError
from .bench.command import bench
from .demo.command import demo
from .formats.command import convert
from .pipeline.command import evaluate, train, with_fields
from .pipeline.errors import PipelineError
from .pipeline.sweep import sweep
from .plan.command import plan

_traceback = False

app = typer.Typer(
    help="Sparse dictionary learning: train sparse autoencoders and look at them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def options(
    traceback: Annotated[bool, typer.Option("--traceback", help="show where in the code an error was raised")] = False,
) -> None:
    global _traceback
    _traceback = traceback


@app.command()
def info() -> None:
    """Versions, CPU, GPU, and which backend runs which op (with the reason wherever one cannot)."""
    from .info import report

    print(report())


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="directory that `fusae train` wrote")],
    out: Annotated[Path | None, typer.Option(help="HTML file to write; default: RUN/report.html")] = None,
    export: Annotated[
        tuple[str, Path] | None,
        typer.Option(
            metavar="FORMAT FOLDER",
            help="instead, write the latents as 'sae-dashboard' or 'neuronpedia' reads them",
        ),
    ] = None,
) -> None:
    """Write the report of a run: one HTML file that needs no network."""
    if export is not None:
        from .eval.report_export import export_run

        if out is not None:
            raise ValueError("out names the HTML file, export its own folder: give one of them")
        print(export_run(run, *export))
        return
    try:
        from .eval.report import write_report
    except ModuleNotFoundError as error:
        raise ValueError(f"the report needs {error.name}: pip install 'fusae[report]'") from error
    print(write_report(run, out))


@app.command()
def config(
    m: Annotated[int, typer.Option(help="latents (dictionary size)")] = 16384,
    preset: Annotated[
        str | None, typer.Option(help="a published recipe, as of `fusae train`", show_default=False)
    ] = None,
) -> None:
    """Print a configuration file for `fusae train`, every field explained."""
    from .pipeline import example

    print(example(m, preset), end="")


app.command(
    "train",
    help="Train a sparse dictionary: from text, through a language model, to a report; or on rows of "
    "activations. Ctrl-C saves it for --resume.",
)(with_fields(train))
app.command("sweep", help=sweep.__doc__)(sweep)
app.command("plan", help=plan.__doc__)(plan)
app.command("eval", help=evaluate.__doc__)(evaluate)
app.command("bench", help=bench.__doc__)(bench)
app.command("demo")(demo)
app.command("convert")(convert)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. A known error is one line on stderr and exit status 1; ``--traceback`` shows the rest."""
    try:
        app(arguments)
    except (ValueError, TypeError, OSError, FloatingPointError, BackendError, PipelineError) as error:
        if _traceback or isinstance(error, BrokenPipeError):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
