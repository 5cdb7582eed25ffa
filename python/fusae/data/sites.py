# SPDX-License-Identifier: Apache-2.0
"""Which places of a language model are worth a dictionary: residual stream, and what attention and MLP add to it."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from .hooks import INPUT, text_config

# Names inside a block, of the layouts that are known: (input of the MLP, its output), and what attention adds.
_MLP = (
    ("mlp", "mlp"),  # Llama, Qwen, Gemma, GPT-2, NeoX, Falcon
    ("block_sparse_moe", "block_sparse_moe"),  # Mixtral, as it was
    ("feed_forward", "feed_forward"),
    ("ffn", "ffn"),  # DistilBERT
    ("intermediate", "output.dense"),  # BERT
    ("fc1", "fc2"),  # OPT
    ("layer.1.DenseReluDense", "layer.1.DenseReluDense"),  # T5
)
_ATTENTION = (
    "self_attn",
    "self_attention",
    "attn",
    "attention.output.dense",  # BERT, where "attention" itself has added the residual stream
    "attention",
    "layer.0.SelfAttention",
)


class Site(NamedTuple):
    """A place to capture: `name` as `fusae.data.collect` takes it, `kind` ``"residual"`` (after a block),
    ``"attention_out"``, ``"mlp_in"`` or ``"mlp_out"``, the block's number from 0 on, and the width d of its rows."""

    name: str
    kind: str
    layer: int
    width: int


def sites(model: nn.Module) -> list[Site]:
    """The usual places of a `transformers` model, block by block; other modules can be named just as well.

    Raises `ValueError` for a model without a stack of blocks or a ``config.hidden_size``.
    """
    width = getattr(text_config(model), "hidden_size", None)
    stack = _stack_of(model)
    if stack is None or width is None:
        lacks = "stack of blocks (nn.ModuleList)" if stack is None else "config.hidden_size"
        raise ValueError(f"model: {type(model).__name__} has no {lacks}; choose from its named_modules()")
    found = []
    for layer, block in enumerate(model.get_submodule(stack)):
        inside = dict(block.named_modules())
        names = {"residual": f"{stack}.{layer}"}
        attention = next((name for name in _ATTENTION if name in inside), None)
        if attention is not None:
            names["attention_out"] = f"{stack}.{layer}.{attention}"
        mlp = next((pair for pair in _MLP if pair[0] in inside and pair[1] in inside), None)
        if mlp is not None:
            names["mlp_in"] = f"{stack}.{layer}.{mlp[0]}{INPUT}"
            names["mlp_out"] = f"{stack}.{layer}.{mlp[1]}"
        found += [Site(name, kind, layer, width) for kind, name in names.items()]
    return found


def _stack_of(model: nn.Module) -> str | None:
    """The longest list of modules that is not inside another one."""
    stacks = {name: len(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = {n: size for n, size in stacks.items() if size and not any(n.startswith(f"{o}.") for o in stacks)}
    return max(outer, key=outer.get, default=None)
