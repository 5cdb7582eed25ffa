# SPDX-License-Identifier: Apache-2.0
"""Single ``.pt`` files: OpenAI, Qwen Scope, and the linear ones of Goodfire and of DeepSeek-R1's dictionaries."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .native import FormatError
from .parts import Parts
from .tensors import Tensors, open_tensors

HINTS: dict[str, dict[str, str]] = {
    "openai": {},
    "qwen-scope": {"k": "latents active per row; the name of the released repository ends with L0_<k>"},
    "goodfire": {},
    "deepseek-r1": {},
}
_OPENAI = {"pre_bias", "latent_bias", "encoder.weight"}
_LINEAR = {
    "goodfire": ("encoder_linear", "decoder_linear"),
    "deepseek-r1": ("encoder", "decoder"),
}
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def kinds(path: Path) -> list[str]:
    """Which of these formats a ``torch.save`` file is of, by the names of its tensors."""
    if not path.is_file() or path.suffix not in (".pt", ".pth"):
        return []
    tensors = open_tensors(path, "")
    names = tensors.names
    if names >= _OPENAI:
        return ["openai"]
    found = [
        kind for kind, (encoder, decoder) in _LINEAR.items()
        if names == {f"{encoder}.weight", f"{encoder}.bias", f"{decoder}.weight", f"{decoder}.bias"}
    ]  # fmt: skip
    if names == {"W_enc", "W_dec", "b_enc", "b_dec"}:
        found.append("qwen-scope")
    return found


def load_openai(path: Path) -> Parts:
    """``act(encoder(x - pre_bias) + latent_bias)``; with TopK on rows that are normalised one by one, and back."""
    tensors = open_tensors(path, "an autoencoder of OpenAI")
    m, d = tensors.shape("encoder.weight", 2)
    pre_bias = tensors.take("pre_bias", d)
    tied = "decoder.weight" not in tensors and "decoder.linear.weight" in tensors
    decoder = tensors.take("decoder.linear.weight", m, d) if tied else tensors.take("decoder.weight", d, m).T
    weights = {
        "W_enc": tensors.take("encoder.weight", m, d), "b_enc": tensors.take("latent_bias", m),
        "W_dec": decoder, "b_dec": pre_bias,
    }  # fmt: skip
    tensors.drop(*_STATISTICS)
    tensors.end()
    activation, state = tensors.plain.get("activation"), tensors.plain.get("activation_state_dict")
    if activation == "ReLU":
        return Parts(path, weights, {"select": "relu"}, {"format": "openai"})
    if activation != "TopK":
        raise FormatError(f"{path}: field 'activation' must be 'TopK' or 'ReLU', got {activation!r}")
    k, post = (state.get("k"), state.get("postact_fn")) if isinstance(state, dict) else (None, None)
    if type(k) is not int or not 1 <= k <= m:
        raise FormatError(f"{path}: field 'activation_state_dict.k' must be a whole number from 1 to {m}, got {k!r}")
    if post not in ("ReLU", "Identity"):
        raise FormatError(
            f"{path}: field 'activation_state_dict.postact_fn' must be 'ReLU' or 'Identity', got {post!r}"
        )
    fields = {"select": "topk", "k": k, "activation": "relu" if post == "ReLU" else "none", "input_norm": "layer"}
    return Parts(path, weights, fields, {"format": "openai"})


def load_qwen_scope(path: Path, k: int | None = None) -> Parts:
    """TopK; `b_dec` is not subtracted from the input."""
    tensors = open_tensors(path, "a dictionary of Qwen Scope (layer<n>.sae.pt)")
    m, d = tensors.shape("W_enc", 2)
    if k is None:
        named = [re.search(r"-L0_(\d{1,9})$", part) for part in path.resolve().parent.parts]
        named = [match for match in named if match]
        if not named:
            raise FormatError(f"{path}: the file does not say how many latents are active per row, nor does a folder "
                              "named as the release is (...-L0_<k>): give k=")  # fmt: skip
        k = int(named[-1][1])
    weights = {
        "W_enc": tensors.take("W_enc", m, d), "b_enc": tensors.take("b_enc", m),
        "W_dec": tensors.take("W_dec", d, m).T, "b_dec": tensors.take("b_dec", d),
    }  # fmt: skip
    tensors.end()
    layer = re.search(r"layer(\d{1,9})\.sae", path.name)
    about: dict[str, Any] = {"format": "qwen-scope"} | ({"layer": int(layer[1])} if layer else {})
    return Parts(path, weights, {"select": "topk", "k": k, "pre_bias": False}, about)


def load_linear(kind: str, path: Path) -> Parts:
    """ReLU between two linear layers with a bias each; nothing is subtracted from the input."""
    tensors = open_tensors(path, f"a dictionary as {kind} has them")
    encoder, decoder = _LINEAR[kind]
    m, d = tensors.shape(f"{encoder}.weight", 2)
    weights = _layers(tensors, encoder, decoder, m, d)
    tensors.end()
    return Parts(path, weights, {"select": "relu", "pre_bias": False}, {"format": kind})


def _layers(tensors: Tensors, encoder: str, decoder: str, m: int, d: int) -> dict[str, Any]:
    return {
        "W_enc": tensors.take(f"{encoder}.weight", m, d), "b_enc": tensors.take(f"{encoder}.bias", m),
        "W_dec": tensors.take(f"{decoder}.weight", d, m).T, "b_dec": tensors.take(f"{decoder}.bias", d),
    }  # fmt: skip
