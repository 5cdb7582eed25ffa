# SPDX-License-Identifier: Apache-2.0
"""SAELens: a folder with ``cfg.json`` and ``sae_weights.safetensors``, for inference or from training."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from ..nn import SparseCoder
from .fields import Fields, read_fields
from .parts import DTYPE_NAMES, Parts
from .tensors import Tensors, open_tensors
from .writing import Rounded, cannot, plain_json, write_folder

CONFIG, WEIGHTS, SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"
HINTS = {
    "k": "latents active per row, where the file has a fraction",
    "input_scale": "what rows were multiplied by in training (1.0: they are to be taken as they are)",
}
# Every architecture: how it selects, and its tensors beside W_enc, W_dec and b_dec.
_SELECTS = {
    "standard": "relu", "gated": "relu", "jumprelu": "threshold", "topk": "topk", "abstopk": "abs",
    "batchtopk": "batch_topk", "matryoshka_batchtopk": "batch_topk", "transcoder": "relu", "skip_transcoder": "relu",
    "jumprelu_transcoder": "threshold", "jumprelu_skip_transcoder": "threshold",
}  # fmt: skip
_ARCHITECTURES = {
    "relu": "standard", "threshold": "jumprelu", "topk": "topk", "abs": "abstopk", "batch_topk": "batchtopk",
}  # fmt: skip
_REFUSED = {
    "temporal": "its codes depend on other rows of the sequence (attention), which a SparseCoder has not",
    "matching_pursuit": "it encodes by a loop in which every latent depends on those before it",
}
_NORMS = {"layer_norm": "layer", "constant_norm_rescale": "rms"}
_BEFORE_6 = (  # what was beside the fields then, and is metadata now
    "model_name", "hook_name", "hook_head_index", "prepend_bos", "context_size", "dataset_path", "neuronpedia_id",
    "sae_lens_version", "sae_lens_training_version", "model_from_pretrained_kwargs",
)  # fmt: skip


def found(path: Path) -> bool:
    return path.is_dir() and (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def load(path: Path, k: int | None = None, input_scale: float | None = None) -> Parts:
    cfg = read_fields(path / CONFIG, "the configuration of an SAE of SAELens")
    old = _is_old(cfg)
    architecture = cfg.text("architecture", "standard") if old else cfg.text("architecture")
    activation = cfg.values.get("activation_fn_str", cfg.values.get("activation_fn", "relu"))
    if old and activation == "topk" and architecture == "standard":
        architecture = "topk"
        cfg.values["k"] = cfg.section("activation_fn_kwargs").whole("k")
    elif old and activation not in ("relu", "topk", None):
        raise cfg.error("activation_fn", f"must be 'relu' or 'topk', got {activation!r}: SAELens reads no other today")
    if architecture in _REFUSED:
        raise cfg.error("architecture", f"is {architecture!r}, which is not read: {_REFUSED[architecture]}")
    if architecture not in _SELECTS:
        raise cfg.error("architecture", f"must be one of {', '.join(map(repr, _SELECTS))}, got {architecture!r}")
    select, transcoder = _SELECTS[architecture], "transcoder" in architecture
    d, m = cfg.whole("d_in"), cfg.whole("d_sae")
    out = cfg.whole("d_out") if transcoder else d
    dtype = cfg.dtype()
    fields: dict[str, Any] = {"select": select, "pre_bias": cfg.flag("apply_b_dec_to_input", not transcoder)}
    if transcoder and fields["pre_bias"]:
        raise cfg.error("apply_b_dec_to_input", "must be false for a transcoder: b_dec is of the output")
    tensors = open_tensors(path / WEIGHTS, "the weights of an SAE of SAELens")
    weights = {
        "W_enc": tensors.take("W_enc", d, m).T,
        "W_dec": tensors.take("W_dec", m, out),
        "b_dec": tensors.take("b_dec", out),
    }
    if select in ("topk", "abs", "batch_topk"):
        fields["k"] = _k(cfg, k, m)
        by_norm = cfg.flag("rescale_acts_by_decoder_norm", select == "batch_topk")
        fields |= {"select_by_norm": by_norm, "activation": "none" if select == "abs" else "relu"}
    elif k is not None:
        raise cfg.error("architecture", f"is {architecture!r}, so k must not be given")
    if architecture == "gated":
        fields["gated"] = True
        for ours, name in (("b_enc", "b_gate"), ("r_mag", "r_mag"), ("b_mag", "b_mag")):
            weights[ours] = tensors.take(name, m)
        tensors.drop("b_enc")  # of zeros, in some files from before 6.0
    else:
        weights["b_enc"] = tensors.take("b_enc", m)
    if select == "threshold":
        logs = "threshold" not in tensors and "log_threshold" in tensors  # in training, before 6.50
        value = tensors.take("log_threshold" if logs else "threshold", m, infinite=not logs)
        weights["threshold"] = value.exp() if logs else value
    elif select == "batch_topk":
        weights["threshold"] = torch.tensor(tensors.number("topk_threshold"), dtype=torch.float64)
    if "skip" in architecture:
        fields["skip"] = True
        weights["W_skip"] = tensors.take("W_skip", out, d)
    _finetuned(tensors, m)
    tensors.end()
    parts = Parts(path, weights, fields, _metadata(cfg, old), dtype, transcoder)
    return _normalised(parts, cfg, path, input_scale)


def _k(cfg: Fields, given: int | None, m: int) -> int:
    stored = cfg.values.get("k")
    if given is not None and isinstance(stored, float) and not stored.is_integer():
        return given
    k = cfg.whole("k", high=m)
    if given not in (None, k):
        raise cfg.error("k", f"is {k}, but k is {given}")
    return k


def _is_old(cfg: Fields) -> bool:
    """Whether the configuration is from before version 6."""
    version = cfg.values.get("sae_lens_version") or cfg.section("metadata", {}).values.get("sae_lens_version")
    if version is None:
        return True
    number = re.match(r"\d+", version) if isinstance(version, str) else None
    if number is None or len(number[0]) > 6:
        raise cfg.error("sae_lens_version", f"must be a version such as '6.0.0', got {version!r}")
    return int(number[0]) < 6


def _finetuned(tensors: Tensors, m: int) -> None:
    """A scale of every latent from finetuning, which today's SAELens reads only where it is 1."""
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if name in tensors and not bool((tensors.take(name, m) == 1).all()):
            raise tensors.error(
                name, "is not all 1; SAELens reads such files no more: multiply the rows of W_dec by it"
            )


