# SPDX-License-Identifier: Apache-2.0
"""EleutherAI sparsify: ``cfg.json`` and ``sae.safetensors``, in a folder or in one for each hookpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..nn import SparseCoder
from .fields import read_fields
from .native import FormatError
from .parts import Parts
from .tensors import open_tensors
from .writing import cannot, without, write_folder

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
HINTS = {"hookpoint": "the one to load, from a folder of several"}


def found(path: Path) -> bool:
    return path.is_dir() and (_is_one(path) or bool(_hookpoints(path)))


def _is_one(path: Path) -> bool:
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def _hookpoints(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.is_dir() and _is_one(p))


def load(path: Path, hookpoint: str | None = None) -> Parts | dict[str, Parts]:
    if hookpoint is not None:
        names = _hookpoints(path)
        if hookpoint not in names:
            raise FormatError(
                f"{path}: hookpoint {hookpoint!r} is not there; it has {', '.join(map(repr, names)) or 'none'}"
            )
        return _one(path / hookpoint)
    if _is_one(path) or not _hookpoints(path):
        return _one(path)
    return {name: _one(path / name) for name in _hookpoints(path)}


def _one(path: Path) -> Parts:
    cfg = read_fields(path / CONFIG, "the configuration of a SparseCoder of sparsify")
    d = cfg.whole("d_in")
    m = cfg.whole("num_latents", 0, low=0) or d * cfg.whole("expansion_factor", 32)
    if cfg.flag("signed", False):
        what = "is true: early versions of sparsify then selected by magnitude, today's does not, and the file does not"
        raise cfg.error("signed", f"{what} say which it is of; remove the field to read it as today's does")
    activation = cfg.choice("activation", ("topk", "groupmax"), "topk")
    transcode = cfg.flag("transcode", False)
    fields: dict[str, Any] = {
        "k": cfg.whole("k", 32, high=m), "select": "topk" if activation == "topk" else "group_max",
        "pre_bias": not transcode, "skip": cfg.flag("skip_connection", False),
    }  # fmt: skip
    tensors = open_tensors(path / WEIGHTS, "the weights of a SparseCoder of sparsify")
    if "W_dec" not in tensors:
        raise FormatError(f"{path / WEIGHTS}: tensor 'W_dec' is missing; an encoder alone is no dictionary")
    weights = {
        "W_enc": tensors.take("encoder.weight", m, d), "b_enc": tensors.take("encoder.bias", m),
        "W_dec": tensors.take("W_dec", m, d), "b_dec": tensors.take("b_dec", d),
    }  # fmt: skip
    if fields["skip"]:
        weights["W_skip"] = tensors.take("W_skip", d, d)
    tensors.end()
    unread = ("normalize_decoder", "multi_topk")
    about = {"format": "sparsify", "hookpoint": path.name}
    about |= {name: cfg.values[name] for name in unread if isinstance(cfg.values.get(name), bool)}
    return Parts(path, weights, fields, about, transcoder=transcode)


def save(coder: SparseCoder, path: Path, metadata: dict[str, Any]) -> None:
    config = coder.config
    if config.select not in ("topk", "group_max") or config.activation != "relu":
        raise cannot("sparsify", f"select {config.select!r} with activation {config.activation!r}")
    if config.output_width != config.d:
        raise cannot("sparsify", f"transcoder whose output is {config.output_width} wide and its input {config.d}")
    if config.d_out is not None and config.pre_bias:
        raise cannot("sparsify", "transcoder with pre_bias")
    without("sparsify", config, "select_by_norm", "sites", "input_norm")
    tensors = {
        "encoder.weight": coder.W_enc, "encoder.bias": coder.b_enc, "W_dec": coder.W_dec, "b_dec": coder.b_dec,
    }  # fmt: skip
    if config.skip:
        tensors["W_skip"] = coder.W_skip
    cfg = {
        "activation": "topk" if config.select == "topk" else "groupmax",
        "expansion_factor": max(1, config.m // config.d),
        "normalize_decoder": bool(metadata.get("normalize_decoder", True)),
        "num_latents": config.m, "k": config.k, "multi_topk": bool(metadata.get("multi_topk", False)),
        "skip_connection": config.skip, "transcode": not config.pre_bias, "d_in": config.d,
    }  # fmt: skip
    write_folder(path, {WEIGHTS: tensors}, {CONFIG: cfg})
