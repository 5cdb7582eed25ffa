# SPDX-License-Identifier: Apache-2.0
"""`load` and `save`: which format a path is of, and what reads or writes it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..nn import CrossLayerTranscoder, SparseCoder
from ..nn import load as load_native
from ..nn.config import DTYPES
from . import circuit_tracer, dictionary_learning, gemma_scope, llama_scope, pickled, saelens, sparsify
from .fields import read_fields
from .native import FormatError, write_json
from .parts import LayerParts, Parts
from .writing import plain_json

Coder = SparseCoder | CrossLayerTranscoder


@dataclasses.dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        load: a path and hints -> parts.
        hints: what `load` may be told, with the meaning.
        save: coder, path, metadata and options -> None; None: it is read only.
        found: whether a path (which exists) is of it; opens files, reads no weights. None: `_KINDS` tells.
    """

    load: Callable[..., Any]
    hints: Mapping[str, str]
    save: Callable[..., None] | None = None
    found: Callable[[Path], bool] | None = None


_METADATA = "metadata.json"  # beside a coder of ours, so that a way through our format loses none of it


def _load_native(path: Path) -> Coder:
    coder = load_native(path)
    about = path / _METADATA
    coder.metadata = read_fields(about, "").values if about.is_file() else {"format": "fusae"}
    return coder


def _save_native(coder: Coder, path: Path, metadata: dict[str, Any]) -> None:
    about = plain_json(metadata)
    coder.save(path)
    write_json(path / _METADATA, about)


FORMATS: dict[str, Format] = {
    "fusae": Format(_load_native, {}, _save_native, lambda path: (path / "coder.json").is_file()),
    "saelens": Format(saelens.load, saelens.HINTS, saelens.save, saelens.found),
    "sparsify": Format(sparsify.load, sparsify.HINTS, sparsify.save, sparsify.found),
    "dictionary_learning": Format(
        dictionary_learning.load, dictionary_learning.HINTS, dictionary_learning.save, dictionary_learning.found
    ),
    "circuit-tracer": Format(circuit_tracer.load, circuit_tracer.HINTS, circuit_tracer.save, circuit_tracer.found),
    "gemma-scope": Format(gemma_scope.load_1, gemma_scope.HINTS["gemma-scope"], found=gemma_scope.found_1),
    "gemma-scope-2": Format(gemma_scope.load_2, gemma_scope.HINTS["gemma-scope-2"], found=gemma_scope.found_2),
    "llama-scope": Format(llama_scope.load_llama_scope, llama_scope.HINTS["llama-scope"]),
    "llamascopium": Format(llama_scope.load_llamascopium, llama_scope.HINTS["llamascopium"]),
    "openai": Format(pickled.load_openai, pickled.HINTS["openai"]),
    "qwen-scope": Format(pickled.load_qwen_scope, pickled.HINTS["qwen-scope"]),
    "goodfire": Format(functools.partial(pickled.load_linear, "goodfire"), pickled.HINTS["goodfire"]),
    "deepseek-r1": Format(functools.partial(pickled.load_linear, "deepseek-r1"), pickled.HINTS["deepseek-r1"]),
}
# Which of those without a `found` a path is of: files that several of them have are opened once.
_KINDS: tuple[Callable[[Path], list[str]], ...] = (llama_scope.found, pickled.kinds)
# A file in a folder of these names stands for the folder.
_IN_FOLDER = {
    "coder.json", "coder.safetensors", "cfg.json", "sae_weights.safetensors", "sae.safetensors", "config.yaml",
    "hyperparams.json", "config.json",
}  # fmt: skip


def load(
    path: str | Path, format: str | None, dtype: str | torch.dtype | None, device: Any, hints: dict[str, Any]
) -> Coder | dict[str | int, SparseCoder]:
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there")
    if path.name in _IN_FOLDER and path.is_file():
        path = path.parent
    if (path / "coder" / "coder.json").is_file():  # the directory of a run
        path = path / "coder"
    dtype = _dtype(dtype)
    name = recognise(path) if format is None else _known(format)
    chosen = FORMATS[name]
    for hint in hints:
        if hint not in chosen.hints:
            there = "; ".join(f"{key}: {what}" for key, what in chosen.hints.items()) or "none"
            raise TypeError(f"format {name!r} takes no hint {hint!r}; it takes {there}")
    with torch.no_grad():
        parts = chosen.load(path, **hints)
        if isinstance(parts, dict):
            return {key: part.coder(dtype, device) for key, part in parts.items()}
        if isinstance(parts, (Parts, LayerParts)):
            return parts.coder(dtype, device)
    coder = parts.to(device)
    return coder if dtype in (None, coder.config.torch_dtype) else cast(coder, dtype)


