# SPDX-License-Identifier: Apache-2.0
"""circuit-tracer: ``config.yaml`` with a transcoder for each layer (``layer_<i>.safetensors``) or a CLT."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..nn import CrossLayerTranscoder, SparseCoder
from .fields import Fields, import_yaml, read_fields
from .gemma_scope import same_shapes
from .native import FormatError
from .parts import LayerParts, Parts
from .tensors import Tensors, open_tensors
from .writing import Rounded, cannot, plain_json, without, write_folder

CONFIG = "config.yaml"
HINTS = {
    "layer": "the one to load, from a folder of transcoders",
    "activation": "'relu', 'jumprelu' or 'topk'; where no config.yaml says it",
    "k": "latents active per row, with activation 'topk'",
}
_LAYER = re.compile(r"layer_(\d{1,4})\.safetensors$")
_ENCODER = re.compile(r"W_enc_(\d{1,4})\.safetensors$")
_THRESHOLD = "activation_function.threshold"
_ABOUT = ("model_name", "feature_input_hook", "feature_output_hook", "scan")


def found(path: Path) -> bool:
    if path.is_file():
        if path.suffix != ".safetensors":
            return False
        names = open_tensors(path, "").names
        return names >= {"W_enc", "W_dec", "b_enc", "b_dec"} and names <= _NAMES
    if not path.is_dir():
        return False
    layers = _numbered(path, _LAYER)
    return bool(_numbered(path, _ENCODER)) or (bool(layers) and "W_enc" in open_tensors(layers[min(layers)], ""))


_NAMES = {"W_enc", "W_dec", "b_enc", "b_dec", "W_skip", "k", _THRESHOLD}


def _numbered(path: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    matches = [(pattern.match(p.name), p) for p in path.iterdir()]
    return {int(match[1]): p for match, p in matches if match}


def load(
    path: Path, layer: int | None = None, activation: str | None = None, k: int | None = None
) -> Parts | dict[int, Parts] | LayerParts:
    if path.is_file():
        config = path.with_name(CONFIG)
        return _one(path, *_activation(config, activation, k))
    clt, layers = _numbered(path, _ENCODER), _numbered(path, _LAYER)
    if clt:
        return _clt(path, clt)
    if sorted(layers) != list(range(len(layers))) or not layers:
        raise FormatError(f"{path}: layers from 0 on were expected, there are those of {sorted(layers)}")
    chosen = _activation(path / CONFIG, activation, k)
    if layer is None:
        return {i: _one(layers[i], *chosen) for i in sorted(layers)}
    if layer not in layers:
        raise FormatError(f"{path}: layer {layer} is not there; it has 0 to {len(layers) - 1}")
    return _one(layers[layer], *chosen)


def _activation(config: Path, given: str | None, k: int | None) -> tuple[str | None, int | None, dict[str, Any]]:
    """What config.yaml or the hints say: activation, k, and what is known beside."""
    cfg = read_fields(config, "") if config.is_file() else Fields(config, {})
    kind = cfg.values.get("model_kind", "transcoder_set")
    if kind != "transcoder_set":
        raise cfg.error("model_kind", f"must be 'transcoder_set' beside layer_<i>.safetensors, got {kind!r}")
    if "activation" in cfg and given is None:
        given = cfg.choice("activation", ("relu", "topk", "jump_relu", "jumprelu"))
    if given not in (None, "relu", "topk", "jump_relu", "jumprelu"):
        raise ValueError(f"activation must be 'relu', 'jumprelu' or 'topk', got {given!r}")
    if "k" in cfg:
        said = cfg.whole("k")
        if k not in (None, said):
            raise cfg.error("k", f"is {said}, but k is {k}")
        k = said
    return given, k, _about(cfg)


def _about(cfg: Fields) -> dict[str, Any]:
    return {"format": "circuit-tracer"} | {name: cfg.values[name] for name in _ABOUT if name in cfg}


def _one(path: Path, activation: str | None, k: int | None, about: dict[str, Any]) -> Parts:
    """A transcoder. TopK has no ReLU behind it here, and the output is of the input's width."""
    tensors = open_tensors(path, "a transcoder of circuit-tracer")
    m, d = tensors.shape("W_enc", 2)
    weights = {
        "W_enc": tensors.take("W_enc", m, d), "b_enc": tensors.take("b_enc", m), "W_dec": tensors.take("W_dec", m, d),
        "b_dec": tensors.take("b_dec", d),
    }  # fmt: skip
    fields: dict[str, Any] = {"select": "relu", "pre_bias": False}
    if "k" in tensors:
        stored = tensors.number("k")
        if stored != int(stored) or not 1 <= stored <= m or k not in (None, stored):
            raise tensors.error(
                "k", f"must be a whole number from 1 to {m}{'' if k is None else f', {k}'}, got {stored}"
            )
        k, activation = int(stored), activation or "topk"
    if activation == "topk":
        if k is None:
            raise FormatError(f"{path}: the activation is 'topk', and neither {CONFIG} nor the file says k: give k=")
        fields |= {"select": "topk", "k": k, "activation": "none"}
    elif _THRESHOLD in tensors and activation != "relu":
        fields["select"], weights["threshold"] = "threshold", _thresholds(tensors, _THRESHOLD, m)
    elif activation in ("jump_relu", "jumprelu"):
        raise tensors.error(_THRESHOLD, f"is missing, and the activation is {activation!r}")
    tensors.drop(_THRESHOLD)
    if "W_skip" in tensors:
        fields["skip"], weights["W_skip"] = True, tensors.take("W_skip", d, d)
    tensors.end()
    layer = _LAYER.match(path.name)
    about = {**about, **({"layer": int(layer[1])} if layer else {})}
    return Parts(path, weights, fields, about, transcoder=True)


