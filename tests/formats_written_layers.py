# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that hold several layers, written as in formats_written.py: circuit-tracer's, and those of its kind."""

import importlib.util
import sys
from pathlib import Path

import torch


def _sibling(name):
    """A module beside this one (tests are no package), the same one for all."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_one = _sibling("formats_written")
D, M, K, Written = _one.D, _one.M, _one.K, _one.Written
base, f64, jump, rand, store, topk = _one.base, _one.f64, _one.jump, _one.rand, _one.store, _one.topk


def circuit_tracer(path: Path, activation: str = "relu", skip: bool = False, layers: int = 3) -> list[Written]:
    """A folder of transcoders; one `Written` of each layer, whose hint names it."""
    written = []
    for i in range(layers):
        w = base(seed=10 * i)
        tensors = {"W_enc": w["enc"], "W_dec": w["dec"], "b_enc": w["be"], "b_dec": w["bd"]}
        if activation == "jump_relu":
            tensors["activation_function.threshold"] = w["th"]
        if skip:
            tensors["W_skip"] = rand(D, D, seed=5 + i)
        store(path / f"layer_{i}.safetensors", tensors)
        w, t = f64(w), f64(tensors)

        def encode(x, w=w):
            pre = x @ w["enc"].T + w["be"]
            if activation == "topk":
                return topk(pre, K, relu=False)
            return pre * (pre > w["th"]) if activation == "jump_relu" else pre.relu()

        def decode(f, x, w=w, t=t):
            y = f @ w["dec"] + w["bd"]
            return y + x @ t["W_skip"].T if skip else y

        select = {"relu": "relu", "topk": "topk", "jump_relu": "threshold"}[activation]
        config = {"select": select, "pre_bias": False, "d_out": D, "skip": skip}
        config |= {"k": K, "activation": "none"} if activation == "topk" else {}
        written.append(Written(path, encode, decode, config, "circuit-tracer", {"layer": i}))
    k = f"k: {K}\nactivation: topk\n" if activation == "topk" else ""
    path.joinpath("config.yaml").write_text(
        f"model_name: toy\nmodel_kind: transcoder_set\n{k}feature_input_hook: mlp.hook_in\n"
        "feature_output_hook: hook_mlp_out\nscan: org/toy\n"
    )
    return written


def clt(path: Path, thresholds: bool = True, gemma: bool = False, layers: int = 3) -> Written:
    """A cross-layer transcoder; `encode` ``[n, L, d]`` -> ``[n, L, m]``, `decode` -> ``[n, L, d]``."""
    ws = [base(out=D * layers, seed=20 * s) for s in range(layers)]
    for s, w in enumerate(ws):
        w["bd"], w["dec"] = w["bd"][:D], w["dec"].unflatten(1, (layers, D)).clone()
        w["dec"][:, :s] = 0
        if gemma:
            tensors = {"w_enc": w["enc"].T, "b_enc": w["be"], "b_dec": w["bd"], "w_dec": w["dec"], "threshold": w["th"]}
            tensors["affine_skip_connection"] = rand(D, D, seed=60 + s)
            store(path / f"params_layer_{s}.safetensors", tensors)
            continue
        tensors = {f"W_enc_{s}": w["enc"], f"b_enc_{s}": w["be"], f"b_dec_{s}": w["bd"]}
        store(path / f"W_enc_{s}.safetensors", tensors | ({f"threshold_{s}": w["th"]} if thresholds else {}))
        store(path / f"W_dec_{s}.safetensors", {f"W_dec_{s}": w["dec"][:, s:]})
    if not gemma:
        path.joinpath("config.yaml").write_text("model_name: toy\nmodel_kind: cross_layer_transcoder\nscan: org/clt\n")
    ws = [f64(w) for w in ws]

    def encode(x):
        pres = [x[:, s] @ w["enc"].T + w["be"] for s, w in enumerate(ws)]
        return torch.stack([jump(p, w["th"]) if thresholds else p.relu() for p, w in zip(pres, ws, strict=True)], 1)

    def decode(f, x):
        y = sum(torch.einsum("nm,mtd->ntd", f[:, s], w["dec"]) for s, w in enumerate(ws))
        y = y + torch.stack([w["bd"] for w in ws])
        if gemma:
            y = y + torch.stack([x[:, s] @ rand(D, D, seed=60 + s).double() for s in range(layers)], 1)
        return y

    config = {"layers": layers, "select": "threshold" if thresholds else "relu", "skip": gemma}
    return Written(path, encode, decode, config, "gemma-scope-2" if gemma else "circuit-tracer")
