# SPDX-License-Identifier: Apache-2.0
"""Load a causal language model from a local GGUF file or a local Hugging Face folder. No network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_INSTALL = "pip install 'fusae[lm]'"


class LoadedModel(NamedTuple):
    """A `transformers` causal LM in eval mode, its `tokenizers.Tokenizer`, and a name to report."""

    model: torch.nn.Module
    tokenizer: Tokenizer
    name: str


def load_model(path: str | Path, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Load a causal LM and its tokenizer.

    Args:
        path: a ``.gguf`` file (architecture llama, byte-level BPE tokenizer; quantised weights are dequantised), or a
            folder as `save_pretrained` writes it (any architecture of `AutoModelForCausalLM`, with a fast tokenizer).
        dtype: of the weights.

    The residual stream after b blocks of a Llama model is the output of the module ``model.layers.{b-1}``.

    Raises:
        FileNotFoundError: nothing at `path`.
        ValueError: not a GGUF file, truncated, or of a kind that is not supported (the message says which).
        ModuleNotFoundError: `transformers`, `tokenizers` or `gguf` is not installed.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path, dtype)
    if not path.exists():
        raise FileNotFoundError(
            f"path: no file or folder at {path} (only local models are read; nothing is downloaded)"
        )
    return _load_gguf(path, dtype)


def _load_folder(path: Path, dtype: torch.dtype) -> LoadedModel:
    transformers = _require("transformers")
    if not (path / "config.json").exists():
        raise ValueError(f"path: {path} holds no config.json, so it is no Hugging Face model folder")
    with _quiet(transformers):
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        raise ValueError(
            f"path: the tokenizer of {path} has no fast form ({type(tokenizer).__name__}); add a tokenizer.json"
        )
    return LoadedModel(model.eval(), fast, path.resolve().name)


# --- GGUF ------------------------------------------------------------------------------------------------------------

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


def _load_gguf(path: Path, dtype: torch.dtype) -> LoadedModel:
    gguf, transformers = _require("gguf"), _require("transformers")
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
    with _quiet(transformers):
        # With a state dict in hand, from_pretrained builds the model empty and takes the tensors as they are.
        model, info = transformers.LlamaForCausalLM.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
        raise ValueError(f"path: the tensors of {path} do not make up a Llama model: {info}")
    return LoadedModel(model.eval(), tokenizer, path.stem)


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
    _require("tokenizers")
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


def _require(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ModuleNotFoundError(f"reading language models needs {name!r}: {_INSTALL}", name=name) from None


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No 'Loading weights' bar: a load of a second is not worth one."""
    log = transformers.utils.logging
    shown = log.is_progress_bar_enabled()
    log.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            log.enable_progress_bar()
