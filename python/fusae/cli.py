# SPDX-License-Identifier: Apache-2.0
"""The command `fusae`."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import BackendError
from .demo.command import demo

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
) -> None:
    """Write the report of a run: one HTML file that needs no network."""
    try:
        from .eval.report import write_report
    except ModuleNotFoundError as error:
        raise ValueError(f"the report needs {error.name}: pip install 'fusae[report]'") from error
    print(write_report(run, out))


@app.command()
def config(
    m: Annotated[int, typer.Option(help="latents (dictionary size)")] = 16384,
) -> None:
    """Print a configuration file for `fusae train`, every field explained."""
    from .train import TrainConfig

    print('# data = "activations.npy"\n# out = "runs/first"\n\n' + TrainConfig(m=m).to_toml(), end="")


def _train(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG",
            help="TOML or JSON file with any of the fields below, and `data` and `out`; options given here win",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="rows to train on: a .npy file (tokens x width), or a folder of activations", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="directory of the run: config, metrics, checkpoint, coder", show_default=False),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="go on with the unfinished run in this directory", metavar="RUN", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a run that is in --out")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress")] = False,
    **fields: Any,
) -> None:
    from .train import TrainConfig, Trainer
    from .train.config import read_settings

    settings = {} if file is None else read_settings(file)
    given = {name: value for name, value in fields.items() if value is not None}
    data = data or settings.pop("data", None)
    out = out or settings.pop("out", None)
    settings = {name: value for name, value in settings.items() if name not in ("data", "out")} | given
    if resume is not None:
        if out is not None and Path(out) != resume:
            raise ValueError(f"--resume {resume} and --out {out} name two runs; give --resume alone")
        out, data = resume, data or _data_of(resume)
    for name, value in (("data", data), ("out", out)):
        if value is None:
            raise ValueError(f"--{name} must be given, as an option or in the configuration file")
    if resume is not None:
        chosen = settings  # only what was given: the run has the rest
    else:
        try:
            chosen = TrainConfig.from_dict(settings)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{file}: {error}" if file else str(error)) from error
    trainer = Trainer(chosen, data, out, resume=resume is not None, overwrite=overwrite, show=not quiet)
    trainer.run()
    if not trainer.finished:
        raise typer.Exit(130)


def _data_of(run: Path) -> str:
    """Where the data of a run lie, as its config.json says."""
    from .formats.native import read_json

    path = run / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: is {run} the directory of a run?")
    data = read_json(path, "the configuration of a run").get("data")
    where = data.get("path") if isinstance(data, dict) else None
    if not isinstance(where, str):
        raise ValueError(f"{path} does not say where the data lie; give --data")
    return where


def _with_fields(command: Any) -> Any:
    """`command` with an option for every field of TrainConfig, in place of its ``**fields``."""
    from .train.config import TrainConfig

    signature = inspect.signature(command, eval_str=True)
    parameters = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    kinds = {"int": int, "float": float, "str": str, "bool": bool}
    for field in dataclasses.fields(TrainConfig):
        text = field.metadata["help"]
        # None stands for "not given", so that a file's value is not overruled by a default.
        if field.default not in (None, dataclasses.MISSING):
            text += f"; default: {str(field.default).lower() if isinstance(field.default, bool) else field.default}"
        flag = "--" + field.name.replace("_", "-")
        names = [f"{flag}/--no-{flag[2:]}"] if field.type == "bool" else [flag]
        option = typer.Option(*names, help=text, show_default=False, rich_help_panel="Fields")
        kind = kinds[field.type.split(" |")[0]]
        parameters.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[kind | None, option],
            )
        )
    command.__signature__ = signature.replace(parameters=parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
    return command


app.command("train", help="Train a top-k sparse autoencoder on rows of activations; Ctrl-C saves it for --resume.")(
    _with_fields(_train)
)


app.command("demo")(demo)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. A known error is one line on stderr and exit status 1; ``--traceback`` shows the rest."""
    try:
        app(arguments)
    except (ValueError, TypeError, OSError, FloatingPointError, BackendError) as error:
        if _traceback or isinstance(error, BrokenPipeError):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
