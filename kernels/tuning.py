# SPDX-License-Identifier: Apache-2.0
"""Tiles of the GEMMs: a heuristic, unless a table for the device says better.

Order: the heuristic (`encode_plan.default_tiles`); ``tuned/<device>.json`` beside this file; with ``FUSAE_AUTOTUNE=1``
the same file in the user's cache (``~/.cache/fusae``), written when a shape is met that it does not hold. A file is
``{"encode": {"<dtype> d<size class>": {"BM": 128, ...}}}``; a device's name in lower case with ``-`` for anything else.
Tiles depend on the dtype and on d alone, so results never depend on n, m or k; they may differ from device to device.
"""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path

import torch

from .common import INTERPRETED
from .encode_plan import Tiles

SHIPPED = Path(__file__).parent / "tuned"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fusae"


def key(dtype: torch.dtype, d: int) -> str:
    """One entry for a power of two of widths."""
    return f"{str(dtype).removeprefix('torch.')} d{1 << max(0, d - 1).bit_length()}"


def autotuning() -> bool:
    return os.environ.get("FUSAE_AUTOTUNE") == "1"


@functools.cache
def _read(path: Path) -> dict[str, dict[str, dict[str, int]]]:
    return json.loads(path.read_text()) if path.is_file() else {}


def lookup(op: str, device_name: str, dtype: torch.dtype, d: int, default: Tiles, folders: tuple[Path, ...]) -> Tiles:
    """The tiles of the last folder that has an entry, else `default`."""
    found = default
    for folder in folders:
        entry = _read(folder / f"{slug(device_name)}.json").get(op, {}).get(key(dtype, d))
        if entry is not None:
            found = default._replace(**entry)
    return found


def write(op: str, device_name: str, dtype: torch.dtype, d: int, tiles: Tiles, folder: Path) -> Path:
    """Add one entry to the device's file; whoever reads it meanwhile sees the old or the new one."""
    path = folder / f"{slug(device_name)}.json"
    table = json.loads(path.read_text()) if path.is_file() else {}
    table.setdefault(op, {})[key(dtype, d)] = tiles._asdict()
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    part.replace(path)
    _read.cache_clear()
    return path


def tuned(op: str, device: torch.device, dtype: torch.dtype, d: int, default: Tiles) -> Tiles:
    if INTERPRETED:
        return default
    return _tuned(op, torch.cuda.get_device_name(device), dtype, d, default, autotuning())


@functools.cache
def _tuned(op: str, name: str, dtype: torch.dtype, d: int, default: Tiles, auto: bool) -> Tiles:
    return lookup(op, name, dtype, d, default, (SHIPPED, cache_folder()) if auto else (SHIPPED,))
