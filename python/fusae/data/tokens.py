# SPDX-License-Identifier: Apache-2.0
"""Token chunks: pieces of documents as ids ``[chunks, ctx]``, padded on the right where a piece is shorter."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from .progress import token_progress

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from .models import LoadedModel

# Chunks are put in order of length within stretches of so many batches: long enough that batches are nearly even,
# short enough that a run that was stopped can go on at the start of a stretch.
_WINDOW_BATCHES = 32


@dataclasses.dataclass(frozen=True, eq=False)
class TokenChunks:
    """Token ids of chunks, each a piece of one document.

    Attributes:
        ids: ``[chunks, ctx]`` integers (uint16 or int32 from `tokenize`); positions from a chunk's length on hold
            `pad_id`.
        lengths: ``[chunks]`` int32, tokens in use of each, 1 to ctx.
        pad_id: an id of the vocabulary; what it is does not matter, since padding is masked.
        special: ids that are no text: BOS, EOS, separator, padding. A caller may drop their rows.

    ``chunks[a:b]`` and ``chunks[index array]`` are `TokenChunks` of these.

    Raises `TypeError` for ids that are no integers, `ValueError` for shapes that do not fit or no chunk at all.
    """

    ids: np.ndarray
    lengths: np.ndarray
    pad_id: int = 0
    special: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        ids, lengths = self.ids, self.lengths
        if not isinstance(ids, np.ndarray) or not np.issubdtype(ids.dtype, np.integer):
            what = f"dtype {ids.dtype}" if isinstance(ids, np.ndarray | Tensor) else type(ids).__name__
            raise TypeError(f"chunks must be an integer array of token ids [chunks, ctx], got {what}")
        if ids.ndim != 2 or 0 in ids.shape:
            raise ValueError(f"chunks must have shape [chunks, ctx] with at least one chunk, got {list(ids.shape)}")
        if not isinstance(lengths, np.ndarray) or not np.issubdtype(lengths.dtype, np.integer):
            raise TypeError(f"lengths must be an integer array [chunks], got {type(lengths).__name__}")
        if lengths.shape != ids.shape[:1] or lengths.min() < 1 or lengths.max() > ids.shape[1]:
            raise ValueError(
                f"lengths must be [{ids.shape[0]}] integers from 1 to {ids.shape[1]}, got {list(lengths.shape)}"
                + (f" from {lengths.min()} to {lengths.max()}" if lengths.size else "")
            )

    @classmethod
    def of(cls, chunks: TokenChunks | np.ndarray | Tensor) -> TokenChunks:
        """`chunks` itself, or an integer array or tensor ``[chunks, ctx]`` as chunks that are full."""
        if isinstance(chunks, TokenChunks):
            return chunks
        ids = chunks.detach().cpu().numpy() if isinstance(chunks, Tensor) else chunks
        full = ids.shape if isinstance(ids, np.ndarray) and ids.ndim == 2 else (0, 0)
        return cls(ids, np.full(full[0], full[1], dtype=np.int32))

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __repr__(self) -> str:
        return f"TokenChunks({list(self.shape)} {self.ids.dtype}, {self.tokens:,} tokens)"

    @property
    def shape(self) -> tuple[int, int]:
        """``(chunks, ctx)``"""
        return self.ids.shape  # type: ignore[return-value]

    @property
    def tokens(self) -> int:
        """Tokens in use, over all chunks."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def padded(self) -> bool:
        """Whether a chunk is shorter than ctx."""
        return int(self.lengths.min()) < self.shape[1]

    def __getitem__(self, index: slice | np.ndarray) -> TokenChunks:
        if not isinstance(index, slice | np.ndarray):
            raise TypeError(f"chunks[...] takes a slice or an index array (row(i) gives one chunk), got {index!r}")
        return dataclasses.replace(self, ids=self.ids[index], lengths=self.lengths[index])

    def row(self, chunk: int) -> np.ndarray:
        """The ids in use of one chunk, ``[length]``."""
        return self.ids[chunk, : self.lengths[chunk]]

    def sha256(self) -> str:
        """Over ids and lengths; padding, `special` and the integers' dtype do not enter.

        Equivalent to, for full chunks: ``hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()``
        """
        digest, positions = hashlib.sha256(), np.arange(self.shape[1])
        for start in range(0, len(self), 4096):
            part = self[start : start + 4096]
            used = np.where(positions < part.lengths[:, None], part.ids, 0) if part.padded else part.ids
            digest.update(np.ascontiguousarray(used, dtype="<i8"))
        if self.padded:
            digest.update(np.ascontiguousarray(self.lengths, dtype="<i8"))
        return digest.hexdigest()

    def batches(self, batch_size: int, window: int | None = None) -> list[np.ndarray]:
        """Index arrays of `batch_size` chunks (the last of a window may be smaller), similar lengths together.

        Chunks are sorted by length, longest first, within each `window` consecutive chunks (default: 32 batches), and
        the windows follow each other: batches that make up whole windows are of the first so many chunks. Full chunks
        keep their order. A function of the arguments alone.
        """
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
        window = _WINDOW_BATCHES * batch_size if window is None else window
        if not isinstance(window, int) or window < 1:
            raise ValueError(f"window must be an integer of at least 1, or None, got {window!r}")
        batches = []
        for start in range(0, len(self), window):
            order = start + np.argsort(-self.lengths[start : start + window], kind="stable")
            batches += [np.sort(order[i : i + batch_size]) for i in range(0, len(order), batch_size)]
        return batches


