# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin for SAELens' own tests where there is no network: language models of random weights.

Its tests at 6.18 are the newest that can be had, so what later versions need besides is filled in.
"""

import dataclasses
import functools
import types

import torch
from sae_lens.saes.sae import TrainStepInput
from transformer_lens import HookedTransformer, HookedTransformerConfig

SHAPES = {"tiny-stories-1M": (8, 64, 16, 50257), "solu-1l": (1, 512, 8, 48262), "gpt2": (12, 768, 12, 50257)}


def _from_pretrained(cls, model_name, *args, device="cpu", **kwargs):
    layers, width, heads, vocabulary = SHAPES[model_name.split("/")[-1]]
    config = HookedTransformerConfig(
        n_layers=layers, d_model=width, n_heads=heads, d_head=width // heads, n_ctx=128, d_vocab=vocabulary,
        act_fn="gelu_new", model_name=model_name, device=device, seed=0, default_prepend_bos=True,
    )  # fmt: skip
    model = cls(config)
    model.tokenizer = types.SimpleNamespace(padding_side="right")  # see _tokens
    return model


def pytest_configure(config):
    HookedTransformer.from_pretrained = classmethod(_from_pretrained)
    HookedTransformer.from_pretrained_no_processing = classmethod(_from_pretrained)
    HookedTransformer.to_tokens = _tokens
    init, names = TrainStepInput.__init__, [f.name for f in dataclasses.fields(TrainStepInput)]

    @functools.wraps(init)
    def with_defaults(self, *args, **kwargs):
        if "is_logging_step" in names and len(args) < len(names):
            kwargs.setdefault("is_logging_step", False)
        init(self, *args, **kwargs)

    TrainStepInput.__init__ = with_defaults


def _tokens(self, text, prepend_bos=True, **kwargs):
    """Words by their letters."""
    rows = [
        [sum(word.encode()) % self.cfg.d_vocab for word in row.split()]
        for row in ([text] if isinstance(text, str) else text)
    ]
    length = max(map(len, rows))
    return torch.tensor([[0] * bool(prepend_bos) + row + [0] * (length - len(row)) for row in rows])