def _metadata(cfg: Fields, old: bool) -> dict[str, Any]:
    if old:
        names = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index"}
        given = {names.get(name, name): value for name, value in cfg.values.items()}
        about = {name: given[name] for name in _BEFORE_6 if given.get(name) is not None}
        reshaped = "hook_z" if "hook_z" in str(about.get("hook_name", "")) else "none"
    else:
        about, reshaped = dict(cfg.section("metadata", {}).values), "none"
    shape = cfg.choice("reshape_activations", ("none", "hook_z"), reshaped)
    return {"format": "saelens", **about, **({"reshape_activations": shape} if shape != "none" else {})}


def _normalised(parts: Parts, cfg: Fields, path: Path, scale: float | None) -> Parts:
    """With what the tool does to every row before it encodes it."""
    kind = cfg.values.get("normalize_activations")
    if kind is None or isinstance(kind, bool):
        kind = "expected_average_only_in" if kind else "none"
    if kind == "covariance_whitening":
        what = "is 'covariance_whitening', and the whitening is not in the weights"
        raise cfg.error("normalize_activations", f"{what}: let SAELens fold it in, as it does at the end of training")
    if kind not in ("none", "expected_average_only_in", *_NORMS):
        raise cfg.error("normalize_activations", f"must be one that SAELens has, got {kind!r}")
    if kind in _NORMS:
        if parts.transcoder:
            what = f"is {kind!r} in a transcoder, whose output SAELens does not bring back to scale"
            raise cfg.error("normalize_activations", f"{what}: there is no such SparseCoder")
        parts.fields["input_norm"] = _NORMS[kind]
    if kind == "expected_average_only_in":
        if scale is None and (path / SCALER).is_file():
            scale = read_fields(path / SCALER, "").number("scaling_factor", above=True)
        if scale is None or (parts.transcoder and scale != 1):
            what = "is 'expected_average_only_in', and the scale of the rows in training is not in the folder"
            how = "give it as input_scale= (1.0: rows as they are, as SAELens itself reads such a file)"
            raise cfg.error("normalize_activations", f"{what}: {how}")
    elif scale not in (None, 1):
        raise cfg.error("normalize_activations", f"is {kind!r}, so input_scale must not be given")
    return parts if scale is None else parts.scale(scale)