# --- from text -------------------------------------------------------------------------------------------------------

# Documents are tokenised some together, and long ones in parts: what is held beside the ids stays small.
_BLOCK_DOCUMENTS, _BLOCK_CHARACTERS = 64, 1 << 20

# What may stand before a text, for tokenizers that do not say; first the one models of raw text begin with.
_SEPARATORS = ("<|endoftext|>", "<|begin_of_text|>", "<bos>", "<s>", "[BOS]", "[CLS]")
_PADDING = ("[PAD]", "<pad>", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>")


def tokenize(
    documents: Iterable[str],
    tokenizer: Tokenizer | LoadedModel,
    ctx: int = 128,
    separator: str | None = "auto",
    limit: int | None = None,
    *,
    tails: bool = False,
    min_tokens: int = 8,
    progress: bool = False,
) -> TokenChunks:
    """Documents as `TokenChunks` ``[chunks, ctx]``, uint16 where the vocabulary fits, else int32.

    Each document is cut into pieces and `separator` is put before each, so position 0 of every chunk is the same token:
    models use the first position as an attention sink, and it is dropped later. A chunk never mixes two documents.
    Documents are read one after the other and not kept.

    Args:
        tokenizer: of the model, or what `load_model` gave.
        ctx: tokens a chunk, separator included.
        separator: ``"auto"``: what the tokenizer itself puts around a text (Llama: its BOS; BERT: [CLS] before and
            [SEP] after each piece); if nothing, ``<|endoftext|>`` or else the model's BOS token, where the vocabulary
            has one. Otherwise a token of the vocabulary, or None for none.
        limit: stop after so many chunks.
        tails: keep what is left at a document's end, also of documents shorter than a piece, as a shorter chunk padded
            on the right. Otherwise it is not used.
        min_tokens: the shortest such rest that is kept, in tokens of text.
        progress: show a bar in tokens.

    Raises `ValueError` for a `ctx` without room for text, a separator that is no token of the vocabulary, or documents
    that give no chunk at all; `TypeError` for documents that are no strings.
    """
    for name, value in (("limit", limit), ("min_tokens", min_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1{' or None' if name == 'limit' else ''}, got {value}")
    bos, tokenizer = getattr(tokenizer, "bos", None), getattr(tokenizer, "tokenizer", tokenizer)
    with _whole_texts(tokenizer):
        head, tail = _frame(tokenizer, separator, bos)
        if ctx < max(2, len(head) + len(tail) + 1):
            raise ValueError(f"ctx must be at least {max(2, len(head) + len(tail) + 1)}, got {ctx}")
        pad_id, special = _special(tokenizer, head + tail)
        found = _Chunks(tokenizer, ctx, head, tail, pad_id)
        shortest = min(min_tokens, found.piece) if tails else found.piece
        seen = 0
        with token_progress(progress) as bar:
            task = bar.add_task("tokens", total=None if limit is None else limit * ctx)
            for block in _blocks(documents):
                batch = tokenizer.encode_batch_fast([text for text, _ in block], add_special_tokens=False)
                for (_, ends), encoding in zip(block, batch, strict=True):
                    found.add(encoding.ids, shortest if ends else None)
                    seen += ends
                bar.update(task, completed=found.tokens if limit is None else min(found.tokens, limit * ctx))
                if limit is not None and found.count >= limit:
                    break
    if not found.count:
        raise ValueError(
            f"documents: none of {seen} has the {shortest} tokens that one chunk of ctx {ctx} needs"
            + ("" if tails else "; tails=True keeps shorter ones")
            if seen
            else "documents: there is none"
        )
    return found.finish(limit, special)


class _Chunks:
    """The growing arrays, and what the document at hand has left for its next piece."""

    def __init__(self, tokenizer: Tokenizer, ctx: int, head: list[int], tail: list[int], pad_id: int) -> None:
        # Not the size of the vocabulary: there may be gaps in its ids.
        largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
        self._dtype = np.uint16 if largest < 1 << 16 else np.int32
        self._head, self._tail, self._pad_id = head, tail, pad_id
        self.piece = ctx - len(head) - len(tail)
        self.count = self.tokens = 0
        self._ids = np.empty((0, ctx), dtype=self._dtype)
        self._lengths = np.empty(0, dtype=np.int32)
        self._left = np.empty(0, dtype=self._dtype)

    def add(self, ids: list[int], shortest: int | None) -> None:
        """Tokens of the document at hand; with a number it ends, and a rest of at least so many is a chunk."""
        left = np.concatenate([self._left, np.asarray(ids, dtype=self._dtype)])
        whole = len(left) // self.piece * self.piece
        if whole:
            self._append(left[:whole].reshape(-1, self.piece))
        self._left = left[whole:]
        if shortest is not None:
            if len(self._left) >= shortest:
                self._append(self._left[None])
            self._left = self._left[:0]

    def _append(self, rows: np.ndarray) -> None:
        first, last = self.count, self.count + len(rows)
        if last > len(self._ids):
            more = max(1024, last, 2 * len(self._ids)) - len(self._ids)
            self._ids = np.concatenate([self._ids, np.full((more, self._ids.shape[1]), self._pad_id, self._dtype)])
            self._lengths = np.concatenate([self._lengths, np.empty(more, dtype=np.int32)])
        text = slice(len(self._head), len(self._head) + rows.shape[1])
        length = text.stop + len(self._tail)
        self._ids[first:last, : text.start] = self._head
        self._ids[first:last, text] = rows
        self._ids[first:last, text.stop : length] = self._tail
        self._lengths[first:last] = length
        self.count, self.tokens = last, self.tokens + length * len(rows)

    def finish(self, limit: int | None, special: tuple[int, ...]) -> TokenChunks:
        count = self.count if limit is None else min(limit, self.count)
        return TokenChunks(self._ids[:count].copy(), self._lengths[:count].copy(), self._pad_id, special)


def _blocks(documents: Iterable[str]) -> Iterator[list[tuple[str, bool]]]:
    """Texts to be tokenised together, each with whether its document ends there."""
    if isinstance(documents, str | bytes):
        raise TypeError(f"documents must be an iterable of strings, got one {type(documents).__name__}")
    block: list[tuple[str, bool]] = []
    characters = 0
    for document in documents:
        if not isinstance(document, str):
            raise TypeError(f"documents must be strings, got a {type(document).__name__}")
        for part in _parts(document):
            block.append(part)
            characters += len(part[0])
            if len(block) >= _BLOCK_DOCUMENTS or characters >= _BLOCK_CHARACTERS:
                yield block
                block, characters = [], 0
    if block:
        yield block


def _parts(document: str) -> Iterator[tuple[str, bool]]:
    """A document, or parts of a long one; the cuts are before a blank, where tokens begin anyway."""
    try:
        document.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can write, is no text
        document = document.encode(errors="replace").decode()
    start = 0
    while len(document) - start > _BLOCK_CHARACTERS:
        end = start + _BLOCK_CHARACTERS
        cut = max(document.rfind(blank, start + 1, end) for blank in " \n")
        cut = end if cut < 0 else cut
        yield document[start:cut], False
        start = cut
    yield document[start:], True


@contextmanager
def _whole_texts(tokenizer: Tokenizer) -> Iterator[None]:
    """Inside, texts are neither cut nor padded, which tokenizer files of sentence encoders ask for."""
    truncation, padding = tokenizer.truncation, tokenizer.padding
    tokenizer.no_truncation()
    tokenizer.no_padding()
    try:
        yield
    finally:
        if truncation is not None:
            tokenizer.enable_truncation(**truncation)
        if padding is not None:
            tokenizer.enable_padding(**padding)


def _frame(tokenizer: Tokenizer, separator: str | None, bos: str | None) -> tuple[list[int], list[int]]:
    """Ids that stand before and after each piece."""
    if separator is None:
        return [], []
    if separator != "auto":
        token = tokenizer.token_to_id(separator)
        if token is None:
            raise ValueError(f"separator: {separator!r} is no token of this vocabulary; pass one that is, or None")
        return [token], []
    encoding = tokenizer.encode("a")
    added = encoding.special_tokens_mask
    if any(added):
        before = added.index(0) if 0 in added else 1
        after = added[::-1].index(0) if 0 in added else len(added) - 1
        return encoding.ids[:before], encoding.ids[len(added) - after :]
    known = (_SEPARATORS[0], bos, *_SEPARATORS[1:])
    ids = [tokenizer.token_to_id(name) for name in known if name is not None]
    return [i for i in ids if i is not None][:1], []


def _special(tokenizer: Tokenizer, frame: list[int]) -> tuple[int, tuple[int, ...]]:
    """What to pad with, and the ids that are no text: the frame, padding, and other control tokens but the unknown."""
    unknown = getattr(tokenizer.model, "unk_token", None)
    added = tokenizer.get_added_tokens_decoder()
    special = {*frame, *(i for i, token in added.items() if token.special and token.content != unknown)}
    padding = [i for i in map(tokenizer.token_to_id, _PADDING) if i is not None][:1]
    special |= set(padding)
    return (padding or frame or [0])[0], tuple(sorted(special))
