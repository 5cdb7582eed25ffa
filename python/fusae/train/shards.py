# SPDX-License-Identifier: Apache-2.0
"""A checkpoint in several files: each rank's latents in one of its own, all else in the one that names them.

``checkpoint.safetensors`` holds what every rank has alike, and in its header the list ``shards``: file, first latent,
end, and the sha256 of every tensor. It is renamed into place after all of them are written, so that it is what makes a
save complete; until then the one before is. The shards lie in ``checkpoint.shards``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..formats.native import FormatError, _sha256, check_tensors, check_version, open_tensors

FORMAT, VERSION, FOLDER, FIELD = "fusae.Trainer.shard", 1, "checkpoint.shards", "shards"
# What has a row or an element for each latent; the first part of a name up to a dot counts.
_ROWS = ("W_enc", "b_enc", "W_dec", "r_mag", "b_mag", "tokens_since_fired")
# Bytes read at a time: bounds the scratch memory beside a large matrix.
_CHUNK = 64 << 20


class Part(NamedTuple):
    """Latents ``first`` to ``stop`` of m."""

    first: int
    stop: int
    m: int


def has_rows(name: str, tensor: Tensor) -> bool:
    """Whether a tensor of the state has its first dimension over the latents (a batch top-k's threshold is one)."""
    stem = name.split(".")[0]
    return stem in _ROWS or (stem == "threshold" and tensor.ndim == 1)


def remove_others(path: Path, keep: list[str]) -> None:
    """Remove all shards beside the checkpoint at `path` but those of the names in `keep`."""
    folder = path.parent / FOLDER
    if not folder.is_dir():
        return
    for file in folder.iterdir():
        if file.name not in keep:
            file.unlink(missing_ok=True)
    if not keep:
        folder.rmdir()


def files_of(about: Mapping[str, Any]) -> list[str]:
    """The names of the shards of a checkpoint; none where it is one file."""
    return [shard["file"] for shard in about.get(FIELD, [])]


def load(
    path: Path, file: Any, about: Mapping[str, Any], targets: dict[str, Tensor], part: Part | None
) -> None:
    """Read a checkpoint, in one file or in several, into the tensors of one process.

    Args:
        path: of the checkpoint; `file` and `about`: it, opened.
        targets: tensors by name, of the latents of `part` alone. ``rng_state`` is checked, not read.
        part: None: all latents.

    Raises:
        FormatError: a tensor or a shard is missing, damaged, of another save, or of another shape or dtype; raised
            before any is taken over.
    """
    rows = {name: target for name, target in targets.items() if has_rows(name, target)}
    m = len(rows["tokens_since_fired"]) if part is None else part.m
    part = Part(0, m, m) if part is None else part
    common = _shapes({name: target for name, target in targets.items() if name not in rows})
    if FIELD not in about:
        check_tensors(path, file, common | _shapes(rows, m))
        _check_sums(path, file, about.get("sha256"))
        sources = [(0, m, file)]
    else:
        check_tensors(path, file, common)
        _check_sums(path, file, about.get("sha256"))
        sources = _open(path, about, rows, part)
    with torch.no_grad():
        for name in common:
            if name != "rng_state":
                targets[name].copy_(file.get_tensor(name))
        for first, stop, source in sources:
            low, high = max(first, part.first), min(stop, part.stop)
            for name, target in rows.items():
                stored = source.get_slice(name)
                step = _step(target)
                for start in range(low, high, step):
                    end = min(start + step, high)
                    target[start - part.first : end - part.first].copy_(stored[start - first : end - first])


def _open(
    path: Path, about: Mapping[str, Any], rows: dict[str, Tensor], part: Part
) -> list[tuple[int, int, Any]]:
    """The shards that hold latents of `part`, open and checked: first latent, end, file."""
    listed, found, reached = about[FIELD], [], 0
    for shard in listed:
        first, stop = shard["first"], shard["stop"]
        if first != reached:
            raise FormatError(f"{path}: field 'shards': latents {reached} to {first} are in none of them")
        reached = stop
        name = path.parent / FOLDER / shard["file"]
        which = f"the checkpoint of step {about['step']} has its latents {first} to {stop - 1} there"
        if not name.is_file():
            raise FormatError(f"{name} is missing: {which}. Bring it back, or begin the run anew")
        if stop <= part.first or first >= part.stop:
            continue
        file, header = open_tensors(name, "a part of a checkpoint")
        check_version(name, header, FORMAT, VERSION)
        if header.get("save") != about.get("save"):
            raise FormatError(f"{name} is of another save, of step {header.get('step')}: {which}")
        check_tensors(name, file, _shapes(rows, stop - first))
        _check_sums(name, file, shard["sha256"])
        found.append((first, stop, file))
    if reached != part.m:
        raise FormatError(f"{path}: field 'shards' ends at latent {reached}, the configuration has m = {part.m}")
    return found


def _shapes(tensors: Mapping[str, Tensor], rows: int | None = None) -> dict[str, tuple[list[int], torch.dtype]]:
    """Shapes and dtypes, with as many `rows`."""
    return {
        name: (list(t.shape) if rows is None else [rows, *t.shape[1:]], t.dtype) for name, t in tensors.items()
    }


def _step(like: Tensor) -> int:
    return max(1, _CHUNK // max(1, like[:1].numel() * like.element_size()))


def _check_sums(path: Path, file: Any, sums: Any) -> None:
    """As `fusae.formats.native.check_sums`, some rows at a time."""
    if not isinstance(sums, dict):
        raise FormatError(f"{path}: field 'sha256' must be an object, got {type(sums).__name__}")
    for name in file.keys():  # noqa: SIM118  (safe_open is no mapping)
        stored = file.get_slice(name)
        shape = stored.get_shape()
        if not shape or 0 in shape:
            digest = _sha256(file.get_tensor(name))
        else:
            whole, step = hashlib.sha256(), _step(stored[:1])
            for start in range(0, shape[0], step):
                rows = stored[start : min(start + step, shape[0])].contiguous()
                whole.update(rows.reshape(-1).view(torch.uint8).numpy())
            digest = whole.hexdigest()
        if digest != sums.get(name):
            raise FormatError(f"{path}: {name} is damaged: its sha256 is not the one noted when it was written")
