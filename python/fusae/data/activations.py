# SPDX-License-Identifier: Apache-2.0
"""Activations on disk: rows in memory-mapped shards, where each came from, and shuffled batches of them.

A folder holds, for each shard of at most ``shard_rows`` rows:

=======================  ==========================================================================================
``rows-00000.npy``       ``[rows, d]`` float32, float16, int8, or uint16 that are the bits of bfloat16
``scales-00000.npy``     ``[rows, sites]`` float32, with int8 alone: a value is its int8 times its row's scale there
``positions-00000.npy``  ``[rows, 2]`` int32: chunk and position of each row
=======================  ==========================================================================================

and ``activations.json``: what they are of (inputs with sha256, sites), what was dropped, how they are stored and what
that lost, sha256 of every shard. `fusae.data.collect` writes it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import mmap
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .batches import Batches
from .shards import Mapped, check_sha256, check_shard, shard_name, shard_sizes
from .storage import POSITIONS, ROWS, SCALES, STORED, decode, layout_of

FORMAT = "fusae-activations-2"
META = "activations.json"
# What a description must have, and of which type.
_FIELDS = {"complete": bool, "cursor": dict, "inputs": dict, "rows": int, "d": int, "sites": list, "storage": dict,
           "dropped": dict, "norm_limit": (type(None), list), "sha256": dict}  # fmt: skip
AGAIN = "put back the file that was there, or collect again with overwrite=True"


class Activations:
    """Rows ``[rows, d]`` captured from a model, memory-mapped from a folder.

    Attributes:
        meta: the content of ``activations.json``.
    """

    def __init__(self, path: str | Path, verify: bool = True) -> None:
        """Open the folder `path`. Size and dtype of every shard are checked; with `verify` its sha256 too (about a
        second per GB).

        Raises `FileNotFoundError` if there is none, `ValueError` if it is unfinished, of another format, or a shard is
        missing, truncated, damaged or another one.
        """
        self.path = Path(path)
        self.meta = read_meta(self.path)
        if not self.meta["complete"]:
            done, total = self.meta["cursor"].get("chunks"), self.meta["inputs"].get("chunks")
            raise ValueError(
                f"path: {self.path} is unfinished ({done} of {total} chunks); run collect again with the same inputs "
                "to go on from there"
            )
        storage = self.meta["storage"]
        self._dtype = storage["dtype"]
        self._widths = [site["width"] for site in self.meta["sites"]]
        self._sizes = shard_sizes(self.meta["rows"], storage["shard_rows"])
        self._layout = layout_of(self._dtype, self._widths)
        names = [(stem, shard) for shard in range(len(self._sizes)) for stem in self._layout]
        for stem, shard in names:
            check_shard(self._file(stem, shard), self._sizes[shard], *self._layout[stem], AGAIN)
        for stem, shard in names if verify else ():
            check_sha256(self._file(stem, shard), self.meta["sha256"], AGAIN)
        self._bounds = np.cumsum([0, *self._sizes])
        self._maps = {stem: self._map(stem) for stem in self._layout if stem != POSITIONS}
        self._positions: np.ndarray | None = None
        self._mean: Tensor | None = None

    def _file(self, stem: str, shard: int) -> Path:
        return self.path / shard_name(stem, shard)

    def _map(self, stem: str) -> list[Mapped]:
        return [Mapped(self._file(stem, i), size, *self._layout[stem]) for i, size in enumerate(self._sizes)]

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, d)``"""
        return self.meta["rows"], self.meta["d"]

    def __len__(self) -> int:
        return self.meta["rows"]

    def __repr__(self) -> str:
        inputs, fvu = self.meta["inputs"], self.meta["storage"]["fvu"]
        sites = ", ".join(site["module"] + (":in" if site["side"] == "in" else "") for site in self.meta["sites"])
        loss = "" if self._dtype == "float32" else f" (FVU {fvu:.2g})"
        return f"Activations({list(self.shape)} {self._dtype}{loss}, {sites} of {inputs['source']}, {self.path})"

    @property
    def bytes(self) -> int:
        """What the rows take on disk, without their positions."""
        return len(self) * sum(c * dtype.itemsize for stem, (c, dtype) in self._layout.items() if stem != POSITIONS)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hexadecimal, over the sums of all shards: two stores with the same one hold the same rows in one order."""
        names = [shard_name(stem, shard) for stem in self._maps for shard in range(len(self._sizes))]
        return hashlib.sha256(" ".join([self._dtype, *(self.meta["sha256"][n] for n in names)]).encode()).hexdigest()

    @property
    def positions(self) -> np.ndarray:
        """``[rows, 2]`` int32, (chunk, position) of each row.

        The rows of a chunk lie together and in the order of their positions. Chunks come in the order in which they
        were run: ascending where all have one length, else ascending within each batch. Read when first asked for (8
        bytes a row).
        """
        if self._positions is None:
            self._positions = np.concatenate([shard.array for shard in self._map(POSITIONS)])
            self._positions.flags.writeable = False
        return self._positions

    @property
    def norm_limit(self) -> float | tuple[float, ...] | None:
        """Rows with a larger norm were dropped; one for each site if there are several; None: switched off."""
        limits = self.meta["norm_limit"]
        return limits if limits is None else limits[0] if len(limits) == 1 else tuple(limits)

    @property
    def dropped(self) -> dict[str, int]:
        """Rows that are not in the store, by reason, each counted once; see `fusae.data.kept.RowFilter`."""
        return dict(self.meta["dropped"])

    @property
    def inputs(self) -> dict[str, Any]:
        """What the rows were computed from, and with which options."""
        return dict(self.meta["inputs"])

    @property
    def sites(self) -> list[dict[str, Any]]:
        """``[{"module", "side": "out" or "in", "width"}]``, in the order in which they make up a row."""
        return [dict(site) for site in self.meta["sites"]]

    @property
    def storage(self) -> dict[str, Any]:
        """``{"dtype", "fvu", "shard_rows"}``; ``fvu``: Σ‖x − stored‖² / Σ‖x − mean‖², measured over all rows."""
        return dict(self.meta["storage"])

    def mean(self) -> Tensor:
        """The mean row ``[d]`` in float64, over all rows; computed once."""
        if self._mean is None:
            total = torch.zeros(self.shape[1], dtype=torch.float64)
            for start in range(0, len(self), 256):  # few at a time: their float64 copies stay in cache
                total += self.take(slice(start, start + 256)).double().sum(0)
            self._mean = total / len(self)
        return self._mean

    def take(self, index: Any) -> Tensor:
        """Rows as an fp32 tensor ``[n, d]``; `index` is a slice or an integer array. Quickest where it ascends."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            index = np.arange(start, stop, step)
        index = np.asarray(index)
        if index.ndim != 1 or not (np.issubdtype(index.dtype, np.integer) or index.size == 0):
            raise TypeError(f"index must be a slice or integers [n], got {list(index.shape)} {index.dtype}")
        index = index.astype(np.int64, copy=False)
        if index.size and not (-len(self) <= index.min() and index.max() < len(self)):
            raise IndexError(f"index must lie in 0..{len(self) - 1}, got {index.min()} to {index.max()}")
        index = np.where(index < 0, index + len(self), index)
        ascending = bool((index[1:] >= index[:-1]).all())
        order = None if ascending else np.argsort(index, kind="stable")
        gathered = {stem: self._gather(stem, index if order is None else index[order]) for stem in self._maps}
        x = decode(gathered[ROWS], gathered.get(SCALES), self._dtype, self._widths)
        if order is None:
            return x
        back = torch.empty_like(x)
        back[torch.from_numpy(order)] = x
        return back

    def _gather(self, stem: str, index: np.ndarray) -> np.ndarray:
        columns, dtype = self._layout[stem]
        out = np.empty((len(index), columns), dtype)
        cuts = np.searchsorted(index, self._bounds)
        for shard, (start, stop) in enumerate(pairwise(cuts)):
            if start < stop:
                # 'clip': any other mode would gather into a buffer first. The bounds were checked.
                local = index[start:stop] - self._bounds[shard]
                np.take(self._maps[stem][shard].array, local, axis=0, out=out[start:stop], mode="clip")
        return out

    def expect(self, start: int, stop: int) -> None:
        """A hint: these rows will be asked for soon. Their pages begin to be read."""
        first, last = np.searchsorted(self._bounds, [start, stop - 1], side="right") - 1
        for shard in range(first, last + 1):
            low = max(0, start - int(self._bounds[shard]))
            for shards in self._maps.values():
                shards[shard].advise(mmap.MADV_WILLNEED, low, min(self._sizes[shard], stop - int(self._bounds[shard])))

    def release(self) -> None:
        """Let go of the pages that were read; they are mapped again where they are asked for."""
        for shard in (shard for shards in self._maps.values() for shard in shards):
            shard.advise(mmap.MADV_DONTNEED, 0, len(shard.array))

    def batches(
        self,
        batch_size: int,
        seed: int = 0,
        epochs: int | None = 1,
        *,
        shuffle: bool = True,
        drop_last: bool = True,
        shuffle_rows: int | None = None,
    ) -> Batches:
        """Shuffled fp32 batches ``[batch_size, d]`` of torch tensors; see `Batches`."""
        options = {"shuffle": shuffle, "drop_last": drop_last, "shuffle_rows": shuffle_rows}
        return Batches(self, batch_size, seed, epochs, **options)


