# SPDX-License-Identifier: Apache-2.0
"""OpenMOSS: Llama Scope (``hyperparams.json`` or ``config.json``) and llamascopium 2 (``config.json``).

They are trained on rows whose norm is √d on average over a data set; that scale is folded into the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .fields import Fields, read_fields
from .native import FormatError
from .parts import Parts, log_thresholds
from .tensors import Tensors, open_tensors

HINTS = {
    "llama-scope": {
        "input_scale": "√d over the average norm of rows, where the files do not have it",
        "threshold_side": "'in' or 'out': whose scale the one threshold of a transcoder is in",
    },
    "llamascopium": {"threshold": "above which a latent is active, of a batch top-k, which the tool has none for"},
}
_LOG = "log_jumprelu_threshold"
_NORM = "dataset_average_activation_norm"
_FILES = (
    "sae_weights.safetensors", "sae_weights.pt", "checkpoints/pruned.safetensors", "checkpoints/pruned.pt",
    "checkpoints/final.safetensors", "checkpoints/final.pt",
)  # fmt: skip


def _weights_file(path: Path) -> Path | None:
    return next((path / name for name in _FILES if (path / name).is_file()), None)


def found(path: Path) -> list[str]:
    """Which of these formats are in a folder."""
    if not path.is_dir() or (file := _weights_file(path)) is None:
        return []
    if (path / "hyperparams.json").is_file():
        return ["llama-scope"]
    if not (path / "config.json").is_file():
        return []
    names = open_tensors(file, "", "sae").names
    return [kind for kind, name in (("llama-scope", "encoder.weight"), ("llamascopium", "W_E")) if name in names]


def load_llama_scope(path: Path, input_scale: float | None = None, threshold_side: str | None = None) -> Parts:
    """Encoder and decoder as linear layers, JumpReLU; published with one threshold for all (Llama Scope) or one each.

    The one threshold is in units of plain rows, those of each in units of scaled rows.
    """
    name = "hyperparams.json" if (path / "hyperparams.json").is_file() else "config.json"
    cfg = read_fields(path / name, "the hyperparameters of a dictionary of Llama Scope")
    tensors = _open(path)
    d = cfg.whole("d_model")
    m = cfg.whole("d_sae") if "d_sae" in cfg else int(d * cfg.number("expansion_factor", above=True))
    act = cfg.values.get("act_fn", cfg.values.get("activation_fn", "jumprelu"))
    if act not in ("jumprelu", "relu", "topk"):
        raise cfg.error("act_fn", f"must be 'jumprelu', 'relu' or 'topk', got {act!r}")
    _plain_encoder(cfg, "use_glu_encoder")
    weights = {
        "W_enc": tensors.take("encoder.weight", m, d), "b_enc": tensors.take("encoder.bias", m),
        "W_dec": tensors.take("decoder.weight", d, m).T, "b_dec": _bias(tensors, cfg, "decoder.bias", d),
    }  # fmt: skip
    fields: dict[str, Any] = {"select": "relu", "pre_bias": cfg.flag("apply_decoder_bias_to_pre_encoder", False)}
    fields["select_by_norm"] = cfg.flag("sparsity_include_decoder_norm", False) and act != "relu"
    inner, outer = _scales(cfg, tensors, d, input_scale)
    if act == "topk":
        fields |= {"select": "topk", "k": cfg.whole("top_k", high=m)}
    elif act == "jumprelu":
        fields["select"] = "threshold"
        if _LOG in tensors:
            weights["threshold"] = log_thresholds(tensors.take(_LOG, m))
        else:
            if inner != outer and threshold_side not in ("in", "out"):
                what = (
                    "is of a transcoder, whose input and output have different scales, and nothing says which it is in"
                )
                raise cfg.error("jump_relu_threshold", f"{what}: give threshold_side='in' or 'out'")
            threshold = cfg.number("jump_relu_threshold") * (inner if threshold_side == "in" else outer)
            weights["threshold"] = torch.full((m,), threshold, dtype=torch.float32)
    tensors.drop(*(n for n in tensors.names if n.startswith(_NORM)))
    tensors.end()
    if fields["pre_bias"] and inner != outer:
        raise cfg.error("apply_decoder_bias_to_pre_encoder", "is true in a transcoder: b_dec is of the output")
    parts = Parts(path, weights, fields, _about(cfg, "llama-scope"), transcoder=_is_transcoder(cfg))
    return parts.scale(inner, outer)


def load_llamascopium(path: Path, threshold: float | None = None) -> Parts:
    cfg = read_fields(path / "config.json", "the configuration of a dictionary of llamascopium")
    kind = cfg.text("sae_type")
    if kind != "sae":
        raise cfg.error("sae_type", f"is {kind!r}; of llamascopium only 'sae' (transcoders among them) is read")
    tensors = _open(path)
    d = cfg.whole("d_model")
    m = int(d * cfg.number("expansion_factor", above=True))
    _plain_encoder(cfg, "use_glu_encoder")
    weights = {
        "W_enc": tensors.take("W_E", d, m).T, "b_enc": tensors.take("b_E", m), "W_dec": tensors.take("W_D", m, d),
        "b_dec": _bias(tensors, cfg, "b_D", d),
    }  # fmt: skip
    act = cfg.choice("act_fn", ("relu", "jumprelu", "topk", "batchtopk"), "relu")
    select = {"relu": "relu", "jumprelu": "threshold", "topk": "topk", "batchtopk": "batch_topk"}[act]
    by_norm = cfg.flag("sparsity_include_decoder_norm", True) and act != "relu"
    fields: dict[str, Any] = {"select": select, "select_by_norm": by_norm, "pre_bias": False}
    if act in ("topk", "batchtopk"):
        fields["k"] = cfg.whole("top_k", 50, high=m)
    if act == "jumprelu":
        weights["threshold"] = log_thresholds(tensors.take(f"activation_function.{_LOG}", m))
    elif act == "batchtopk":
        if threshold is None:
            what = "is 'batchtopk', whose codes depend on the batch; to encode rows by themselves, give threshold="
            raise cfg.error("act_fn", f"{what} (of scores of plain rows), or make it 'jumprelu' in llamascopium")
        weights["threshold"] = torch.tensor(threshold, dtype=torch.float64)
    norm = cfg.choice("norm_activation", ("token-wise", "batch-wise", "dataset-wise", "inference"), "dataset-wise")
    if norm == "batch-wise" or (norm == "token-wise" and _is_transcoder(cfg)):
        what = "output has a scale of its own" if norm == "token-wise" else "scale is another in every batch"
        raise cfg.error("norm_activation", f"is {norm!r}, and the {what}: there is no such SparseCoder")
    if norm == "token-wise":
        fields["input_norm"] = "rms"
    inner, outer = _scales(cfg, tensors, d, None) if norm == "dataset-wise" else (1.0, 1.0)
    tensors.drop(*(n for n in tensors.names if n.startswith(_NORM)))
    tensors.end()
    parts = Parts(path, weights, fields, _about(cfg, "llamascopium"), transcoder=_is_transcoder(cfg))
    return _as_inference(parts, inner, outer, act == "jumprelu")


def _as_inference(parts: Parts, inner: float, outer: float, thresholds: bool) -> Parts:
    """The same dictionary for plain rows, whose codes have the scale of plain rows: the tool's 'inference' form.

    ``b_enc / inner``, ``b_dec / outer``, ``W_dec · inner / outer``, and thresholds in the unit of what they are
    compared with, which the tool leaves as they are.
    """
    if inner == outer == 1:
        return parts
    by = {"b_enc": 1 / inner, "b_dec": 1 / outer, "W_dec": inner / outer}
    unit = outer if parts.fields["select_by_norm"] else inner
    return parts.times(by | ({"threshold": 1 / unit} if thresholds else {}))


def _open(path: Path) -> Tensors:
    file = _weights_file(path)
    if file is None:
        dcp = path / "sae_weights.dcp"
        more = f" ({dcp.name} is of a distributed run: save it as safetensors there)" if dcp.exists() else ""
        raise FileNotFoundError(f"{path}: none of {', '.join(_FILES)} is there{more}")
    return open_tensors(file, "weights", "sae")


def _plain_encoder(cfg: Fields, name: str) -> None:
    if cfg.flag(name, False):
        raise cfg.error(name, "is true: its encoder has two matrices, and a SparseCoder has one")


def _bias(tensors: Tensors, cfg: Fields, name: str, d: int) -> torch.Tensor:
    return tensors.take(name, d) if cfg.flag("use_decoder_bias", True) else torch.zeros(d)


def _is_transcoder(cfg: Fields) -> bool:
    return cfg.values.get("hook_point_in") != cfg.values.get("hook_point_out", cfg.values.get("hook_point_in"))


def _about(cfg: Fields, name: str) -> dict[str, Any]:
    names = {"hook_point_in": "hook_name", "hook_point_out": "hook_name_out"}
    return {"format": name} | {
        new: cfg.values[old] for old, new in names.items() if isinstance(cfg.values.get(old), str)
    }


def _scales(cfg: Fields, tensors: Tensors, d: int, given: float | None) -> tuple[float, float]:
    """√d over the average norm: of input and output."""
    if cfg.values.get("norm_activation") in ("inference", "none"):
        return 1.0, 1.0
    if given is not None:
        if not 0 < given < float("inf"):
            raise ValueError(f"input_scale must be greater than 0 and finite, got {given}")
        return given, given
    scales = []
    section = cfg.section(_NORM) if _NORM in cfg else None
    for side in ("in", "out"):
        hook = cfg.values.get(f"hook_point_{side}", cfg.values.get("hook_point_in"))
        names = [name for name in (side, hook) if section is not None and isinstance(name, str) and name in section]
        if names:
            norm = section.number(names[0], above=True)
        elif f"{_NORM}.{hook}" in tensors:
            norm = tensors.number(f"{_NORM}.{hook}")
            if not norm > 0:
                raise tensors.error(f"{_NORM}.{hook}", f"must be greater than 0, got {norm}")
        else:
            what = f"{cfg.path}: the average norm of rows at {hook!r} is neither in field {_NORM!r} nor in"
            raise FormatError(f"{what} {tensors.path.name}: give input_scale= (√d over it; 1.0: rows as they are)")
        scales.append(d**0.5 / norm)
    return scales[0], scales[1]
