# SPDX-License-Identifier: Apache-2.0
"""`fusae convert` on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="folder or file of a dictionary, of any known format")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder to write")],
    format: Annotated[
        str, typer.Option(help="to write: fusae, saelens, sparsify, dictionary_learning or circuit-tracer")
    ] = "fusae",
    from_: Annotated[
        str | None, typer.Option("--from", help="format of IN; default: recognised", show_default=False)
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="of the weights; default: as they are", show_default=False)] = None,
    hint: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="what IN leaves open, such as k=32; can be repeated", show_default=False
        ),
    ] = None,
    metadata: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="to note beside the weights, such as model_name=gpt2", show_default=False
        ),
    ] = None,
    fold_norms: Annotated[
        bool, typer.Option("--fold-norms", help="scale decoder rows to norm 1 first, the output unchanged")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="write into OUT although it is not empty")] = False,
) -> None:
    """Write a dictionary of one tool in the format of another; it encodes and decodes the same."""
    from . import load, save
    from .table import FORMATS

    if format not in FORMATS or FORMATS[format].save is None:
        known = ", ".join(repr(name) for name, one in FORMATS.items() if one.save is not None)
        raise ValueError(f"--format must be one of {known}, got {format!r}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
        raise ValueError(f"{out} is there already; --overwrite writes into it")
    found = load(source, from_, dtype=dtype, **_pairs("hint", hint))
    several = found if isinstance(found, dict) else {"": found}
    if fold_norms:
        for coder in several.values():
            coder.fold_norms_()
    about = _pairs("metadata", metadata)
    if isinstance(found, dict) and format == "circuit-tracer" and all(isinstance(key, int) for key in found):
        print(save(found, out, format, metadata=about))
        return
    for key, coder in several.items():
        print(save(coder, out / (f"layer_{key}" if isinstance(key, int) else key), format, metadata=about))


def _pairs(option: str, given: list[str] | None) -> dict[str, Any]:
    """``NAME=VALUE``, the value as JSON where it is some, else as text."""
    pairs = {}
    for text in given or []:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"--{option} must be NAME=VALUE, got {text!r}")
        try:
            pairs[name] = json.loads(value)
        except ValueError:
            pairs[name] = value
    return pairs
