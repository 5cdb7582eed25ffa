# SPDX-License-Identifier: Apache-2.0
"""A tiny language model with its tokenizer, and texts, as files: what the tests of whole runs work on."""

import json
import random

import pytest
import torch

WORDS = "river stone light winter paper garden copper signal window harbour ledger candle".split()
D = 32


def tokenizer():
    """Bytes as tokens, after <|endoftext|>."""
    tokenizers = pytest.importorskip("tokenizers", reason="the extra 'lm' is not installed")
    vocabulary = ["<|endoftext|>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={t: i for i, t in enumerate(vocabulary)}, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    return made


def llama():
    """Three blocks of width `D`, random weights large enough for the blocks to matter."""
    transformers = pytest.importorskip("transformers", reason="the extra 'lm' is not installed")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=257, hidden_size=D, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.4,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def bert():
    """An encoder of two blocks of width `D`."""
    transformers = pytest.importorskip("transformers", reason="the extra 'lm' is not installed")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=257, hidden_size=D, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, initializer_range=0.4,
    )  # fmt: skip
    return transformers.BertModel(config).eval()


def save(folder, model):
    """A model folder as `save_pretrained` writes it."""
    from transformers import PreTrainedTokenizerFast

    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer(), bos_token="<|endoftext|>").save_pretrained(folder)
    return folder


def documents(count, seed=1, words=100):
    choose = random.Random(seed)
    return [" ".join(choose.choices(WORDS, k=choose.randint(words // 4, words))) for _ in range(count)]


def write_text(path, count=40, seed=1):
    """A .jsonl of documents of different lengths."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(count, seed)), encoding="utf-8")
    return path
