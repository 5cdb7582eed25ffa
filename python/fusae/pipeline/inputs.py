# SPDX-License-Identifier: Apache-2.0
"""What a run from text works on: a language model, documents in two parts, and these as chunks of tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..data import TokenChunks, iter_documents, load_model, split_documents, tokenize
from ..data.text import iter_part
from .config import DataConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer

#: What `DataConfig.held_out_tokens` and `loss_tokens` are at most where they are not given.
HELD_OUT_TOKENS, LOSS_TOKENS = 100_000, 20_000


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A language model and documents to run it on.

    Attributes:
        model, tokenizer: as `fusae.data.load_model` gives them.
        train, held_out: documents, to be read any number of times; none is in both.
        model_name, text_name: for the report.
        bos: the model's BOS token, or None, for `tokenize`.
        sha256: file name -> sum of the files these came from, for config.json.
    """

    model: nn.Module
    tokenizer: Tokenizer
    train: Iterable[str]
    held_out: Iterable[str]
    model_name: str
    text_name: str
    bos: str | None = None
    sha256: dict[str, str] = dataclasses.field(default_factory=dict)

    def chunks(self, config: DataConfig, part: str, wanted: int | None, show: bool = True) -> TokenChunks:
        """The first chunks of a part ('train' or 'held_out') that hold `wanted` rows to keep; None: all.

        Fewer where the text has fewer. Raises `ValueError` where it has none.
        """
        documents = getattr(self, part)
        # Half as many again where some are short: seldom too few, and what is too much is cut off.
        margin = 1.5 if config.tails else 1.0
        full = max(1, config.ctx - max(1, config.skip_positions))
        limit = None if wanted is None else int(margin * -(-wanted // full))
        while True:
            chunks = tokenize(
                documents, self, config.ctx, config.separator or None, limit, tails=config.tails, progress=show
            )
            usable = _usable(chunks, config)
            if wanted is None or usable[-1] >= wanted or len(chunks) < limit:
                break
            # Short chunks: more of them are needed than there would be of full ones.
            limit = int(limit * min(10.0, wanted / max(usable[-1], 1)) * 1.1) + 1
        if usable[-1] == 0:
            raise ValueError(
                f"text: its {_NAMES[part]} part leaves no row at all: no chunk is longer than skip_positions = "
                f"{config.skip_positions}; take longer documents or a smaller skip_positions"
            )
        return chunks if wanted is None else chunks[: int(np.searchsorted(usable, wanted)) + 1]


_NAMES = {"train": "training", "held_out": "held-out"}


def rows_in(chunks: TokenChunks, config: DataConfig) -> int:
    """Rows of `chunks` to keep, but for norm outliers, which only the model can tell."""
    return int(_usable(chunks, config)[-1])


def _usable(chunks: TokenChunks, config: DataConfig) -> np.ndarray:
    """Cumulative over the chunks: their rows to keep, int64 ``[chunks]``."""
    counts = np.maximum(chunks.lengths.astype(np.int64) - config.skip_positions, 0)
    if config.drop_special and chunks.special:
        for start in range(0, len(chunks), 4096):  # bounds the scratch memory
            part = chunks[start : start + 4096]
            special = np.isin(part.ids, chunks.special) & (np.arange(part.shape[1]) < part.lengths[:, None])
            counts[start : start + 4096] -= special[:, config.skip_positions :].sum(1)
    return np.cumsum(counts)


def load_inputs(config: DataConfig, device: torch.device | str = "cpu", *, everything: bool = False) -> Inputs:
    """Model and documents that a `DataConfig` names; the model on `device`.

    Args:
        everything: take all documents as held out.

    Raises what `fusae.data.load_model` and `iter_documents` raise, and `ValueError` for text without one document in
    each part.
    """
    config.require_text()
    loaded = load_model(config.model, getattr(torch, config.model_dtype))

    def documents() -> Iterator[str]:
        return iter_documents(config.text, config.column, config.split)

    share = 1.0 if everything else config.held_out
    if config.document_order == "shuffled":
        train, held_out = split_documents(documents(), share)
    else:
        train, held_out = (_Part(documents, part, share) for part in ("train", "held_out"))
    for part, found in (("train", train), ("held_out", held_out))[everything:]:
        if next(iter(found), None) is None:
            raise ValueError(
                f"text: none of its documents fell into the {_NAMES[part]} part (held_out = {config.held_out:g} of "
                "them, chosen by hash); a .txt file is one document: put paragraphs into several files or into .jsonl"
            )
    return Inputs(
        loaded.model.to(device), loaded.tokenizer, train, held_out, loaded.name, Path(config.text).name,
        getattr(loaded, "bos", None),
    )  # fmt: skip


class _Part:
    """The documents of one part, read from the file each time."""

    def __init__(self, documents: Any, part: str, share: float) -> None:
        self._documents, self._part, self._share = documents, part, share

    def __iter__(self) -> Iterator[str]:
        return iter_part(self._documents(), self._part, self._share)
