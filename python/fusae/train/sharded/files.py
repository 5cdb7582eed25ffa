# SPDX-License-Identifier: Apache-2.0
"""What the ranks of a run write together: its checkpoints, and the finished coder."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from ...formats.native import _described, open_tensors, remove_scratch, replacing, write_json, write_tensors
from ...nn import SparseCoder
from ...nn.coder import FORMAT, STEM, VERSION
from .. import checkpoint, shards
from .mesh import Mesh

if TYPE_CHECKING:
    from .trainer import ShardedTrainer

# Bytes that travel at a time.
_CHUNK = 64 << 20
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.uint8: "U8",
}  # fmt: skip


def together(mesh: Mesh, work: Callable[[], Any]) -> list[Any]:
    """What `work` returns on every rank. Where it raises an `OSError` on one, all raise it, and know that they do."""
    try:
        found = (work(), None)
    except OSError as error:
        found = (None, error)
    every = mesh.objects(found)
    for rank, (_, error) in enumerate(every):
        if error is not None:
            raise OSError(error.errno, f"rank {rank}: {error.strerror or error}") from error
    return [value for value, _ in every]


def save_checkpoint(trainer: ShardedTrainer, path: Path) -> None:
    """Every rank's latents, then all else: see `fusae.train.shards`. Until the last rename, the one before is kept.

    Raises:
        OSError: on all ranks, where one could not write; the checkpoint before is kept.
    """
    mesh, part = trainer.mesh, trainer.part
    every = checkpoint.tensors(trainer)
    rows = {name: value for name, value in every.items() if shards.has_rows(name, value)}
    mark = mesh.first(lambda: secrets.token_hex(8))
    stem = f"step-{trainer.step}-{mark[:8]}-{mesh.latent_rank + 1}-of-{mesh.latents}"
    own = path.parent / shards.FOLDER / f"{stem}.safetensors"

    def write_own() -> dict[str, Any] | None:
        if mesh.data_rank:
            return None  # another rank has the same
        about = {"format": shards.FORMAT, "version": shards.VERSION, "save": mark, "step": trainer.step}
        write_tensors(own, rows, about)
        sums = open_tensors(own, "")[1]["sha256"]
        return {"file": own.name, "first": part.first, "stop": part.stop, "sha256": sums}

    def write_rest() -> None:
        if mesh.rank == 0:
            common = {name: value for name, value in every.items() if name not in rows}
            write_tensors(path, common, checkpoint.about(trainer) | {"save": mark, shards.FIELD: listed})
            shards.remove_others(path, [shard["file"] for shard in listed])

    try:
        listed = [shard for shard in together(mesh, write_own) if shard is not None]
    except OSError:
        own.unlink(missing_ok=True)
        raise
    together(mesh, write_rest)


def save_coder(coder: SparseCoder, mesh: Mesh, part: shards.Part, fields: dict[str, int], folder: Path) -> None:
    """Write what ``SparseCoder.save`` writes of a coder of all latents, in pieces: no rank ever holds all of them.

    Args:
        coder: of this rank's latents.
        fields: of the configuration of the whole, where they differ from those of a part.

    Raises:
        OSError: on all ranks, where the first one could not write; nothing of it stays.
    """
    config = coder.config.to_dict() | {"m": part.m, **fields}
    own = {**dict(coder.named_parameters()), **dict(coder.named_buffers())}
    names = [*coder.config.parameters(), *coder.config.buffers()]
    own = {name: own[name].detach() for name in names}
    shapes = {
        name: ([part.m, *value.shape[1:]] if shards.has_rows(name, value) else list(value.shape), value.dtype)
        for name, value in own.items()
    }
    mark = mesh.first(lambda: secrets.token_hex(8))
    about = {"format": FORMAT, "version": VERSION, "save": mark}
    path = folder / f"{STEM}.safetensors"
    if mesh.rank:
        _send(mesh, own)
        together(mesh, lambda: None)
        return
    failed: OSError | None = None
    try:
        with replacing(path) as scratch, open(scratch, "wb") as file:
            _write(file, mesh, own, shapes, about)
    except OSError as error:
        failed = error
    mesh.broadcast_(torch.tensor([failed is not None], dtype=torch.int64))  # wherever the others are

    def write_config() -> None:
        import fusae

        if failed is not None:
            raise failed
        described = {**about, "fusae": fusae.__version__, "config": config, "weights": _described(shapes)}
        write_json(folder / f"{STEM}.json", described)

    together(mesh, write_config)


def _pieces(mesh: Mesh, own: dict[str, Tensor]) -> list[tuple[str, int, int, int]]:
    """What travels, in order: name, rank, first row of that rank's, end."""
    pieces = []
    for name, value in own.items():
        rows = shards.has_rows(name, value)
        count = value.shape[0] if rows else 0
        step = max(1, _CHUNK // max(1, value[:1].numel() * value.element_size())) if rows else 1
        for rank in range(mesh.latents if rows else 0):
            pieces += [(name, rank, start, min(start + step, count)) for start in range(0, count, step)]
        if not rows:
            pieces.append((name, 0, 0, 0))
    return pieces


def _send(mesh: Mesh, own: dict[str, Tensor]) -> None:
    """The part of the others in `_write`: before each piece, and at the end, the first rank says whether it failed."""
    for name, rank, start, stop in _pieces(mesh, own):
        if int(mesh.broadcast_(torch.zeros(1, dtype=torch.int64))):
            return
        if rank == mesh.rank:
            mesh.to_first(own[name][start:stop], rank, own[name][:0])
    mesh.broadcast_(torch.zeros(1, dtype=torch.int64))


def _write(
    file: BinaryIO, mesh: Mesh, own: dict[str, Tensor], shapes: dict[str, Any], about: dict[str, Any]
) -> None:
    """The safetensors file, its checksums put into the header when they are known."""
    sums = {name: hashlib.sha256() for name in own}
    header, place = {}, 0
    for name, (shape, dtype) in shapes.items():
        size = dtype.itemsize
        for extent in shape:
            size *= extent
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [place, place + size]}
        place += size

    def head(known: dict[str, str]) -> bytes:
        text = {"__metadata__": {"fusae": json.dumps({**about, "sha256": known})}, **header}
        raw = json.dumps(text).encode()
        raw += b" " * (-len(raw) % 8)
        return len(raw).to_bytes(8, "little") + raw

    file.write(head(dict.fromkeys(own, "0" * 64)))
    for name, rank, start, stop in _pieces(mesh, own):
        mesh.broadcast_(torch.zeros(1, dtype=torch.int64))
        value = own[name]
        if stop:
            like = torch.empty(stop - start, *value.shape[1:], dtype=value.dtype)
            value = mesh.to_first(value[start:stop], rank, like)
        raw = value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        sums[name].update(raw)
        file.write(raw)
    file.seek(0)
    file.write(head({name: digest.hexdigest() for name, digest in sums.items()}))
    file.flush()


def remove_scratch_of(path: Path) -> None:
    """Remove what ranks that were killed while they wrote their shards have left."""
    folder = path.parent / shards.FOLDER
    for left in folder.glob(".*.tmp") if folder.is_dir() else ():
        remove_scratch(folder / left.name[1:].rsplit(".", 2)[0])