def recognise(path: Path) -> str:
    """The one format that `path` is of. Raises `FormatError` where it is of none, or may be of several."""
    names = [name for name, one in FORMATS.items() if one.found is not None and one.found(path)]
    names += [name for kinds in _KINDS for name in kinds(path)]
    if len(names) == 1:
        return names[0]
    if names:
        raise FormatError(f"{path}: may be {' or '.join(map(repr, names))}: give format=")
    if path.is_dir():
        there = sorted(p.name for p in path.iterdir())
        what = f"in it there is {', '.join(there[:12]) or 'nothing'}{' ...' if len(there) > 12 else ''}"
        if {"conf.yaml", "latest_ckpt.safetensors"} <= set(there):
            what += "; a temporal SAE, whose codes depend on other rows of the sequence, is not read"
    else:
        what = "it is a single file, and its tensors have the names of none of them"
    raise FormatError(f"{path}: of no format that is read ({', '.join(FORMATS)}); {what}")


def save(
    coder: Any, path: str | Path, format: str, dtype: str | torch.dtype | None, metadata: Any, options: dict[str, Any]
) -> Path:
    path, name = Path(path), _known(format)
    writes = FORMATS[name].save
    if writes is None:
        can = ", ".join(repr(key) for key, one in FORMATS.items() if one.save is not None)
        raise ValueError(f"format {name!r} is read only; {can} can be written")
    if isinstance(coder, dict) and name != "circuit-tracer":
        raise TypeError(f"coder must be one SparseCoder for format {name!r}, got {len(coder)} of them")
    for one in coder.values() if isinstance(coder, dict) else [coder]:
        _check(one, name)
    if path.is_file():
        raise ValueError(f"path must be a folder, got the file {path}")
    dtype = _dtype(dtype)
    first = next(iter(coder.values())) if isinstance(coder, dict) else coder
    about = {**getattr(first, "metadata", {}), **(metadata or {})}
    if dtype is not None:
        coder = {k: cast(one, dtype) for k, one in coder.items()} if isinstance(coder, dict) else cast(coder, dtype)
    if options and name != "saelens":
        raise TypeError(f"format {name!r} takes no option {next(iter(options))!r}")
    with torch.no_grad():
        writes(coder, path, about, **options)
    return path


def cast(coder: Coder, dtype: torch.dtype) -> Coder:
    """A coder of another dtype, in eval mode; thresholds stay as exact as its configuration has them."""
    name = {value: key for key, value in DTYPES.items()}[dtype]
    config = dataclasses.replace(coder.config, dtype=name)
    other = type(coder)(config, seed=None, device=next(coder.parameters()).device)
    other.load_state_dict(coder.state_dict())
    other.metadata = getattr(coder, "metadata", {})
    return other.eval()


def _check(coder: Any, name: str) -> None:
    wanted = (SparseCoder, CrossLayerTranscoder) if name in ("fusae", "circuit-tracer") else (SparseCoder,)
    if not isinstance(coder, wanted):
        classes = " or ".join(cls.__name__ for cls in wanted)
        raise TypeError(f"coder must be a {classes} for format {name!r}, got {type(coder).__name__}")
    if coder.config.torch_dtype != next(p for n, p in coder.named_parameters() if n.endswith("W_enc")).dtype:
        raise ValueError(f"coder was cast after it was made for {coder.config.dtype!r}; give dtype= here instead")


def _known(format: str) -> str:
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(map(repr, FORMATS))}, got {format!r}")
    return format


def _dtype(dtype: Any) -> torch.dtype | None:
    known = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if known is not None and known not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(map(repr, DTYPES))}, got {dtype!r}")
    return known