def read_meta(path: Path) -> dict[str, Any]:
    """The description in the folder `path`; `FileNotFoundError` or `ValueError` if there is none that can be used."""
    file = path / META
    if not file.exists():
        raise FileNotFoundError(f"path: {path} holds no activations ({META} is not there)")
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
        found = meta["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"path: {file} is damaged or of another format ({error}); {AGAIN}") from error
    if found == "fusae-activations-1":
        raise ValueError(
            f"path: {path} was written by an earlier version (format {found}), which is no longer read; collect again "
            "with overwrite=True or into another folder"
        )
    if found != FORMAT:
        raise ValueError(f"path: {file} has format {found!r}, expected {FORMAT!r}; {AGAIN}")
    if wrong := _wrong(meta):
        raise ValueError(f"path: {file} is damaged ({wrong}); {AGAIN}")
    return meta


def _wrong(meta: dict[str, Any]) -> str | None:
    """What a description says that cannot be."""
    for name, kind in _FIELDS.items():
        if name not in meta:
            return f"it lacks {name!r}"
        if not isinstance(meta[name], kind):
            return f"{name} is {meta[name]!r}"
    storage, sites = meta["storage"], meta["sites"]
    if storage.get("dtype") not in STORED:
        return f"the rows are stored as {storage.get('dtype')!r}, known are {', '.join(STORED)}"
    if not isinstance(storage.get("fvu"), float):
        return f"the measured loss of storage is {storage.get('fvu')!r}"
    if not all(isinstance(site, dict) and {"module", "side", "width"} <= set(site) for site in sites):
        return f"sites is {sites!r}"
    widths = [site["width"] for site in sites]
    for name, value in (("d", meta["d"]), ("shard_rows", storage.get("shard_rows")), *(("width", w) for w in widths)):
        if not isinstance(value, int) or value < 1:
            return f"{name} is {value!r}"
    if sum(widths) != meta["d"]:
        return f"d is {meta['d']}, its sites have widths {widths}"
    if meta["rows"] < (1 if meta["complete"] else 0):
        return f"rows is {meta['rows']}"
    return None
