# SPDX-License-Identifier: Apache-2.0
"""`fusae sweep` on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def sweep(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG",
            help="TOML or JSON file: fields of training that all share, `data` (a path), `out`, and a table [runs.NAME]"
            " with what is particular to each",
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="rows: a .npy file, or a folder of activations", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the runs, one for each name", show_default=False)] = None,
    resume: Annotated[
        Path | None, typer.Option(help="go on with the sweep in this folder", metavar="FOLDER", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a sweep that is in --out")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress")] = False,
) -> None:
    """Train several dictionaries on one stream of activations, in one process: each batch is read once for all."""
    from ..train import Sweep

    configs: Any = None
    if resume is not None:
        if file is not None or (out is not None and out != resume):
            raise ValueError(f"--resume {resume} goes alone: sweep.json has the configurations")
        out, data = resume, data or _rows_of(resume)
    elif file is None:
        raise ValueError("CONFIG must be given, a file with the runs of the sweep; or --resume")
    else:
        configs, named = read_sweep(file)
        data, out = data or named.get("data"), out or named.get("out")
    for name, value in (("data", data), ("out", out)):
        if value is None:
            raise ValueError(f"--{name} must be given, as an option or in the configuration file")
    found = Sweep(configs, data, out, resume=resume is not None, overwrite=overwrite, show=not quiet)
    found.run()
    if any(not trainer.finished for name, trainer in found.trainers.items() if name not in found.failed):
        typer.echo(f"\nstopped; what was done is kept. To go on: fusae sweep --resume {out}", err=True)
        raise typer.Exit(130)
    if found.failed:
        raise typer.Exit(1)


def read_sweep(path: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """(a `TrainConfig` for each table [runs.NAME] of a file, over the fields that all share; `data` and `out`).

    Raises `FileNotFoundError`, or `ValueError` or `TypeError` that names the file, the run and the field.
    """
    from ..train import TrainConfig
    from ..train.config import read_settings

    values = read_settings(path)
    named = {name: values.pop(name) for name in ("data", "out") if name in values}
    for name, value in named.items():
        if not isinstance(value, str):
            raise TypeError(f"{path}: {name} must be a path, got {type(value).__name__} {value!r}")
    runs = values.pop("runs", None)
    if not isinstance(runs, dict) or not runs or not all(isinstance(run, dict) for run in runs.values()):
        raise ValueError(f"{path}: needs a table [runs.NAME] for each run of the sweep, got {runs!r}")
    configs = {}
    for name, fields in runs.items():
        try:
            configs[name] = TrainConfig.from_dict({**values, **fields})
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: run {name!r}: {error}") from error
    return configs, named


def _rows_of(folder: Path) -> str:
    """Where the rows of a sweep lie, as one of its runs says."""
    from ..formats.native import read_json

    for path in sorted(folder.glob("*/config.json")):
        about = read_json(path, "the configuration of a run")
        where = about.get("data", {}).get("path")
        if isinstance(where, str):
            return where
    raise ValueError(f"{folder} does not say where the data lie; give --data")