def save(coder: SparseCoder, path: Path, metadata: dict[str, Any], architecture: str | None = None) -> None:
    """``architecture='batchtopk'`` keeps a batch top-k as SAELens has it in training; else it becomes a JumpReLU."""
    config = coder.config
    transcoder = config.d_out is not None or config.skip
    name = "gated" if config.gated else _ARCHITECTURES.get(config.select)
    if config.select == "batch_topk" and architecture != "batchtopk":
        name = "jumprelu"
    if transcoder:
        if config.select not in ("relu", "threshold", "batch_topk") or config.gated:
            raise cannot("SAELens", f"a transcoder with select {config.select!r}")
        name = ("" if config.select == "relu" else "jumprelu_") + ("skip_" if config.skip else "") + "transcoder"
        if config.pre_bias:
            raise cannot("SAELens", "a skip connection with pre_bias")
    if name is None:
        raise cannot("SAELens", f"select {config.select!r}")
    if architecture not in (None, name):
        raise ValueError(f"architecture must be {name!r} for this coder, got {architecture!r}")
    if config.sites is not None:
        raise cannot("SAELens", "a crosscoder")
    if config.select == "topk" and config.activation != "relu":
        raise cannot("SAELens", "activation 'none' with select 'topk'")
    takes_k = name in ("topk", "abstopk", "batchtopk")
    if config.select_by_norm and not takes_k and config.select != "relu":
        raise cannot("SAELens", f"select_by_norm as {name!r}; call coder.fold_norms_() first")
    rounded = Rounded(config.torch_dtype, "SAELens")
    tensors = {"W_enc": coder.W_enc.T, "W_dec": coder.W_dec, "b_dec": coder.b_dec}
    if config.gated:
        tensors |= {"b_gate": coder.b_enc, "r_mag": coder.r_mag, "b_mag": coder.b_mag}
    else:
        tensors["b_enc"] = coder.b_enc
    if name == "batchtopk":
        tensors["topk_threshold"] = coder.threshold
    elif config.select == "batch_topk":
        tensors["threshold"] = rounded("threshold", coder.threshold.to(config.threshold_dtype).expand(config.m))
    elif config.select == "threshold":
        tensors["threshold"] = rounded("threshold", coder.threshold)
    if config.skip:
        tensors["W_skip"] = coder.W_skip
    norms = {ours: theirs for theirs, ours in _NORMS.items()}
    about = {key: value for key, value in metadata.items() if key not in ("format", "reshape_activations")}
    cfg = {
        "architecture": name, "d_in": config.d, "d_sae": config.m, "dtype": DTYPE_NAMES[config.torch_dtype],
        "device": "cpu", "apply_b_dec_to_input": config.pre_bias,
        "normalize_activations": norms.get(config.input_norm, "none"),
        "reshape_activations": metadata.get("reshape_activations", "none"),
        "metadata": {"sae_lens_version": "6.0.0", "sae_lens_training_version": None, **plain_json(about)},
    }  # fmt: skip
    if int(re.match(r"\d*", str(cfg["metadata"]["sae_lens_version"]))[0] or 0) < 6:
        cfg["metadata"]["sae_lens_version"] = "6.0.0"  # of the layout, not of the training
    if transcoder:
        cfg["d_out"] = config.output_width
    if takes_k:
        cfg |= {"k": config.k, "rescale_acts_by_decoder_norm": config.select_by_norm}
    write_folder(path, {WEIGHTS: tensors}, {CONFIG: cfg})