def _thresholds(tensors: Tensors, name: str, m: int) -> Any:
    """The tool has no ReLU behind the threshold: below 0 it would let negative values through."""
    value = tensors.take(name, m, infinite=True)
    if bool((value < 0).any()):
        raise tensors.error(name, "has values below 0, above which the tool has negative codes: a SparseCoder has none")
    return value


def _clt(path: Path, encoders: dict[int, Path]) -> LayerParts:
    cfg = read_fields(path / CONFIG, "") if (path / CONFIG).is_file() else Fields(path / CONFIG, {})
    if "model_kind" in cfg and cfg.values["model_kind"] != "cross_layer_transcoder":
        kind = cfg.values["model_kind"]
        raise cfg.error("model_kind", f"must be 'cross_layer_transcoder' beside W_enc_<i>.safetensors, got {kind!r}")
    layers = len(encoders)
    if sorted(encoders) != list(range(layers)):
        raise FormatError(
            f"{path}: W_enc_<i>.safetensors was expected for 0 to {layers - 1}, there are {sorted(encoders)}"
        )
    parts = []
    for i, file in sorted(encoders.items()):
        tensors = open_tensors(file, "")
        m, d = tensors.shape(f"W_enc_{i}", 2)
        weights = {"W_enc": tensors.take(f"W_enc_{i}", m, d), "b_enc": tensors.take(f"b_enc_{i}", m)}
        weights["b_dec"] = tensors.take(f"b_dec_{i}", d)
        if f"threshold_{i}" in tensors:
            weights["threshold"] = _thresholds(tensors, f"threshold_{i}", m)
        tensors.end()
        decoder = open_tensors(path / f"W_dec_{i}.safetensors", f"the decoder of {file.name}")
        weights["W_dec"] = decoder.take(f"W_dec_{i}", m, layers - i, d).reshape(m, -1)
        decoder.end()
        parts.append(Parts(file, weights, {"select": "threshold" if "threshold" in weights else "relu"}))
    same_shapes(parts)
    return LayerParts(path, parts, _about(cfg))


def save(
    coder: SparseCoder | CrossLayerTranscoder | Mapping[int, SparseCoder], path: Path, metadata: dict[str, Any]
) -> None:
    """A cross-layer transcoder, one transcoder (of layer 0, or of ``metadata['layer']``), or one of every layer."""
    about = {name: metadata[name] for name in _ABOUT if name in metadata}
    if isinstance(coder, CrossLayerTranscoder):
        return _save_clt(coder, path, {"model_kind": "cross_layer_transcoder", **about})
    if isinstance(coder, SparseCoder):
        coder = {int(metadata.get("layer", 0)): coder}
    files, shared = {}, {}
    for i, one in coder.items():
        files[f"layer_{i}.safetensors"] = _tensors(one)
        shared[i] = {"activation": "topk", "k": one.config.k} if one.config.select == "topk" else {}
    first = next(iter(shared.values()))
    if any(other != first for other in shared.values()):
        raise cannot("circuit-tracer", f"set whose layers have several activations: {shared}")
    _write(path, files, {"model_kind": "transcoder_set", **first, **about})


def _tensors(coder: SparseCoder) -> dict[str, Any]:
    config = coder.config
    if config.output_width != config.d:
        raise cannot("circuit-tracer", f"output {config.output_width} wide for an input {config.d} wide")
    without("circuit-tracer", config, "pre_bias", "gated", "sites", "input_norm", "select_by_norm")
    if config.select not in ("relu", "threshold", "batch_topk", "topk"):
        raise cannot("circuit-tracer", f"select {config.select!r}")
    if config.select == "topk" and config.activation != "none":
        what = "ReLU behind a top-k: where fewer than k latents are above 0, its codes would be negative"
        raise cannot("circuit-tracer", f"{what}; make it activation 'none' if that is meant")
    tensors = {"W_enc": coder.W_enc, "b_enc": coder.b_enc, "W_dec": coder.W_dec, "b_dec": coder.b_dec}
    if config.select in ("threshold", "batch_topk"):
        tensors[_THRESHOLD] = _rounded(coder)
    if config.skip:
        tensors["W_skip"] = coder.W_skip
    return tensors


def _rounded(coder: SparseCoder) -> Any:
    value = coder.threshold.to(coder.config.threshold_dtype).expand(coder.config.m)
    return Rounded(coder.config.torch_dtype, "circuit-tracer")("threshold", value)


def _save_clt(coder: CrossLayerTranscoder, path: Path, config: dict[str, Any]) -> None:
    about = coder.config
    if about.target_width != about.d:
        raise cannot("circuit-tracer", f"output {about.target_width} wide for an input {about.d} wide")
    without("circuit-tracer", about, "skip", "select_by_norm")
    if about.select == "topk":
        raise cannot("circuit-tracer", "cross-layer transcoder with select 'topk'")
    files = {}
    for i, source in enumerate(coder.sources):
        files[f"W_enc_{i}.safetensors"] = {
            f"W_enc_{i}": source.W_enc, f"b_enc_{i}": source.b_enc, f"b_dec_{i}": coder.b_dec[i],
        }  # fmt: skip
        if about.select != "relu":
            files[f"W_enc_{i}.safetensors"][f"threshold_{i}"] = _rounded(source)
        files[f"W_dec_{i}.safetensors"] = {f"W_dec_{i}": source.W_dec.unflatten(1, (about.layers - i, about.d))}
    _write(path, files, config)


def _write(path: Path, files: dict[str, Any], config: dict[str, Any]) -> None:
    hooks = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}  # the tool's own defaults
    config = plain_json({"model_name": None, "scan": None, **hooks, **config})
    write_folder(path, files, {CONFIG: import_yaml().safe_dump(config, sort_keys=False)})
