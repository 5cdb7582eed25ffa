# SPDX-License-Identifier: Apache-2.0
"""dictionary_learning: ``ae.pt``, a state dictionary, and ``config.json``, which names its class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..nn import SparseCoder
from .fields import Fields, read_fields
from .native import FormatError
from .parts import DTYPE_NAMES, Parts
from .tensors import Tensors, open_tensors
from .writing import Rounded, cannot, plain_json, without, write_folder

WEIGHTS, CONFIG = "ae.pt", "config.json"
HINTS = {
    "k": "latents active per row, where the file has none",
    "dict_class": "class of the tool: 'AutoEncoderTopK', 'BatchTopKSAE', ...; where no config.json says it",
}
CLASSES = (
    "AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
)  # fmt: skip


def found(path: Path) -> bool:
    return path.name == WEIGHTS if path.is_file() else (path / WEIGHTS).is_file()


def load(path: Path, k: int | None = None, dict_class: str | None = None) -> Parts:
    path = path / WEIGHTS if path.is_dir() else path
    tensors = open_tensors(path, "the weights of a dictionary of dictionary_learning")
    config = path.with_name(CONFIG)
    about: dict[str, Any] = {"format": "dictionary_learning"}
    trainer = None
    if config.is_file():
        cfg = read_fields(config, "")
        trainer = cfg.section("trainer")
        about |= {name: trainer.values[name] for name in ("layer", "lm_name", "submodule_name") if name in trainer}
        context = cfg.section("buffer", {}).values.get("ctx_len")
        about |= {} if context is None else {"context_size": context}
    name = _class(tensors, trainer, dict_class)
    fields: dict[str, Any] = {"select": "relu", "pre_bias": name not in ("AutoEncoderNew", "JumpReluAutoEncoder")}
    if name in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        d, m = tensors.shape("W_enc", 2)
        weights = {"W_enc": tensors.take("W_enc", d, m).T, "W_dec": tensors.take("W_dec", m, d)}
        weights |= {"b_enc": tensors.take("b_enc", m), "b_dec": tensors.take("b_dec", d)}
    else:
        m, d = tensors.shape("encoder.weight", 2)
        weights = {"W_enc": tensors.take("encoder.weight", m, d), "W_dec": tensors.take("decoder.weight", d, m).T}
        bias = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias", "GatedAutoEncoder": "decoder_bias"}
        weights["b_dec"] = tensors.take(bias.get(name, "b_dec"), d)
        weights["b_enc"] = tensors.take("gate_bias" if name == "GatedAutoEncoder" else "encoder.bias", m)
    if name == "GatedAutoEncoder":
        fields["gated"] = True
        weights |= {"r_mag": tensors.take("r_mag", m), "b_mag": tensors.take("mag_bias", m)}
    elif name == "JumpReluAutoEncoder":
        fields["select"], weights["threshold"] = "threshold", tensors.take("threshold", m, infinite=True)
    elif name in ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        fields["k"] = _k(tensors, trainer, k, m)
        fields["select"] = "topk" if name == "AutoEncoderTopK" else "batch_topk"
        if "threshold" in tensors or name != "AutoEncoderTopK":
            about["threshold"] = threshold = float(tensors.number("threshold"))
            if name != "AutoEncoderTopK":
                weights["threshold"] = torch.tensor(threshold, dtype=torch.float64)
        if name == "MatryoshkaBatchTopKSAE":
            about["group_sizes"] = _groups(tensors, m)
    tensors.end()
    for key, value in ((d, "activation_dim"), (m, "dict_size")):
        if trainer is not None and value in trainer and trainer.whole(value) != key:
            raise trainer.error(value, f"is {trainer.values[value]}, but the weights in {path.name} have {key}")
    return Parts(path, weights, fields, about)


def _class(tensors: Tensors, trainer: Fields | None, given: str | None) -> str:
    """The class of the tool: by its name, or by tensors that no other has."""
    said = trainer.choice("dict_class", CLASSES) if trainer is not None and "dict_class" in trainer else None
    if given is not None and given not in CLASSES:
        raise ValueError(f"dict_class must be one of {', '.join(map(repr, CLASSES))}, got {given!r}")
    if given or said:
        return given or said
    names = tensors.names
    for name, marks in (
        ("AutoEncoder", {"bias", "encoder.weight"}), ("GatedAutoEncoder", {"gate_bias"}),
        ("MatryoshkaBatchTopKSAE", {"group_sizes"}), ("AutoEncoderNew", {"decoder.bias"}),
    ):  # fmt: skip
        if marks <= names:
            return name
    if {"W_enc", "threshold"} <= names and len(tensors.shape("threshold", 1)) == 1:
        return "JumpReluAutoEncoder"
    raise FormatError(
        f"{tensors.path}: there is no {CONFIG} that says which class it is of, and its tensors "
        f"({', '.join(sorted(names))}) do not tell: give dict_class='AutoEncoderTopK' or 'BatchTopKSAE'"
    )


def _k(tensors: Tensors, trainer: Fields | None, k: int | None, m: int) -> int:
    stored = tensors.number("k") if "k" in tensors else None
    if stored is not None and (stored != int(stored) or not 1 <= stored <= m):
        raise tensors.error("k", f"must be a whole number from 1 to {m}, got {stored}")
    said = trainer.whole("k") if trainer is not None and "k" in trainer else None
    for name, other in (("k", k), ("k of config.json", said)):
        if stored is not None and other is not None and other != stored:
            raise tensors.error("k", f"is {stored}, but {name} is {other}")
    if None not in (k, said) and k != said:
        raise trainer.error("k", f"is {said}, but k is {k}")
    if stored is None and k is None and said is None:
        raise FormatError(f"{tensors.path}: there is no tensor 'k', and no {CONFIG} that has it: give k=")
    return int(next(value for value in (stored, k, said) if value is not None))


def _groups(tensors: Tensors, m: int) -> list[int]:
    sizes = tensors.vector("group_sizes")
    if min(sizes, default=0) < 1 or sum(sizes) != m:
        raise tensors.error("group_sizes", f"must be above 0 and add up to {m}, got {sizes}")
    return sizes


def save(coder: SparseCoder, path: Path, metadata: dict[str, Any]) -> None:
    config = coder.config
    tool = "dictionary_learning"
    without(tool, config, "d_out", "skip", "sites", "input_norm", "select_by_norm")
    groups = metadata.get("group_sizes")
    names = {
        ("topk", True): "AutoEncoderTopK", ("threshold", False): "JumpReluAutoEncoder",
        ("batch_topk", True): "BatchTopKSAE" if groups is None else "MatryoshkaBatchTopKSAE",
        ("relu", True): "GatedAutoEncoder" if config.gated else "AutoEncoder",
        ("relu", False): None if config.gated else "AutoEncoderNew",
    }  # fmt: skip
    name = names.get((config.select, config.pre_bias))
    if name is None or config.activation != "relu":
        which = f"activation {config.activation!r}, gated {config.gated} and pre_bias {config.pre_bias}"
        raise cannot(tool, f"coder with select {config.select!r}, {which}")
    bias = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias", "GatedAutoEncoder": "decoder_bias"}
    if name in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        tensors = {"W_enc": coder.W_enc.T, "b_enc": coder.b_enc, "W_dec": coder.W_dec, "b_dec": coder.b_dec}
    else:
        tensors = {"encoder.weight": coder.W_enc, "decoder.weight": coder.W_dec.T, bias.get(name, "b_dec"): coder.b_dec}
        tensors["gate_bias" if config.gated else "encoder.bias"] = coder.b_enc
    if config.gated:
        tensors |= {"r_mag": coder.r_mag, "mag_bias": coder.b_mag}
    if name == "JumpReluAutoEncoder":
        tensors["threshold"] = Rounded(config.torch_dtype, tool)("threshold", coder.threshold)
    elif config.select in ("topk", "batch_topk"):
        tensors |= {"k": torch.tensor(config.k, dtype=torch.int32), "threshold": _threshold(coder, metadata)}
    if name == "MatryoshkaBatchTopKSAE":
        if sum(groups) != config.m:
            raise ValueError(f"metadata: group_sizes must add up to m = {config.m}, got {groups}")
        tensors["group_sizes"] = torch.tensor(groups, dtype=torch.int64)
    trainer = {
        "trainer_class": "fusae", "dict_class": name, "activation_dim": config.d, "dict_size": config.m,
        "dtype": DTYPE_NAMES[config.torch_dtype], "layer": metadata.get("layer"),
        "lm_name": metadata.get("lm_name", metadata.get("model_name")) or "unknown",
        "submodule_name": metadata.get("submodule_name", metadata.get("hook_name")),
    }  # fmt: skip
    trainer |= {"k": config.k} if config.select in ("topk", "batch_topk") else {}
    context = metadata.get("context_size")
    write_folder(path, {WEIGHTS: tensors}, {CONFIG: plain_json({"trainer": trainer, "buffer": {"ctx_len": context}})})


def _threshold(coder: SparseCoder, metadata: dict[str, Any]) -> torch.Tensor:
    """Of a batch top-k. A top-k has one beside it in this tool; -1: not known. One below 0 is 0 in a coder."""
    given = metadata.get("threshold", -1.0)
    if coder.config.select == "batch_topk":
        value = float(coder.threshold)
        given = given if given < 0 and value == 0 and metadata.get("format") == "dictionary_learning" else value
    return torch.tensor(given, dtype=torch.float32)
