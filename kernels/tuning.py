# SPDX-License-Identifier: Apache-2.0
"""Tiles of the GEMMs: a heuristic, unless a table for the device says better.

Order: the heuristic (`encode_plan.default_tiles`); ``tuned/<device>.json`` beside this file; with ``FUSAE_AUTOTUNE=1``
the same file in the user's cache (``~/.cache/fusae``), and where neither has an entry, one is measured (`autotune`, a
minute or two, once) and written there. A file is ``{"encode": {"<dtype> d<size class>": {"BM": 128, ...}}}``, its name
that of the device in lower case with ``-`` for anything else. To ship what was measured, copy it into ``tuned/``.

Tiles depend on the dtype and on d alone, so results never depend on n, m or k. Other tiles may add in another order:
results may differ in their last bits from device to device, and from those without ``FUSAE_AUTOTUNE``.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from .common import INTERPRETED
from .encode_plan import Tiles

LOG = logging.getLogger("fusae")
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


FIELDS = {"BM": (16, 256), "BN": (16, 512), "BK": (16, 128), "warps": (1, 16), "stages": (1, 8), "group": (1, 64),
          "parts": (1, 8)}  # fmt: skip
"""Least and largest value of every field; all but stages and group are powers of two."""


@functools.cache
def _read(path: Path) -> dict[str, dict[str, dict[str, int]]]:
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text())
        for entries in table.values():
            for fields in entries.values():
                for name, value in fields.items():
                    least, most = FIELDS[name]
                    free = name in ("stages", "group")
                    if type(value) is not int or not least <= value <= most or not free and value & (value - 1):
                        raise ValueError(f"{name} {value!r}")
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} must be {{op: {{key: {{field: number}}}}}} with fields {', '.join(FIELDS)}, got {error}; "
            "mend it, or delete it (FUSAE_AUTOTUNE=1 measures anew)"
        ) from error
    return table


@functools.lru_cache(maxsize=1024)
def entry(
    op: str, device_name: str, dtype: torch.dtype, d: int, folders: tuple[Path, ...]
) -> dict[str, int] | None:
    """The fields that the last folder with an entry has."""
    found = None
    for folder in folders:
        found = _read(folder / f"{slug(device_name)}.json").get(op, {}).get(key(dtype, d), found)
    return found


def lookup(op: str, device_name: str, dtype: torch.dtype, d: int, default: Tiles, folders: tuple[Path, ...]) -> Tiles:
    """The tiles of the last folder that has an entry, else `default`."""
    return default._replace(**(entry(op, device_name, dtype, d, folders) or {}))


def write(op: str, device_name: str, dtype: torch.dtype, d: int, tiles: Tiles, folder: Path) -> Path:
    """Add one entry to the device's file; whoever reads it meanwhile sees the old or the new one."""
    path = folder / f"{slug(device_name)}.json"
    _read.cache_clear()
    table = dict(_read(path))
    table[op] = {**table.get(op, {}), key(dtype, d): tiles._asdict()}
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    part.replace(path)
    _read.cache_clear()
    entry.cache_clear()
    return path


_measured: dict[tuple[str, str, str], Tiles] = {}


def tuned(
    op: str, device: torch.device, dtype: torch.dtype, d: int, default: Tiles, search: Callable[[], Tiles]
) -> Tiles:
    """The tiles of `op` on `device`; `search` measures them."""
    if INTERPRETED:
        return default
    name, cache = torch.cuda.get_device_name(device), cache_folder() if autotuning() else None
    # While a CUDA graph is captured nothing can be measured.
    capturing = cache is not None and torch.cuda.is_current_stream_capturing()
    return choose(op, name, dtype, d, default, None if capturing else search, SHIPPED, cache)


def choose(
    op: str, device_name: str, dtype: torch.dtype, d: int, default: Tiles, search: Callable[[], Tiles] | None,
    shipped: Path, cache: Path | None,
) -> Tiles:  # fmt: skip
    """The tiles of the tables; with a `cache`, measured and written there if they have none. Once in a process."""
    place = (op, device_name, key(dtype, d))
    if cache is None:
        return lookup(op, device_name, dtype, d, default, (shipped,))
    if place in _measured:
        return _measured[place]
    if search is None or entry(op, device_name, dtype, d, (shipped, cache)) is not None:
        return lookup(op, device_name, dtype, d, default, (shipped, cache))
    LOG.info("measuring tiles of %s for %s on %s (FUSAE_AUTOTUNE=1)", op, place[2], device_name)
    found = search()
    _measured[place] = found
    try:
        write(op, device_name, dtype, d, found, cache)
    except OSError as error:
        warnings.warn(f"the measured tiles are not kept, {cache} cannot be written: {error}", stacklevel=2)
    return found
