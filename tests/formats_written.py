# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other tools, written here from the description of their formats and not by fusae, each with the
tool's own forward pass restated in dense float64 torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

D, M, K, OUT = 12, 40, 5, 10


@dataclasses.dataclass
class Written:
    """A checkpoint on disk.

    `encode` and `decode` are the tool's, on float64: rows ``[n, d]`` -> dense codes ``[n, m]`` -> output (of the rows
    too, for those that need them). `config`: what the coder must be, in part.
    """

    path: Path
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor, Tensor], Tensor]
    config: dict[str, Any]
    format: str
    hints: dict[str, Any] = dataclasses.field(default_factory=dict)


def rand(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    gen = torch.Generator().manual_seed(sum(shape) * 7 + seed)
    return torch.randn(shape, generator=gen) * scale


def base(d: int = D, m: int = M, out: int | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Weights, rows of latents first."""
    out = d if out is None else out
    return {
        "enc": rand(m, d, seed=seed) / d**0.5, "dec": rand(m, out, seed=seed + 1),
        "be": rand(m, seed=seed + 2, scale=0.3),
        "bd": rand(out, seed=seed + 3, scale=0.5), "th": rand(m, seed=seed + 4).abs() * 0.4,
    }  # fmt: skip


def topk(pre: Tensor, k: int, relu: bool = True) -> Tensor:
    best = pre.topk(k, -1)
    values = best.values.relu() if relu else best.values
    return torch.zeros_like(pre).scatter(-1, best.indices, values)


def jump(pre: Tensor, threshold: Tensor) -> Tensor:
    return pre.relu() * (pre > threshold)


def f64(w: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in w.items()}


def store(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save(tensors, path)


def text(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


# --- SAELens --------------------------------------------------------------------------------------------------------


def saelens(path: Path, architecture: str, dtype: str = "float32", **cfg: Any) -> Written:
    transcoder = "transcoder" in architecture
    w = base(out=OUT if transcoder else None)
    tensors = {"W_enc": w["enc"].T, "W_dec": w["dec"], "b_dec": w["bd"]}
    config: dict[str, Any] = {"select": "relu", "pre_bias": not transcoder, "d": D, "m": M}
    about = {
        "architecture": architecture, "d_in": D, "d_sae": M, "dtype": dtype, "device": "cpu",
        "apply_b_dec_to_input": not transcoder, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12", "hook_name": "blocks.3.hook_resid_post", "model_name": "toy"},
    }  # fmt: skip
    if transcoder:
        about["d_out"] = config["d_out"] = OUT
    if architecture == "gated":
        tensors |= {"b_gate": w["be"], "b_mag": rand(M, seed=9, scale=0.2), "r_mag": rand(M, seed=8, scale=0.1)}
        config["gated"] = True
    else:
        tensors["b_enc"] = w["be"]
    if "jumprelu" in architecture:
        tensors["threshold"], config["select"] = w["th"], "threshold"
    if architecture in ("topk", "abstopk", "batchtopk", "matryoshka_batchtopk"):
        about |= {"k": K, "rescale_acts_by_decoder_norm": False}
        config |= {"k": K, "select": {"topk": "topk", "abstopk": "abs"}.get(architecture, "batch_topk")}
    if "batchtopk" in architecture:
        tensors["topk_threshold"] = torch.tensor(0.37, dtype=torch.float64)
    if "skip" in architecture:
        tensors["W_skip"], config["skip"] = rand(OUT, D, seed=5), True
    about |= cfg
    config["select_by_norm"] = by_norm = about.get("rescale_acts_by_decoder_norm", False)
    config["pre_bias"] = about["apply_b_dec_to_input"]
    store(
        path / "sae_weights.safetensors",
        {n: t.to(getattr(torch, dtype.removeprefix("torch."))) for n, t in tensors.items()},
    )
    text(path / "cfg.json", about)
    t = f64(safetensors.torch.load_file(path / "sae_weights.safetensors"))
    norm = about["normalize_activations"]
    config["input_norm"] = {"layer_norm": "layer", "constant_norm_rescale": "rms"}.get(norm, "none")

    def normalised(x):
        if norm == "layer_norm":
            mean = x.mean(-1, keepdim=True)
            std = (x - mean).std(-1, keepdim=True)
            return (x - mean) / (std + 1e-5), lambda y: y * std + mean
        if norm == "constant_norm_rescale":
            c = D**0.5 / x.norm(dim=-1, keepdim=True)
            return x * c, lambda y: y / c
        return x, lambda y: y

    def encode(x):
        x, _ = normalised(x)
        inputs = x - t["b_dec"] if about["apply_b_dec_to_input"] else x
        if architecture == "gated":
            gate = inputs @ t["W_enc"] + t["b_gate"]
            return (gate > 0) * (inputs @ (t["W_enc"] * t["r_mag"].exp()) + t["b_mag"]).relu()
        pre = inputs @ t["W_enc"] + t["b_enc"]
        score = pre * t["W_dec"].norm(dim=-1) if by_norm else pre
        if architecture == "topk":
            return topk(score, K)
        if architecture == "abstopk":
            best = score.abs().topk(K, -1).indices
            return torch.zeros_like(pre).scatter(-1, best, score.gather(-1, best))
        if "batchtopk" in architecture:
            return jump(score, t["topk_threshold"])
        return jump(pre, t["threshold"]) if "threshold" in t else pre.relu()

    def decode(f, x):
        f = f / t["W_dec"].norm(dim=-1) if by_norm else f
        y = normalised(x)[1](f @ t["W_dec"] + t["b_dec"])
        return y + x @ t["W_skip"].T if "W_skip" in t else y

    return Written(path, encode, decode, config, "saelens")


def saelens_old(path: Path, **changes: Any) -> Written:
    """A configuration from before version 6: flat, activation by name."""
    written = saelens(path, "topk")
    cfg = {
        "hook_point": "blocks.2.attn.hook_z", "hook_point_layer": 2, "d_in": D, "d_sae": M, "dtype": "torch.float32",
        "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "normalize_activations": False,
        "model_name": "gpt2-small", "sae_lens_training_version": None,
    }  # fmt: skip
    text(path / "cfg.json", cfg | changes)
    return written


# --- sparsify -------------------------------------------------------------------------------------------------------


def sparsify(path: Path, **cfg: Any) -> Written:
    w = base()
    about = {
        "activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": M, "k": K,
        "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D,
    } | cfg  # fmt: skip
    tensors = {"encoder.weight": w["enc"], "encoder.bias": w["be"], "W_dec": w["dec"], "b_dec": w["bd"]}
    if about["skip_connection"]:
        tensors["W_skip"] = rand(D, D, seed=5)
    store(path / "sae.safetensors", tensors)
    text(path / "cfg.json", about)
    t = f64(tensors)

    def encode(x):
        pre = ((x if about["transcode"] else x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]).relu()
        if about["activation"] == "topk":
            return topk(pre, K)
        best = pre.unflatten(-1, (K, -1)).max(-1)
        index = best.indices + torch.arange(0, M, M // K)
        return torch.zeros_like(pre).scatter(-1, index, best.values)

    def decode(f, x):
        y = f @ t["W_dec"] + t["b_dec"]
        return y + x @ t["W_skip"].T if about["skip_connection"] else y

    config = {
        "k": K, "select": "topk" if about["activation"] == "topk" else "group_max", "pre_bias": not about["transcode"],
        "skip": about["skip_connection"], "d_out": D if about["transcode"] else None,
    }  # fmt: skip
    return Written(path, encode, decode, config, "sparsify")


# --- dictionary_learning --------------------------------------------------------------------------------------------


def dictionary_learning(path: Path, name: str, threshold: float = 0.3) -> Written:
    w = base()
    linear = {"encoder.weight": w["enc"], "encoder.bias": w["be"], "decoder.weight": w["dec"].T}
    counted = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(threshold)}
    matrices = {"W_enc": w["enc"].T, "b_enc": w["be"], "W_dec": w["dec"], "b_dec": w["bd"]}
    tensors = {
        "AutoEncoder": {**linear, "bias": w["bd"]},
        "AutoEncoderNew": {**linear, "decoder.bias": w["bd"]},
        "GatedAutoEncoder": {
            "encoder.weight": w["enc"], "decoder.weight": w["dec"].T, "decoder_bias": w["bd"], "gate_bias": w["be"],
            "r_mag": rand(M, seed=8, scale=0.1), "mag_bias": rand(M, seed=9, scale=0.2),
        },
        "JumpReluAutoEncoder": {**matrices, "threshold": w["th"]},
        "AutoEncoderTopK": {**linear, "b_dec": w["bd"], **counted},
        "BatchTopKSAE": {**linear, "b_dec": w["bd"], **counted},
        "MatryoshkaBatchTopKSAE": {**matrices, **counted, "group_sizes": torch.tensor([8, 12, 20])},
    }[name]  # fmt: skip
    store(path / "ae.pt", tensors)
    trainer = {"dict_class": name, "activation_dim": D, "dict_size": M, "layer": 3, "lm_name": "org/toy", "k": K}
    text(path / "config.json", {"trainer": trainer, "buffer": {"ctx_len": 128}})
    pre_bias = name not in ("AutoEncoderNew", "JumpReluAutoEncoder")
    w = f64(w)

    def encode(x):
        inputs = x - w["bd"] if pre_bias else x
        pre = inputs @ w["enc"].T + w["be"]
        if name == "GatedAutoEncoder":
            plain = inputs @ w["enc"].T
            mag = tensors["r_mag"].double().exp() * plain + tensors["mag_bias"].double()
            return (plain + w["be"] > 0) * mag.relu()
        if name == "AutoEncoderTopK":
            return topk(pre.relu(), K)
        if "BatchTopK" in name:
            return pre.relu() * (pre.relu() > torch.tensor(threshold).double())
        return (pre * (pre > w["th"])).relu() if name == "JumpReluAutoEncoder" else pre.relu()

    selects = {"AutoEncoderTopK": "topk", "JumpReluAutoEncoder": "threshold"}
    select = selects.get(name, "batch_topk" if "BatchTopK" in name else "relu")
    config = {"select": select, "pre_bias": pre_bias, "gated": name == "GatedAutoEncoder"}
    config |= {"k": K} if "TopK" in name else {}
    return Written(path, encode, lambda f, x: f @ w["dec"] + w["bd"], config, "dictionary_learning")


# --- single files ---------------------------------------------------------------------------------------------------


def openai(path: Path, activation: str = "TopK", post: str = "ReLU", tied: bool = False) -> Written:
    w = base()
    w["be"] = w["be"] - 1.5  # so that some rows have fewer than k above 0
    dec = w["enc"] if tied else w["dec"]
    state = {
        "pre_bias": w["bd"], "latent_bias": w["be"], "encoder.weight": w["enc"],
        "stats_last_nonzero": torch.zeros(M, dtype=torch.long), "latents_activation_frequency": torch.ones(M),
        "latents_mean_square": torch.ones(M), "activation": activation,
        "activation_state_dict": {"k": K, "postact_fn": post} if activation == "TopK" else {},
    }  # fmt: skip
    state |= {"decoder.linear.weight": w["enc"]} if tied else {"decoder.weight": dec.T.contiguous()}
    path.mkdir(parents=True, exist_ok=True)
    torch.save(state, path / "3.pt")
    w, dec = f64(w), dec.double()

    def normalised(x):
        mean = x.mean(-1, keepdim=True)
        std = (x - mean).std(-1, keepdim=True)
        return ((x - mean) / (std + 1e-5), std, mean) if activation == "TopK" else (x, 1.0, 0.0)

    def encode(x):
        pre = (normalised(x)[0] - w["bd"]) @ w["enc"].T + w["be"]
        return topk(pre, K, post == "ReLU") if activation == "TopK" else pre.relu()

    def decode(f, x):
        _, std, mean = normalised(x)
        return (f @ dec + w["bd"]) * std + mean

    config = {"select": "topk" if activation == "TopK" else "relu", "pre_bias": True}
    if activation == "TopK":
        config |= {"input_norm": "layer", "k": K, "activation": "relu" if post == "ReLU" else "none"}
    return Written(path / "3.pt", encode, decode, config, "openai")


def qwen(path: Path) -> Written:
    w = base()
    path = path / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_5" / "layer7.sae.pt"
    store(path, {"W_enc": w["enc"], "W_dec": w["dec"].T, "b_enc": w["be"], "b_dec": w["bd"]})
    w = f64(w)
    config = {"select": "topk", "k": K, "pre_bias": False}
    return Written(
        path, lambda x: topk(x @ w["enc"].T + w["be"], K), lambda f, x: f @ w["dec"] + w["bd"], config, "qwen-scope"
    )


def linear(path: Path, format: str) -> Written:
    w = base()
    enc, dec = ("encoder_linear", "decoder_linear") if format == "goodfire" else ("encoder", "decoder")
    path = path / "some-sae.pth"
    store(
        path, {f"{enc}.weight": w["enc"], f"{enc}.bias": w["be"], f"{dec}.weight": w["dec"].T, f"{dec}.bias": w["bd"]}
    )
    w = f64(w)
    return Written(
        path, lambda x: (x @ w["enc"].T + w["be"]).relu(), lambda f, x: f @ w["dec"] + w["bd"],
        {"select": "relu", "pre_bias": False}, format,
    )  # fmt: skip


# --- Gemma Scope, OpenMOSS ------------------------------------------------------------------------------------------


def gemma(path: Path, embedding: bool | None = None) -> Written:
    w = base()
    path.mkdir(parents=True, exist_ok=True)
    arrays = {"W_enc": w["enc"].T, "W_dec": w["dec"], "b_enc": w["be"], "b_dec": w["bd"], "threshold": w["th"]}
    np.savez(path / "params.npz", **{name: value.contiguous().numpy() for name, value in arrays.items()})
    w = f64(w)
    scale = D**0.5 if embedding else 1.0

    def encode(x):
        return jump(x / scale @ w["enc"].T + w["be"], w["th"])

    config = {"select": "threshold", "pre_bias": False}
    hints = {} if embedding is None else {"embedding": embedding}
    return Written(path, encode, lambda f, x: (f @ w["dec"] + w["bd"]) * scale, config, "gemma-scope", hints)


def gemma_2(path: Path, skip: bool = False) -> Written:
    w = base(out=OUT if skip else D)
    tensors = {"w_enc": w["enc"].T, "w_dec": w["dec"], "b_enc": w["be"], "b_dec": w["bd"], "threshold": w["th"]}
    affine = rand(D, OUT, seed=5)
    if skip:
        tensors["affine_skip_connection"] = affine
    store(path / "params.safetensors", tensors)
    w = f64(w)

    def decode(f, x):
        y = f @ w["dec"] + w["bd"]
        return y + x @ affine.double() if skip else y

    config = {"select": "threshold", "pre_bias": False, "skip": skip, "d_out": OUT if skip else None}
    return Written(path, lambda x: jump(x @ w["enc"].T + w["be"], w["th"]), decode, config, "gemma-scope-2")


def llama_scope(path: Path, **changes: Any) -> Written:
    """Rows are scaled to a norm of √d on average; the one threshold is of plain rows. As `changes`: a transcoder."""
    w = base()
    w["dec"] = w["dec"] / w["dec"].norm(dim=1, keepdim=True)
    hyper = {
        "d_model": D, "d_sae": M, "act_fn": "jumprelu", "jump_relu_threshold": 0.11, "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 1.75, "out": 1.75}, "use_decoder_bias": True, "top_k": 50,
        "hook_point_in": "blocks.8.hook_resid_post", "hook_point_out": "blocks.8.hook_resid_post",
    } | changes  # fmt: skip
    side = hyper.pop("threshold_side", None)
    tensors = {
        "encoder.weight": w["enc"],
        "encoder.bias": w["be"],
        "decoder.weight": w["dec"].T,
        "decoder.bias": w["bd"],
    }
    store(path / "checkpoints" / "final.safetensors", tensors)
    text(path / "hyperparams.json", hyper)
    w = f64(w)
    inner, outer = (D**0.5 / hyper["dataset_average_activation_norm"][s] for s in ("in", "out"))
    threshold = torch.tensor(hyper["jump_relu_threshold"] * (inner if side == "in" else outer)).float().double()

    def encode(x):
        return jump(inner * x @ w["enc"].T + w["be"], threshold)

    config = {"select": "threshold", "pre_bias": False, "d_out": None if side is None else D}
    hints = {} if side is None else {"threshold_side": side}
    return Written(path, encode, lambda f, x: (f @ w["dec"] + w["bd"]) / outer, config, "llama-scope", hints)


def llama_scope_r1(path: Path) -> Written:
    w = base()
    config = {
        "d_model": D,
        "expansion_factor": M / D,
        "hook_point_in": "blocks.1.hook_resid_post",
        "act_fn": "jumprelu",
    }
    tensors = {
        "encoder.weight": w["enc"],
        "encoder.bias": w["be"],
        "decoder.weight": w["dec"].T,
        "decoder.bias": w["bd"],
    }
    tensors["log_jumprelu_threshold"] = w["th"].log()
    store(path / "sae_weights.safetensors", tensors)
    text(path / "config.json", config)
    threshold, w = w["th"].log().exp().double(), f64(w)
    return Written(
        path, lambda x: jump(1.5 * x @ w["enc"].T + w["be"], threshold), lambda f, x: (f @ w["dec"] + w["bd"]) / 1.5,
        {"select": "threshold", "pre_bias": False}, "llama-scope", {"input_scale": 1.5},
    )  # fmt: skip


def llamascopium(
    path: Path, act: str = "jumprelu", norm: str = "dataset-wise", by_norm: bool = True, **changes
) -> Written:
    """`encode` is of the tool's 'inference' form: codes in the scale of plain rows."""
    w = base()
    hook_in = "blocks.2.hook_resid_post"
    cfg = {
        "sae_type": "sae", "d_model": D, "expansion_factor": M / D, "act_fn": act, "norm_activation": norm,
        "sparsity_include_decoder_norm": by_norm, "top_k": K, "use_decoder_bias": True, "hook_point_in": hook_in,
        "hook_point_out": hook_in, "use_glu_encoder": False,
    } | changes  # fmt: skip
    hook_out = cfg["hook_point_out"]
    tensors = {"W_E": w["enc"].T, "b_E": w["be"], "W_D": w["dec"], "b_D": w["bd"]}
    tensors |= {f"dataset_average_activation_norm.{h}": torch.tensor(n) for h, n in ((hook_out, 5.0), (hook_in, 2.0))}
    if act == "jumprelu":
        tensors["activation_function.log_jumprelu_threshold"] = w["th"].log()
    store(path / "sae_weights.safetensors", tensors)
    text(path / "config.json", cfg)
    threshold, w = w["th"].log().exp().double(), f64(w)
    same = hook_in == hook_out
    inner, outer = (D**0.5 / 2.0, D**0.5 / (2.0 if same else 5.0)) if norm == "dataset-wise" else (1.0, 1.0)

    def scales(x):
        token = D**0.5 / x.norm(dim=-1, keepdim=True)
        return (token, token) if norm == "token-wise" else (inner, outer)

    def encode(x):
        pre = x * scales(x)[0] @ w["enc"].T + w["be"]
        norms = w["dec"].norm(dim=1) if by_norm and act != "relu" else torch.ones(M).double()
        score = pre * norms
        kept = {"relu": score.relu(), "topk": topk(score, K), "jumprelu": jump(score, threshold)}[act]
        return kept / norms / inner

    def decode(f, x):
        return (f * inner @ w["dec"] + w["bd"]) / scales(x)[1]

    config = {
        "select": {"relu": "relu", "topk": "topk", "jumprelu": "threshold"}[act], "pre_bias": False,
        "select_by_norm": by_norm and act != "relu", "input_norm": "rms" if norm == "token-wise" else "none",
        "d_out": None if same else D,
    }  # fmt: skip
    return Written(path, encode, decode, config, "llamascopium")
