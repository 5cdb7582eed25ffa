# SPDX-License-Identifier: Apache-2.0
"""A tiny language model with its tokenizer, and texts, as files: what tests of whole runs work on.

Needs `transformers` and `tokenizers`.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

WORDS = "river stone light winter paper garden copper signal window harbour ledger candle".split()
D = 32


def tokenizer() -> Any:
    """Bytes as tokens, after <|endoftext|>."""
    import tokenizers

    vocabulary = ["<|endoftext|>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={t: i for i, t in enumerate(vocabulary)}, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    return made


def llama(layers: int = 3) -> Any:
    """Blocks of width `D`, random weights large enough for the blocks to matter."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=257, hidden_size=D, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.4,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def bert() -> Any:
    """An encoder of two blocks of width `D`."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=257, hidden_size=D, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, initializer_range=0.4,
    )  # fmt: skip
    return transformers.BertModel(config).eval()


def save(folder: Path, model: Any) -> Path:
    """A model folder as `save_pretrained` writes it."""
    import transformers
    from transformers import PreTrainedTokenizerFast

    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer(), bos_token="<|endoftext|>").save_pretrained(folder)
    if shown:
        transformers.utils.logging.enable_progress_bar()
    return folder


def documents(count: int, seed: int = 1, words: int = 100) -> list[str]:
    """Made of a few words, a quarter of `words` to `words` long."""
    choose = random.Random(seed)
    return [" ".join(choose.choices(WORDS, k=choose.randint(words // 4, words))) for _ in range(count)]


def write_text(path: Path, count: int = 40, seed: int = 1) -> Path:
    """A .jsonl of documents of different lengths."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(count, seed)), encoding="utf-8")
    return path
