# SPDX-License-Identifier: Apache-2.0
"""Results files ``{"schema": 1, "runs": [run, ...]}``: read, written, and what a page says of where runs come from."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SCHEMA = 1


class ReportError(ValueError):
    """A results file or a page that cannot be used. The message names it, and what is wrong."""


def read_results(path: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    """The runs of a file, each of which has at least these fields."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReportError(f"{path}: is no JSON ({error})") from error
    if not isinstance(document, dict) or not isinstance(document.get("runs"), list):
        raise ReportError(f'{path}: must be {{"schema": {SCHEMA}, "runs": [...]}}, as the scripts here write it')
    if document.get("schema") != SCHEMA:
        raise ReportError(f"{path}: schema must be {SCHEMA}, got {document.get('schema')!r}")
    for i, run in enumerate(document["runs"]):
        absent = [name for name in fields if not isinstance(run, dict) or name not in run]
        if absent:
            raise ReportError(f"{path}: run {i} lacks {', '.join(absent)}")
    return document["runs"]


def write_results(path: Path, runs: list[dict[str, Any]]) -> None:
    """Replace a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps({"schema": SCHEMA, "runs": runs}, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    draft.replace(path)


def origin(runs: list[dict[str, Any]]) -> str:
    """Command, device, version of torch, commits and day of runs that belong together."""
    first = runs[0]
    commits = dict.fromkeys(
        ("an unknown commit" if run["git"] is None else f"commit `{run['git'][:12]}`")
        + (" with local changes" if run["dirty"] else "")
        for run in runs
    )
    torch = first["versions"].get("torch", "?")
    return f"`{first['command']}`, {first['device']}, torch {torch}, {', '.join(commits)}, {first['time'][:10]}."
