# SPDX-License-Identifier: Apache-2.0
"""What a trainer can train on: rows in memory, a ``.npy`` file, a folder of activations, or any object with batches."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import Activations, ActivationStream, Batches
from ..data.activations import META

# Rows that stand for all others in the fingerprint: enough to tell two data sets apart, quick on a large file.
_SAMPLED = 512


class Rows:
    """Rows ``[n, d]`` of a tensor, an array or a memory map, in shuffled batches.

    Args:
        rows: floating-point, ``[n, d]``. Batches come in float32 (float64 for float64 rows).
        name: what to call it in messages and in config.json.
    """

    def __init__(self, rows: Tensor | np.ndarray, name: str = "data") -> None:
        if rows.ndim != 2:
            raise ValueError(f"{name} must have shape [n, d], one row per token, got {list(rows.shape)}")
        if 0 in rows.shape:
            raise ValueError(f"{name} must hold at least one row of at least one value, got shape {list(rows.shape)}")
        floating = rows.is_floating_point() if isinstance(rows, Tensor) else rows.dtype.kind == "f"
        if not floating:
            raise TypeError(f"{name} must hold floating-point values, got {rows.dtype}")
        self.rows = rows.detach() if isinstance(rows, Tensor) else rows
        self.name = name
        self.shape = (int(rows.shape[0]), int(rows.shape[1]))
        # `Batches` identifies its data by this sum, so that a run is not resumed on other data.
        self.fingerprint = self._fingerprint()

    def __len__(self) -> int:
        return self.shape[0]

    def take(self, index: Any) -> Tensor:
        """Rows at a slice or an integer array; of a float32 or float64 tensor, a slice is a view and not a copy."""
        if isinstance(self.rows, Tensor):
            part = self.rows[torch.from_numpy(index) if isinstance(index, np.ndarray) else index]
        else:
            part = torch.from_numpy(np.array(self.rows[index], order="C"))
        return part if part.dtype == torch.float64 else part.float()

    def batches(
        self, batch_size: int, seed: int = 0, epochs: int | None = 1, shuffle_rows: int | None = None
    ) -> Batches:
        return Batches(self, batch_size, seed, epochs, shuffle_rows=shuffle_rows)

    def _fingerprint(self) -> str:
        places = np.linspace(0, len(self) - 1, min(_SAMPLED, len(self))).astype(np.int64)
        digest = hashlib.sha256(f"{list(self.shape)} {self.rows.dtype}".encode())
        digest.update(self.take(places).cpu().numpy().tobytes())
        return digest.hexdigest()


def open_data(data: Any) -> Any:
    """A source of batches: an object with ``batches(batch_size, seed, epochs)`` and ``shape``.

    Args:
        data: such an object; a tensor or array ``[n, d]``; the path of a ``.npy`` file; the path of a folder that
            `fusae.data.collect` wrote.

    Raises:
        FileNotFoundError, ValueError, TypeError: naming the path or the type, and what was wanted.
    """
    if isinstance(data, (Tensor, np.ndarray)):
        return Rows(data)
    if hasattr(data, "batches"):
        return data
    if not isinstance(data, (str, Path)):
        raise TypeError(
            "data must be a tensor or array [n, d], a path, or an object with batches(batch_size, seed, epochs), got "
            f"{type(data).__name__}"
        )
    path = Path(data)
    if path.is_dir():
        if not (path / META).exists():
            raise ValueError(f"data: the folder {path} holds no activations ({META} is not there)")
        return Activations(path)
    if not path.is_file():
        raise FileNotFoundError(f"data: {path} is not there; expected a .npy file or a folder of activations")
    if path.suffix != ".npy":
        raise ValueError(f"data: {path} must be a .npy file [n, d] or a folder of activations")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"data: {path} is truncated, damaged or no .npy file ({error})") from error
    return Rows(array, str(path))


def describe(source: Any) -> dict[str, Any]:
    """What config.json says about the data: plain values."""
    about: dict[str, Any] = {"rows": source.shape[0], "d": source.shape[1]}
    if isinstance(source, (Activations, ActivationStream)):
        about["model"] = source.inputs["source"]
        about.update({k: v for k, v in source.inputs.items() if isinstance(v, (str, int, float, bool))})
        about["sites"] = source.sites
        if isinstance(source, Activations):
            about |= {"path": str(source.path.resolve()), "dropped": source.dropped, "storage": source.storage}
    elif isinstance(source, Rows) and Path(source.name).suffix == ".npy":
        about["path"] = str(Path(source.name).resolve())
    return about
