# SPDX-License-Identifier: Apache-2.0
"""Capture sites of a model over token chunks into a folder of `Activations`; can be interrupted and resumed."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from . import hooks
from .activations import Activations
from .batches import check_batch_size
from .kept import RowFilter
from .progress import token_progress
from .storage import STORED
from .tokens import TokenChunks
from .writer import Writer

_SAVE_EVERY_S = 5.0
_SHARD_BYTES = 256 << 20


def collect(
    model: nn.Module,
    chunks: TokenChunks | np.ndarray | Tensor,
    module: str | Sequence[str],
    path: str | Path,
    *,
    batch_size: int = 16,
    skip_positions: int = 2,
    outlier_factor: float | None = 10.0,
    drop_special: bool = True,
    nonfinite: str = "stop",
    dtype: str = "float16",
    shard_rows: int | None = None,
    source: str = "",
    model_sha256: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Activations:
    """Run `model` over `chunks` up to `module` and write its rows to the folder `path`.

    The forward pass ends at the last site; later blocks cost nothing. Chunks run in batches of similar length with an
    attention mask. A folder that holds the same inputs already (model weights, chunks, sites and the options below, by
    sha256) is reused; one that holds a part of them is continued, to the same bytes, also after a kill or a full disk:
    what is saved every 5 s is a whole number of batches that is safely on disk.

    Args:
        model: maps token ids ``[batch, ctx]``; a `transformers` model, or any module.
        chunks: `TokenChunks`, or token ids ``[chunks, ctx]``, integers.
        module: a site or several: ``"model.layers.11"`` is the output of that module (of a Llama model the residual
            stream after 12 blocks), ``"model.layers.11.mlp:in"`` the input of that one. Rows of several sites are side
            by side, ``[Σ d_i]``, in the order given.
        batch_size: chunks a forward pass.
        skip_positions, outlier_factor, drop_special, nonfinite: which rows are dropped, see
            `fusae.data.kept.RowFilter`; counts by reason are in `Activations.dropped`.
        dtype: as stored: ``"float32"``, ``"float16"``, ``"bfloat16"``, or ``"int8"`` with a scale for each row and
            site (max|x| / 127). What it loses is measured: `Activations.storage`.
        shard_rows: rows a shard file; None: about 256 MB.
        source: a name of model and text for reports; no part of what is compared.
        model_sha256: what `weights_sha256(model)` gave, to save the time where one model is used many times.
        overwrite: replace a folder that holds other inputs or is damaged.
        progress: show a bar with tokens/s and the time left.

    Raises:
        ValueError: a bad argument; `path` holds activations of other inputs or damaged ones; a value does not fit
            `dtype`; a row is not finite.
        OSError: the disk is full. What was saved before stays, and the next call goes on from there.
        KeyboardInterrupt: passed on after what is done was saved.
    """
    chunks = hooks.check_chunks(chunks, model)
    rows = RowFilter(skip_positions, outlier_factor, drop_special, nonfinite)
    rows.check(chunks.shape[1])
    check_batch_size(batch_size)
    if dtype not in STORED:
        raise ValueError(f"dtype must be one of {', '.join(map(repr, STORED))}, got {dtype!r}")
    if shard_rows is not None and (not isinstance(shard_rows, int) or shard_rows < 1):
        raise ValueError(f"shard_rows must be an integer of at least 1, or None, got {shard_rows!r}")
    sites = hooks.Sites.find(model, module)
    inputs = {
        "model_sha256": model_sha256 or weights_sha256(model),
        "chunks_sha256": chunks.sha256(),
        "chunks": chunks.shape[0],
        "ctx": chunks.shape[1],
        "module": module if isinstance(module, str) else list(module),
        "skip_positions": skip_positions,
        "outlier_factor": outlier_factor,
        "special": sorted(set(chunks.special)) if drop_special else [],
        "dtype": dtype,
    }
    path = Path(path)
    order = chunks.batches(batch_size)
    with Writer(path, inputs, source, batch_size, order, overwrite) as writer:
        if not writer.complete:
            with hooks.evaluating(model):
                _run(model, sites, chunks, order[writer.batches :], writer, rows, shard_rows, progress)
        acts = Activations(path, verify=False)  # opening looked at the sums, or they were taken a moment ago
    if nonfinite == "stop" and (lost := acts.dropped["nonfinite"]):
        raise ValueError(
            f"path: {path} was collected with nonfinite='drop' and lacks {lost} rows that were not finite; pass that, "
            "or choose another folder"
        )
    return acts


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
    model: nn.Module,
    sites: hooks.Sites,
    chunks: TokenChunks,
    order: list[np.ndarray],
    writer: Writer,
    rows: RowFilter,
    shard_rows: int | None,
    progress: bool,
) -> None:
    device = hooks.device_of(model)
    saved = time.monotonic()
    with token_progress(progress) as bar:
        task = bar.add_task("activations", total=sum(int(chunks.lengths[index].sum()) for index in order))
        for index in order:
            hidden = hooks.run_to(model, sites, *hooks.batch_of(chunks, index, device))
            if not writer.begun:
                assert sites.widths is not None
                size = hidden.shape[-1] * STORED[writer.inputs["dtype"]].itemsize
                writer.begin(sites.described, shard_rows or max(1, _SHARD_BYTES // size))
            keep, counts, limits = rows(hidden, writer.widths, chunks, index, writer.norm_limits)
            where = keep.nonzero().numpy()
            positions = np.stack([index[where[:, 0]], where[:, 1]], 1).astype("<i4")
            writer.append(hidden[keep.to(device)].float().cpu(), positions, len(index), counts, limits)
            bar.update(task, advance=int(chunks.lengths[index].sum()))
            if time.monotonic() - saved > _SAVE_EVERY_S:
                writer.save()
                saved = time.monotonic()
        writer.finish()
