# SPDX-License-Identifier: Apache-2.0
"""`fusae plan` on the command line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .whole import Plan


def plan(
    file: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="TOML or JSON file, as `fusae config` prints one")
    ],
    data: Annotated[
        str | None,
        typer.Option(help="rows to train on, in place of the file's: their width and number count", show_default=False),
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="of the activations, where neither file nor data say", show_default=False)
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="of the whole run, where neither file nor data say", show_default=False)
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="'cpu', 'cuda', 'cuda:1', ...; default: that of the file", show_default=False)
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(help="GB (10**9 bytes) of the device; default: what is free on this one", show_default=False),
    ] = None,
    measure: Annotated[
        bool, typer.Option(help="time the pieces of a step here, some seconds, to predict the speed")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    """What a run will need: bytes by part, operations, tokens a second; and what to change if it does not fit."""
    from ..train.setup import device_of
    from .whole import plan as plan_of

    config = _configuration(file, data, width, tokens)
    where = device or config.device
    if measure or memory is None:
        where = str(device_of(where))
    elif where == "auto":
        where = "cpu"
    if memory is not None and not memory > 0:
        raise ValueError(f"--memory must be greater than 0, got {memory}")
    found = plan_of(config, where, room=None if memory is None else int(memory * 1e9), measured=measure)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2, allow_nan=False))
    else:
        from rich.console import Console

        console = Console(highlight=False, soft_wrap=True)
        for part in tables(found, str(file)):
            console.print(part)


def _configuration(file: Path, data: str | None, width: int | None, tokens: int | None) -> Any:
    """The file's configuration, resolved."""
    from ..pipeline.command import open_rows
    from ..pipeline.config import Settings
    from ..train import TrainConfig

    settings = Settings.read(file)
    try:
        config = TrainConfig.from_dict(settings.train)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{file}: {error}") from error
    rows = data or settings.rows
    per_epoch = sites = None
    if rows is not None:
        source = open_rows("data", rows)
        count, wide = source.shape
        if width is not None and width != wide:
            raise ValueError(f"--width must be that of the rows in {rows}, {wide}, got {width}")
        width = wide
        if count is not None:
            per_epoch = count // config.batch_size * config.batch_size
        found = getattr(source, "sites", None)
        sites = tuple(site["width"] for site in found) if found else None
    if width is None:
        width = config.d
    if width is None:
        raise ValueError(
            f"{file} does not say how wide the activations are; give --width, or --data with rows, or d in the file"
        )
    if tokens is not None:
        config = dataclasses.replace(config, tokens=tokens)
    elif config.tokens is None and per_epoch is None:
        # How long a run is changes neither memory nor the time of a step.
        config = dataclasses.replace(config, tokens=1000 * config.batch_size)
    try:
        return config.resolve(width, per_epoch, sites)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def tables(found: Plan, title: str) -> list[Any]:
    """The plan for a terminal."""
    from rich.table import Table

    from .whole import gigabytes

    config, need = found.config, found.needs
    memory = Table("on " + found.device, "bytes", title=f"{title}: m {config.m:,}, d {config.d}, k {config.k}, "
                   f"{config.batch_size:,} tokens a step")  # fmt: skip
    for name, size in need.parts.items():
        memory.add_row(name, gigabytes(size))
    memory.add_row("Python and torch", f"about {gigabytes(found.overhead)}", end_section=True)
    memory.add_row("in all", gigabytes(need.total + found.overhead))
    room = "unknown" if found.room is None else gigabytes(found.room)
    memory.add_row("there are", f"{room}: " + {True: "it fits", False: "too little", None: "?"}[found.fits])
    memory.add_row("evaluation, afterwards", gigabytes(need.evaluation + need.parts["weights"]))
    modes = Table("optimiser mode", "bytes per parameter", title="weights and moments")
    for name, size in found.per_parameter.items():
        modes.add_row(name, f"{size:.2f}")
    degrees = Table("shard_latents", "bytes on each device", title="latents shared among devices")
    for ranks, size in found.by_degree.items():
        degrees.add_row(f"{ranks}", gigabytes(size))
    parts = [memory, modes, degrees]
    if found.speed is not None:
        parts.append(_speed_table(found))
    return parts + [f"to make it fit: {line}" for line in found.advice]


def _speed_table(found: Plan) -> Any:
    from rich.table import Table

    speed, rates, config = found.speed, found.rates, found.config
    total = sum(speed.seconds.values())
    table = Table("of a step", "seconds", title=f"predicted on {rates.device}, from rates measured now")
    for name, seconds in speed.seconds.items():
        table.add_row(name, f"{seconds:.4f}")
    table.add_row("in all", f"{total:.4f}", end_section=True)
    if speed.aux_seconds:
        table.add_row("more, while AuxK has dead latents", f"{speed.aux_seconds:.4f}")
    table.add_row("tokens a second", f"{speed.tokens_per_s:,.0f}")
    table.add_row("operations a step", f"{speed.flops:.3g}")
    hours = total * config.steps / 3600
    table.add_row(f"{config.steps:,} steps", f"{hours:.2f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes")
    table.add_row("encoder, measured", f"{rates.gemm / 1e9:,.1f} GFLOP/s")
    table.add_row("memory, measured", f"{rates.copy / 1e9:,.1f} GB/s")
    return table
