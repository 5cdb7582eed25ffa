# SPDX-License-Identifier: Apache-2.0
"""Capture a module's output over token chunks into a folder of `Activations`; can be interrupted and resumed."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import hooks
from .activations import FORMAT, META, POSITIONS, ROWS, Activations, file_sha256, read_meta
from .progress import token_progress
from .tokens import TokenChunks

_SAVE_EVERY_S = 5.0


def collect(
    model: nn.Module,
    chunks: TokenChunks | np.ndarray | Tensor,
    module: str | Sequence[str],
    path: str | Path,
    *,
    batch_size: int = 16,
    skip_positions: int = 2,
    outlier_factor: float | None = 10.0,
    dtype: str = "float16",
    source: str = "",
    model_sha256: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Activations:
    """Run `model` over `chunks` up to `module` and write its output rows to the folder `path`.

    The forward pass ends at `module`; later blocks cost nothing. A folder that holds the same inputs already (model
    weights, chunks, module and the options below, by sha256) is reused; one that holds a part of them is continued, to
    the same bytes.

    Args:
        model: maps token ids ``[batch, ctx]``; a `transformers` model, or any module.
        chunks: `TokenChunks`, or token ids ``[chunks, ctx]``, integers.
        module: one or several sites (`fusae.data.hooks.Sites`), e.g. ``"model.layers.11"``: the residual
            stream after 12 blocks of a Llama model.
        batch_size: chunks a forward pass.
        skip_positions: so many first positions of each chunk are dropped. Position 0 always sees the same, and the
            first word after it is often an attention sink.
        outlier_factor: rows whose norm exceeds this many times the median norm of the first batch are dropped
            (attention sinks); None keeps all.
        dtype: ``"float16"`` or ``"float32"``, as stored.
        source: a name of model and text for reports; no part of what is compared.
        model_sha256: what `weights_sha256(model)` gave, to save the time where one model is used many times.
        overwrite: replace a folder that holds other inputs or is damaged.
        progress: show a bar with tokens/s and the time left.

    Raises:
        ValueError: a bad argument; `path` holds activations of other inputs or damaged ones; a value does not fit
            float16.
        KeyboardInterrupt: passed on after what is done was saved.
    """
    chunks = hooks.check_chunks(chunks, model)
    hooks.check_row_options(chunks.shape[1], skip_positions, outlier_factor)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
    if dtype not in ("float16", "float32"):
        raise ValueError(f"dtype must be 'float16' or 'float32', got {dtype!r}")
    sites = hooks.Sites.find(model, module)
    inputs = {
        "model_sha256": model_sha256 or weights_sha256(model),
        "chunks_sha256": chunks.sha256(),
        "chunks": chunks.shape[0],
        "ctx": chunks.shape[1],
        "module": module if isinstance(module, str) else list(module),
        "skip_positions": skip_positions,
        "outlier_factor": outlier_factor,
        "dtype": dtype,
    }
    path = Path(path)
    writer = _Writer.open(path, inputs, source, overwrite)
    if writer is None:
        try:
            return Activations(path)
        except ValueError:
            if not overwrite:
                raise
            writer = _Writer(path, inputs, source)
    with writer, hooks.evaluating(model):
        _run(model, sites, chunks, writer, batch_size, progress)
    return Activations(path, verify=False)  # the sums were taken from the files a moment ago


def weights_sha256(model: nn.Module) -> str:
    """sha256 over names, shapes, dtypes and bytes of all parameters and saved buffers (1 to 5 s per GB)."""
    digest = hashlib.sha256()
    first_name: dict[tuple, str] = {}
    for name, tensor in sorted(model.state_dict().items()):
        # Tied weights, such as embedding and unembedding, are read once.
        same = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        first = first_name.setdefault(same, name) if tensor.numel() else name
        digest.update(f"{name} = {first} {list(tensor.shape)} {tensor.dtype}\n".encode())
        if first == name:
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _run(
    model: nn.Module, sites: hooks.Sites, chunks: TokenChunks, writer: _Writer, batch_size: int, progress: bool
) -> None:
    total = len(chunks)
    skip, factor = writer.inputs["skip_positions"], writer.inputs["outlier_factor"]
    device = hooks.device_of(model)
    saved = time.monotonic()
    with token_progress(progress) as bar:
        task = bar.add_task("activations", total=int(chunks.lengths[writer.at.chunks :].sum()))
        while writer.at.chunks < total:
            first, last = writer.at.chunks, min(writer.at.chunks + batch_size, total)
            ids, mask = hooks.batch_of(chunks, slice(first, last), device)
            hidden = hooks.run_to(model, sites, ids, mask)
            if writer.first_batch:
                writer.begin(hidden.shape[-1], hooks.norm_limit_of(hidden, skip, factor, mask))
            use = hooks.rows_to_use(hidden, skip, writer.norm_limit, mask)
            lengths = chunks.lengths[first:last]
            skipped = int(np.minimum(lengths, skip).sum())
            writer.append(
                hidden[use],
                use.nonzero() + torch.tensor([first, 0], device=device),
                chunks=last - first,
                first_positions=skipped,
                norm_outliers=int(lengths.sum()) - skipped - int(use.sum()),
            )
            bar.update(task, advance=int(lengths.sum()))
            if time.monotonic() - saved > _SAVE_EVERY_S:
                writer.save()
                saved = time.monotonic()
        writer.finish()


@dataclasses.dataclass(frozen=True)
class _Cursor:
    chunks: int = 0
    rows: int = 0
    first_positions: int = 0
    norm_outliers: int = 0


class _Writer:
    """The two growing arrays and their description, which always names a prefix of the arrays that is safely on disk.

    Bytes beyond the cursor (of a run that was killed) are cut off on opening. As a context manager it saves the cursor
    on the way out, whatever the reason.
    """

    def __init__(self, path: Path, inputs: dict[str, Any], source: str) -> None:
        self.path, self.inputs, self.source = path, inputs, source
        self.at = _Cursor()
        self.width = 0
        self.norm_limit: float | None = None
        self._files: dict[str, Any] = {}
        self._complete = False

    @classmethod
    def open(cls, path: Path, inputs: dict[str, Any], source: str, overwrite: bool) -> _Writer | None:
        """A writer placed where the folder's content ends, or None if the folder is complete."""
        writer = cls(path, inputs, source)
        path.mkdir(parents=True, exist_ok=True)
        if not (path / META).exists():
            return writer
        try:
            meta = read_meta(path)
            other = [name for name, value in inputs.items() if meta["inputs"].get(name) != value]
            if other:
                was = ", ".join(f"{name} {meta['inputs'].get(name)!r} (now {inputs[name]!r})" for name in other)
                raise ValueError(
                    f"path: {path} holds activations of other inputs: {was}. "
                    "Choose another folder or pass overwrite=True."
                )
            if meta["complete"]:
                return None
            writer._continue(meta)
        except ValueError:
            if not overwrite:
                raise
            return cls(path, inputs, source)
        return writer

    @property
    def first_batch(self) -> bool:
        return not self._files

    def _layout(self) -> dict[str, tuple[int, np.dtype]]:
        return {ROWS: (self.width, np.dtype(self.inputs["dtype"])), POSITIONS: (2, np.dtype(np.int32))}

    def begin(self, width: int, norm_limit: float | None) -> None:
        self.width, self.norm_limit = width, norm_limit
        (self.path / META).unlink(missing_ok=True)
        for name, (columns, dtype) in self._layout().items():
            self._files[name] = open(self.path / name, "w+b")
            self._files[name].write(_npy_header(0, columns, dtype))

    def _continue(self, meta: dict[str, Any]) -> None:
        self.width, self.norm_limit = meta["d"], meta["norm_limit"]
        self.at = _Cursor(meta["cursor"]["chunks"], meta["rows"], **meta["dropped"])
        for name, (columns, dtype) in self._layout().items():
            path, size = self.path / name, _npy_size(self.at.rows, columns, dtype)
            if not path.exists() or path.stat().st_size < size:
                raise ValueError(
                    f"path: {path} is shorter than the {self.at.rows} rows its description names, so it cannot be "
                    "continued; pass overwrite=True to begin anew"
                )
        for name, (columns, dtype) in self._layout().items():
            size = _npy_size(self.at.rows, columns, dtype)
            self._files[name] = open(self.path / name, "r+b")
            self._files[name].truncate(size)
            self._files[name].seek(size)

    def append(self, rows: Tensor, positions: Tensor, **counts: int) -> None:
        stored = rows.to(dtype=getattr(torch, self.inputs["dtype"])).cpu()
        if self.inputs["dtype"] == "float16" and not torch.equal(stored.isfinite(), rows.cpu().isfinite()):
            raise ValueError(
                f"dtype: a value of {float(rows.abs().max()):.3g} does not fit float16 (65504); pass dtype='float32' "
                "or a lower outlier_factor"
            )
        self._files[ROWS].write(stored.contiguous().numpy().data)
        self._files[POSITIONS].write(positions.to(torch.int32).cpu().contiguous().numpy().data)
        # One assignment: wherever Ctrl-C strikes, the cursor names whole batches that are in the files.
        was = dataclasses.asdict(self.at)
        counts["rows"] = rows.shape[0]
        self.at = _Cursor(**{name: was[name] + counts[name] for name in was})

    def save(self) -> None:
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self._describe({})

    def finish(self) -> None:
        if self.at.rows == 0:
            raise ValueError("skip_positions and outlier_factor leave no row at all; check the model and the chunks")
        for name, (columns, dtype) in self._layout().items():
            file = self._files[name]
            file.seek(0)
            file.write(_npy_header(self.at.rows, columns, dtype))
        self.save()
        self._complete = True
        self._describe({name: file_sha256(self.path / name) for name in self._layout()})

    def _describe(self, sums: dict[str, str]) -> None:
        meta = {
            "format": FORMAT,
            "complete": self._complete,
            "cursor": {"chunks": self.at.chunks},
            "rows": self.at.rows,
            "d": self.width,
            "norm_limit": self.norm_limit,
            "dropped": {"first_positions": self.at.first_positions, "norm_outliers": self.at.norm_outliers},
            "sha256": sums,
            "inputs": {**self.inputs, "source": self.source},
        }
        partial = self.path / f".{META}.{os.getpid()}"
        partial.write_text(json.dumps(meta, indent=1), encoding="utf-8")
        os.replace(partial, self.path / META)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self.at.chunks and not self._complete:
                self.save()
        finally:
            for file in self._files.values():
                file.close()


def _npy_header(rows: int, columns: int, dtype: np.dtype) -> bytes:
    """numpy pads the header so that the first axis can grow: its length does not depend on `rows`."""
    out = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows, columns)}
    np.lib.format.write_array_header_1_0(out, header)
    return out.getvalue()


def _npy_size(rows: int, columns: int, dtype: np.dtype) -> int:
    return len(_npy_header(0, columns, dtype)) + rows * columns * dtype.itemsize
