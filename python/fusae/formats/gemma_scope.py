# SPDX-License-Identifier: Apache-2.0
"""Gemma Scope: ``params.npz`` (1) and ``params.safetensors`` or one file for each layer of a CLT (2); JumpReLU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .fields import read_fields
from .native import FormatError
from .parts import LayerParts, Parts
from .tensors import Tensors, open_tensors

HINTS = {
    "gemma-scope": {
        "embedding": "whether rows are those of the embedding table times the square root of the width, as the model "
        "has them, and the dictionary of the table",
        "transcoder": "whether its output is of another place than its input",
    },
    "gemma-scope-2": {"transcoder": "whether its output is of another place than its input"},
}
_LAYER = re.compile(r"(?:^|_)layer_(\d{1,4})(?:_.*)?\.safetensors$")
_KEYS_2 = {"w_enc", "w_dec", "b_enc", "b_dec", "threshold"}


def found_1(path: Path) -> bool:
    return path.suffix == ".npz" if path.is_file() else (path / "params.npz").is_file()


def found_2(path: Path) -> bool:
    if path.is_file():
        return path.suffix == ".safetensors" and open_tensors(path, "").names >= _KEYS_2
    if (path / "params.safetensors").is_file():
        return True
    files = _layer_files(path)
    return bool(files) and open_tensors(next(iter(files.values())), "").names >= _KEYS_2


def _layer_files(path: Path) -> dict[int, Path]:
    if not path.is_dir():
        return {}
    matches = [(_LAYER.search(p.name), p) for p in sorted(path.iterdir()) if p.is_file()]
    return {int(match[1]): p for match, p in matches if match}


def load_1(path: Path, embedding: bool | None = None, transcoder: bool = False) -> Parts:
    path = path / "params.npz" if path.is_dir() else path
    tensors = open_tensors(path, "a dictionary of Gemma Scope")
    d, m = tensors.shape("W_enc", 2)
    out = tensors.shape("W_dec", 2)[1]
    parts = _jumprelu(tensors, path, "W_enc", "W_dec", d, m, out, "gemma-scope", transcoder or out != d)
    if "scaling_factor" in tensors and not bool((tensors.take("scaling_factor", m) == 1).all()):
        raise tensors.error("scaling_factor", "is not all 1, which none of the releases has; its meaning is not known")
    tensors.end()
    if embedding is None and "embedding" in path.as_posix():
        what = "by its path it may be of the embedding table, whose rows Gemma scales by the square root of the width"
        raise FormatError(f"{path}: {what}: give embedding=True for scaled rows, False for those of the table")
    return parts.scale(d**-0.5) if embedding else parts


def load_2(path: Path, transcoder: bool | None = None) -> Parts | LayerParts:
    files = _layer_files(path) if not (path / "params.safetensors").is_file() else {}
    if files:
        return _clt(path, files)
    path = path / "params.safetensors" if path.is_dir() else path
    tensors = open_tensors(path, "a dictionary of Gemma Scope 2")
    d, m = tensors.shape("w_enc", 2)
    out = tensors.shape("w_dec", 2)[1]
    config = path.with_name("config.json")
    if transcoder is None:
        hook = read_fields(config, "").values.get("hf_hook_point_out") if config.is_file() else None
        transcoder = hook is not None or "affine_skip_connection" in tensors or out != d
    parts = _jumprelu(tensors, path, "w_enc", "w_dec", d, m, out, "gemma-scope-2", transcoder)
    if "affine_skip_connection" in tensors:
        parts.weights["W_skip"] = tensors.take("affine_skip_connection", d, out).T
        parts.fields["skip"] = True
    tensors.end()
    return parts


def _jumprelu(
    tensors: Tensors, path: Path, enc: str, dec: str, d: int, m: int, out: int, name: str, transcoder: bool
) -> Parts:
    weights = {
        "W_enc": tensors.take(enc, d, m).T, "b_enc": tensors.take("b_enc", m), "W_dec": tensors.take(dec, m, out),
        "b_dec": tensors.take("b_dec", out), "threshold": tensors.take("threshold", m, infinite=True),
    }  # fmt: skip
    fields: dict[str, Any] = {"select": "threshold", "pre_bias": False}
    return Parts(path, weights, fields, {"format": name}, transcoder=transcoder)


def _clt(path: Path, files: dict[int, Path]) -> LayerParts:
    """A folder with a file of every layer, whose ``w_dec`` ``[m, L, d]`` has nothing for layers before its own."""
    layers = len(files)
    if sorted(files) != list(range(layers)):
        raise FormatError(f"{path}: files of layers 0 to {layers - 1} were expected, there are {sorted(files)}")
    parts = []
    for s, file in sorted(files.items()):
        tensors = open_tensors(file, "")
        d, m = tensors.shape("w_enc", 2)
        out = tensors.shape("w_dec", 3)[2]
        W_dec = tensors.take("w_dec", m, layers, out)
        if bool((W_dec[:, :s] != 0).any()):
            raise tensors.error("w_dec", f"writes to layers before its own, {s}")
        weights = {
            "W_enc": tensors.take("w_enc", d, m).T, "b_enc": tensors.take("b_enc", m),
            "W_dec": W_dec[:, s:].reshape(m, -1), "b_dec": tensors.take("b_dec", out),
            "threshold": tensors.take("threshold", m, infinite=True).clamp(min=0),
        }  # fmt: skip
        if "affine_skip_connection" in tensors:
            weights["W_skip"] = tensors.take("affine_skip_connection", d, out).T
        tensors.end()
        parts.append(Parts(file, weights, {"select": "threshold"}))
    same_shapes(parts)
    return LayerParts(path, parts, {"format": "gemma-scope-2"})


def same_shapes(parts: list[Parts]) -> None:
    """Every layer has the tensors of the first, of the same sizes (`W_dec` apart)."""
    shapes = [{n: list(w.shape) for n, w in part.weights.items() if n != "W_dec"} for part in parts]
    for part, found in zip(parts, shapes, strict=True):
        if found != shapes[0]:
            raise FormatError(f"{part.path}: has {found}, but the first layer has {shapes[0]}")
