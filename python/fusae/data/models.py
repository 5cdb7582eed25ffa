# SPDX-License-Identifier: Apache-2.0
"""Load a language model from a local GGUF file or a local Hugging Face folder. No network, no code from the folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_INSTALL = "pip install 'fusae[lm]'"
_DTYPES = ("float32", "bfloat16", "float16", "auto")


class LoadedModel(NamedTuple):
    """A `transformers` model in eval mode and what belongs to it.

    Attributes:
        model: called with ids ``[batch, ctx]``.
        tokenizer: its `tokenizers.Tokenizer`.
        name: to report.
        kind: ``"causal"``: predicts the next token, so it has a loss; ``"encoder"``: hidden states only.
        bos: the token that the folder or file names as the first of a text, or None.
    """

    model: torch.nn.Module
    tokenizer: Tokenizer
    name: str
    kind: Literal["causal", "encoder"] = "causal"
    bos: str | None = None


def load_model(
    path: str | Path, dtype: torch.dtype | str = torch.float32, device: torch.device | str = "cpu"
) -> LoadedModel:
    """Load a language model and its tokenizer.

    Args:
        path: a ``.gguf`` file (architecture llama, byte-level BPE tokenizer; quantised weights are dequantised), or a
            folder as `save_pretrained` writes it: safetensors in one or several files, with a fast tokenizer. Its
            ``config.json`` says what it is: a causal LM is any architecture of `AutoModelForCausalLM`; everything else
            (BERT and its like; the encoder of T5; a decoder saved without its head) is loaded by `AutoModel` as an
            encoder.
        dtype: of the weights: ``torch.float32``, ``torch.bfloat16``, ``torch.float16``, or their names; ``"auto"``:
            as saved (GGUF: float32).
        device: where the model goes.

    The residual stream after b blocks of a Llama model is the output of the module ``model.layers.{b-1}``;
    `fusae.data.sites` lists such places.

    Raises:
        FileNotFoundError: nothing at `path`.
        ValueError: not a GGUF file or model folder, truncated, weights in pickle files or missing, no tokenizer, or of
            a kind that is not supported (the message says which).
        ModuleNotFoundError: `transformers`, `tokenizers` or `gguf` is not installed.
    """
    path = Path(path)
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    if path.is_dir():
        loaded = _load_folder(path, name)
    elif path.exists():
        from .gguf import load_gguf

        loaded = load_gguf(path, torch.float32 if name == "auto" else getattr(torch, name))
    else:
        raise FileNotFoundError(
            f"path: no file or folder at {path} (only local models are read; nothing is downloaded)"
        )
    return loaded._replace(model=loaded.model.to(device))


def _load_folder(path: Path, dtype: str) -> LoadedModel:
    transformers = require("transformers")
    auto, kind = _class_for(transformers, path)
    _check_weights(path)
    options = {"local_files_only": True, "trust_remote_code": False}
    with quiet(transformers), _said(f"path: {path} cannot be loaded as a model"):
        model, info = auto.from_pretrained(
            path, dtype=dtype, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    # A pooler is no part of the hidden states, and checkpoints of masked LMs lack it.
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key.split("."))
    other = sorted(f"{key} is {list(saved)}, not {list(built)}" for key, saved, built in info["mismatched_keys"])
    if missing or other:
        wrong = f"{len(missing)} are missing, such as {missing[0]}" if missing else f"{len(other)} differ: {other[0]}"
        raise ValueError(
            f"path: the weights in {path} do not make up the {type(model).__name__} of its config.json: {wrong}"
        )
    if model.main_input_name != "input_ids":
        raise ValueError(f"path: {path} holds a {type(model).__name__}, which takes {model.main_input_name}, not text")
    if not any((path / name).exists() for name in _TOKENIZER_FILES):
        raise ValueError(
            f"path: {path} has no tokenizer (none of {', '.join(_TOKENIZER_FILES)}); save it there with "
            "tokenizer.save_pretrained"
        )
    with _said(f"path: the tokenizer of {path} cannot be loaded"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        raise ValueError(
            f"path: the tokenizer of {path} has no fast form ({type(tokenizer).__name__}); add a tokenizer.json"
        )
    bos = tokenizer.bos_token or tokenizer.cls_token
    return LoadedModel(model.eval(), fast, path.resolve().name, kind, bos)


_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tokenizer.tiktoken",
)  # fmt: skip


def _class_for(transformers: Any, path: Path) -> tuple[Any, Literal["causal", "encoder"]]:
    """The Auto class that reads the folder, by its config.json alone."""
    from transformers.models.auto import configuration_auto, modeling_auto

    if not (path / "config.json").exists():
        raise ValueError(f"path: {path} holds no config.json, so it is no Hugging Face model folder")
    config = _json(path / "config.json")
    model_type, architectures = config.get("model_type"), config.get("architectures") or []
    if model_type not in configuration_auto.CONFIG_MAPPING_NAMES:
        raise ValueError(
            f"path: {path} holds a model of type {model_type!r} ({', '.join(map(str, architectures)) or 'unnamed'}), "
            f"which transformers {transformers.__version__} does not know; code in the folder is not run"
        )
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if architectures:
        is_causal = causal is not None and architectures[0] in ((causal,) if isinstance(causal, str) else causal)
    else:
        is_causal = causal is not None and model_type not in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if is_causal:
        return transformers.AutoModelForCausalLM, "causal"
    if not config.get("is_encoder_decoder"):
        return transformers.AutoModel, "encoder"
    if model_type in modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES:
        return transformers.AutoModelForTextEncoding, "encoder"
    raise ValueError(
        f"path: {path} holds an encoder-decoder of type {model_type!r}, whose encoder transformers cannot load alone"
    )


def _check_weights(path: Path) -> None:
    """All files of weights are there and whole, by their headers; `ValueError` names the one that is not."""
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").exists():
        names = ["model.safetensors"]
    elif index.exists():
        parts = _json(index).get("weight_map")
        if not isinstance(parts, dict) or not parts or not all(isinstance(name, str) for name in parts.values()):
            raise ValueError(f"path: {index} has no weight_map, so which files hold the weights is not known")
        names = sorted(set(parts.values()))
    else:
        pickled = sorted(file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickled:
            raise ValueError(
                f"path: the weights of {path} are in pickle files ({', '.join(pickled[:3])}), which can run code when "
                "read; convert them to safetensors first (model.save_pretrained where the source is trusted)"
            )
        raise ValueError(f"path: {path} holds no model.safetensors (nor its index), so it has no weights")
    for name in names:
        if not (path / name).exists():
            raise ValueError(f"path: {path / name} is missing; {index.name} lists {len(names)} files")
        _check_safetensors(path / name)


def _check_safetensors(path: Path) -> None:
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        header = file.read(length) if length <= size else b""
    if start == b"version ":
        raise ValueError(f"path: {path} is a pointer of Git LFS, not the weights; get them with git lfs pull")
    try:
        ends = [entry["data_offsets"][1] for name, entry in json.loads(header).items() if name != "__metadata__"]
        wanted = 8 + length + max(ends, default=0)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"path: {path} is truncated or no safetensors file (its header cannot be read)") from error
    if wanted != size:
        raise ValueError(f"path: {path} is truncated or damaged: it has {size:,} bytes, its header says {wanted:,}")


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"path: {path} is damaged ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"path: {path} is damaged (it holds no JSON object)")
    return content


@contextmanager
def _said(what: str) -> Iterator[None]:
    """Whatever a library raises about a file comes out as a `ValueError` that begins with `what`."""
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise ValueError(f"{what} ({type(error).__name__}: {lines[0]})") from error


def require(name: str) -> Any:
    """The module `name`, or `ModuleNotFoundError` that says how to install it."""
    import importlib

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ModuleNotFoundError(f"reading language models needs {name!r}: {_INSTALL}", name=name) from None


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """No 'Loading weights' bar: a load of a second is not worth one. No table of weights that were not needed."""
    log = transformers.utils.logging
    shown, verbosity = log.is_progress_bar_enabled(), log.get_verbosity()
    log.disable_progress_bar()
    log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if shown:
            log.enable_progress_bar()
