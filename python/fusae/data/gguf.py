# SPDX-License-Identifier: Apache-2.0
"""Language models in GGUF files: architecture llama, byte-level BPE tokenizer, weights dequantised."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .models import LoadedModel, quiet, require

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def load_gguf(path: Path, dtype: torch.dtype) -> LoadedModel:
    """`load_model` of a ``.gguf`` file."""
    gguf, transformers = require("gguf"), require("transformers")
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ValueError(f"path: {path} is no GGUF file (it starts with {magic!r}, not b'GGUF')")
    try:
        reader = gguf.GGUFReader(str(path))
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ValueError(f"path: {path} is damaged or truncated ({type(error).__name__}: {error})") from error

    meta = _Metadata(path, {name: field for name, field in reader.fields.items()})
    architecture = meta.get("general.architecture")
    if architecture != "llama":
        raise ValueError(
            f"path: {path} holds architecture {architecture!r}; GGUF files are read for 'llama' only. "
            "Use a Hugging Face folder for other models."
        )
    if meta.get("llama.rope.scaling.type", "none") != "none" or meta.get("llama.expert_count", 0):
        raise ValueError(f"path: {path} uses rotary scaling or experts, which are not supported from GGUF")

    heads, kv_heads = meta.get("llama.attention.head_count"), meta.get("llama.attention.head_count_kv")
    state = {}
    for tensor in reader.tensors:
        name = _parameter_name(path, tensor.name)
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        if name.endswith("q_proj.weight"):
            weight = _rotate_half_order(weight, heads)
        elif name.endswith("k_proj.weight"):
            weight = _rotate_half_order(weight, kv_heads)
        # A copy where needed: unquantised tensors are views of the read-only file.
        state[name] = torch.from_numpy(np.require(weight, requirements=["C", "W"])).to(dtype)

    tokenizer = _tokenizer(path, meta)
    width = meta.get("llama.embedding_length")
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=width,
        intermediate_size=meta.get("llama.feed_forward_length"),
        num_hidden_layers=meta.get("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=meta.get("llama.attention.key_length", width // heads),
        max_position_embeddings=meta.get("llama.context_length"),
        rms_norm_eps=meta.get("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": meta.get("llama.rope.freq_base", 10000.0)},
        tie_word_embeddings="lm_head.weight" not in state,
        bos_token_id=meta.get("tokenizer.ggml.bos_token_id", None),
        eos_token_id=meta.get("tokenizer.ggml.eos_token_id", None),
    )
    with quiet(transformers):
        # With a state dict in hand, from_pretrained builds the model empty and takes the tensors as they are.
        model, info = transformers.LlamaForCausalLM.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
        raise ValueError(f"path: the tensors of {path} do not make up a Llama model: {info}")
    bos = meta.get("tokenizer.ggml.bos_token_id", None)
    return LoadedModel(
        model.eval(), tokenizer, path.stem, "causal", None if bos is None else tokenizer.id_to_token(bos)
    )


class _Metadata:
    def __init__(self, path: Path, fields: dict[str, Any]) -> None:
        self._path, self._fields = path, fields

    def get(self, key: str, *default: Any) -> Any:
        if key in self._fields:
            return self._fields[key].contents()
        if default:
            return default[0]
        raise ValueError(f"path: {self._path} has no metadata {key!r}")


def _parameter_name(path: Path, name: str) -> str:
    parts = name.split(".")
    if parts[-1] == "weight":
        if len(parts) == 2 and parts[0] in _TOP:
            return f"{_TOP[parts[0]]}.weight"
        if len(parts) == 4 and parts[0] == "blk" and parts[2] in _BLOCK:
            return f"model.layers.{parts[1]}.{_BLOCK[parts[2]]}.weight"
    raise ValueError(f"path: {path} holds a tensor {name!r}, which a plain Llama model does not have; not supported")


def _rotate_half_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection, from llama.cpp's order to the one transformers wants.

    llama.cpp rotates neighbouring rows (2i, 2i + 1) of a head, transformers rotates rows (i, i + head_dim / 2), so GGUF
    files of the llama architecture hold these two projections with their rows interleaved.
    """
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type


def _tokenizer(path: Path, meta: _Metadata) -> Tokenizer:
    require("tokenizers")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind, split = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre", "default")
    # What llama.cpp calls 'smollm' cuts out every digit (any Unicode number) before the GPT-2 pattern.
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    known = {
        "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
        "gpt-2": lambda: byte_level,
    }
    if kind != "gpt2" or split not in known:
        raise ValueError(
            f"path: {path} has a tokenizer of kind {kind!r} with pre-tokenizer {split!r}; supported from GGUF: "
            f"kind 'gpt2' (byte-level BPE) with {sorted(known)}. Use a Hugging Face folder for others."
        )
    tokens, types = meta.get("tokenizer.ggml.tokens"), meta.get("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in meta.get("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = known[split]()
    tokenizer.decoder = decoders.ByteLevel()
    for special in (True, False):
        wanted = _CONTROL if special else _USER_DEFINED
        added = [
            AddedToken(t, special=special, normalized=False)
            for t, kind in zip(tokens, types, strict=True)
            if kind == wanted
        ]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    return tokenizer
